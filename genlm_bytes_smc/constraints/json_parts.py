"""JSON Schemas for llguidance: what it cannot read is left to the check of whole texts.

What is left out here, and what llguidance itself leaves out when it is lenient (`uniqueItems`,
`not`, `if` and others), only ever forbids texts. So the language that it reads has all texts of
the schema, and some more, which `ByteJsonSchema` refuses where they would end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

_NOTES = ("title", "description", "default", "examples", "$comment", "deprecated")
_BESIDE = ("$ref", "definitions", "$defs", "$id", "id", "$schema", "$anchor")
_FORMAT, _KEYS = "Unknown format: ", "Unimplemented keys: "
_COUNT = re.compile(r" \(.*\)$")  # how often it was said
_PHRASES = {"oneOf not fully": "oneOf", "min/maxProperties only": "minProperties, maxProperties"}


def plainer(parts: Iterable[dict[str, Any]], siblings: bool) -> list[str]:
    """Leave out what llguidance refuses, in place, and return what it was.

    Args:
        parts: all parts of a schema that are schemas.
        siblings: whether keywords beside `$ref` count, as they do since draft 2019-09.
    """
    out: dict[str, None] = {}
    for part in parts:
        if isinstance(part.get("$ref"), str):
            for name in [k for k in part if k in _NOTES or not (siblings or k in _BESIDE)]:
                del part[name]
        pattern = part.get("pattern")
        if isinstance(pattern, str) and not _reads({"type": "string", "pattern": pattern}):
            del part["pattern"]
            out["pattern"] = None
        named = part.get("patternProperties")
        if isinstance(named, dict) and not _reads_names(tuple(named)):
            del part["patternProperties"]
            part.pop("additionalProperties", None)  # says which names the patterns leave
            out["patternProperties, additionalProperties"] = None
    return list(out)


def _reads_names(patterns: tuple[str, ...]) -> bool:
    """Return whether llguidance takes the patterns of names, together."""
    return _reads({"type": "object", "patternProperties": dict.fromkeys(patterns, True)})


def _reads(schema: Mapping[str, Any]) -> bool:
    return _accepted(json.dumps(schema))


@lru_cache(maxsize=1024)
def _accepted(source: str) -> bool:
    """Return whether llguidance takes a schema."""
    try:
        return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(source))
    except ValueError:
        return False


def left_out(warnings: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the formats and the keywords that warnings of llguidance name as left out."""
    formats, keywords = set(), set()
    for warning in warnings:
        for line in filter(None, map(str.strip, warning.splitlines())):
            if line.startswith(_FORMAT):
                formats.add(_COUNT.sub("", line.removeprefix(_FORMAT)))
            elif line.startswith(_KEYS):
                keywords.update(re.findall(r'"([^"]*)"', line))
            else:
                keywords.add(next((v for k, v in _PHRASES.items() if line.startswith(k)), line))
    return sorted(formats), sorted(keywords)
