"""JSON texts that satisfy a JSON Schema.

What llguidance cannot read is left out of what it is given, and what it does not know (`not`, `if`
and others) it leaves out itself. Both only ever forbid texts, so the language that it reads has all
texts of the schema, and some more, which `ByteJsonSchema` refuses where they would end.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from jsonschema.exceptions import SchemaError
from jsonschema.validators import (
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
    extend,
)
from llguidance import LLMatcher
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from genlm_bytes_smc.constraints.base import ConstraintError, show
from genlm_bytes_smc.constraints.matcher import MAX_SIZE, ByteMatcher, check_size, on_large_stack
from genlm_bytes_smc.constraints.tree import MAX_SNAPSHOTS

_NOTES = ("title", "description", "default", "examples", "$comment", "deprecated")
_BESIDE = ("$ref", "definitions", "$defs", "$id", "id", "$schema", "$anchor")
_FORMAT, _KEYS = "Unknown format:", "Unimplemented keys: "
_COUNT = re.compile(r" \(.*\)$")  # how often it was said
_PHRASES = {"oneOf not fully": "oneOf", "min/maxProperties only": "minProperties, maxProperties"}

_LENIENT = {"lenient": True, "coerce_one_of": True}
_WHITESPACE: dict[str, dict[str, Any]] = {
    "any": {"whitespace_flexible": True},
    "none": {"whitespace_flexible": False},
    "python": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}

_DRAFTS: dict[str, Any] = {  # those that llguidance knows, by their addresses
    draft.META_SCHEMA["$schema"].removesuffix("#"): draft
    for draft in (
        Draft4Validator,
        Draft6Validator,
        Draft7Validator,
        Draft201909Validator,
        Draft202012Validator,
    )
}
_BY_PLACE = {uri.partition("://")[2]: draft for uri, draft in _DRAFTS.items()}
_BY_PLACE["json-schema.org/schema"] = Draft202012Validator  # the latest
_WITH_SIBLINGS = (Draft201909Validator, Draft202012Validator)  # of `$ref`, which count


class ByteJsonSchema(ByteMatcher):
    """JSON texts, as UTF-8, that a schema accepts.

    llguidance decides byte by byte; where it would let a text end, the `jsonschema` module
    has the last word, so every admitted text is JSON that satisfies the schema. Keywords that
    llguidance does not know (`uniqueItems`, `not`, `if`, `contains`, `propertyNames`, a `pattern`
    with lookaround and others) are checked by `jsonschema` alone, where the text ends; a text that
    breaks one comes to no end. `format` is llguidance's own; one that it does not know constrains
    nothing, as the standard has it. Not every such text is admitted: an object's properties come
    in the order the schema lists them, others after; strings have no needless escapes (such as
    `\\u00e9`), integers and numbers with bounds no exponent, values of `enum` and `const` one
    spelling; and a number of so many digits that Python cannot check it comes to no end.

    Args:
        schema: the schema as a mapping, a bool, or JSON text; or a class that knows its own
            (pydantic's `model_json_schema`).
        whitespace: between tokens, "any" JSON whitespace, "none", "python" for the spaces
            `json.dumps` writes, or a regular expression.
        device: where weights are returned (None: the CPU).
        max_states: matchers held between calls (1 KiB and some 100 bytes a byte read, each).
        max_size: refuse a schema of more characters of JSON than this.

    Raises:
        TypeError: a limit that is no int.
        ConstraintError: the schema is no JSON, too long, of another draft than 4, 6, 7, 2019-09
            or 2020-12, breaks its meta-schema (with the place), refers to something outside
            itself (nothing is ever fetched), or is refused by llguidance (with its reason).

    Warns:
        UserWarning: a `format` that llguidance does not know, which is left out; or keywords that
            are checked only where a text ends.
    """

    _transient = ByteMatcher._transient | {"_validator"}

    def __init__(
        self,
        schema: Mapping[str, Any] | bool | str | type,
        whitespace: str = "any",
        *,
        device: torch.device | str | None = None,
        max_states: int = MAX_SNAPSHOTS,
        max_size: int = MAX_SIZE,
    ) -> None:
        try:
            self.schema = _checked(schema, max_size)
            _parts(self.schema)
        except RecursionError:
            raise ConstraintError(
                "the schema nests more deeply than Python's recursion limit lets it be checked; "
                "write fewer schemas inside one another ($defs and $ref make it flat)"
            ) from None
        self.whitespace = whitespace
        options = _LENIENT | _WHITESPACE.get(whitespace, {"whitespace_pattern": whitespace})
        unread: list[str] = []
        try:
            self._read_schema(json.dumps(self.schema), options, device, max_states)
        except ConstraintError as error:
            plain = copy.deepcopy(self.schema)
            unread = plainer(_parts(plain), _draft(plain) in _WITH_SIBLINGS)
            if plain == self.schema:
                raise
            try:
                self._read_schema(json.dumps(plain), options, device, max_states)
            except ConstraintError:
                raise error from None
        formats, keywords = left_out(self.warnings)
        if formats:
            warnings.warn(f"unknown formats constrain nothing: {', '.join(formats)}", stacklevel=2)
        if keywords or unread:
            warnings.warn(
                "checked only where a text ends, so that some texts come to no end: "
                f"{', '.join(keywords + unread)}",
                stacklevel=2,
            )

    def _read_schema(
        self, source: str, options: dict[str, Any], device: Any, max_states: int
    ) -> None:
        """Compile a schema by llguidance."""
        read = partial(LLMatcher.grammar_from_json_schema, source, overrides=options)
        try:
            grammar = str(on_large_stack(len(source), read))
        except ValueError as e:
            raise ConstraintError(f"llguidance refuses this schema: {e}") from None
        super().__init__(grammar, device, max_states)

    def _may_end(self, node: int) -> bool:
        # llguidance lets {"type": "number", "exclusiveMinimum": 0} be 0, for one.
        try:
            return self._validator(json.loads(self.text(node)))
        except RecursionError:  # nested too deeply to be looked at again
            return True
        except (OverflowError, ValueError):  # a number that Python cannot read, or not divide
            return False

    @cached_property
    def _validator(self) -> Callable[[Any], bool]:
        return _validator_of(self.schema)

    def _facts(self) -> dict[str, str]:
        return {"schema": show(self.schema), "whitespace": self.whitespace, **super()._facts()}


def _checked(schema: Any, max_size: int) -> dict[str, Any]:
    """Return the schema as JSON data, valid under its meta-schema; its draft is named in full."""
    if isinstance(schema, type) and callable(getattr(schema, "model_json_schema", None)):
        schema = schema.model_json_schema()  # type: ignore[attr-defined]
    if isinstance(schema, bytes | bytearray):
        schema = schema.decode("utf-8", "replace")
    try:
        source = schema if isinstance(schema, str) else json.dumps(schema, default=_plain)
        check_size(source, max_size)
        data = json.loads(source)
    except ConstraintError:
        raise
    except (TypeError, ValueError) as e:
        raise ConstraintError(f"a schema is JSON data or JSON text: {e}") from None
    if not isinstance(data, dict | bool):
        raise ConstraintError(f"a schema is an object or a bool, got {show(data)}")
    if isinstance(data, bool):
        if not data:
            raise ConstraintError("the schema false accepts nothing: no text would be left")
        return {}
    draft = _draft(data)
    if "$schema" in data:
        data["$schema"] = draft.META_SCHEMA["$schema"]
    try:
        draft.check_schema(data)
    except SchemaError as e:
        raise ConstraintError(f"not a JSON Schema: at {e.json_path}, {e.message}") from None
    return data


def _draft(schema: dict[str, Any]) -> Any:
    """Return the validator class of a schema's draft."""
    uri = schema.get("$schema", "https://json-schema.org/schema")
    place = uri.partition("://")[2].removesuffix("#") if isinstance(uri, str) else None
    if place not in _BY_PLACE:
        raise ConstraintError(
            f"$schema must name one of the drafts {', '.join(_DRAFTS)}, got {show(uri)}"
        )
    return _BY_PLACE[place]


def _parts(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all parts of a schema that are schemas. Where one names the draft, that is left out.

    Raises:
        ConstraintError: a reference leads out of the schema, or a part names another draft.
    """
    of_all = _draft(schema)
    draft = specification_with(of_all.META_SCHEMA["$schema"])
    todo = [(schema, Registry().resolver_with_root(draft.create_resource(schema)))]
    seen, parts = set(), list[dict[str, Any]]()
    while todo:
        part, resolver = todo.pop()
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        parts.append(part)
        if part is not schema and "$schema" in part and _draft(part) is not of_all:
            raise ConstraintError(
                f"$schema may name another draft at the root only, got {show(part['$schema'])} "
                "in a part"
            )
        if part is not schema:
            part.pop("$schema", None)
        if isinstance(target := part.get("$ref"), str):
            try:
                found = resolver.lookup(target)
            except Unresolvable:
                raise ConstraintError(
                    f"the reference {show(target)} leads to no place in this schema, and nothing "
                    "is fetched; put what it means under $defs"
                ) from None
            todo.append((found.contents, found.resolver))
        for inner in draft.create_resource(part).subresources():
            if isinstance(inner.contents, dict):  # a list of names may stand in `dependencies`
                todo.append((inner.contents, resolver.in_subresource(inner)))
    return parts


def _validator_of(schema: dict[str, Any]) -> Callable[[Any], bool]:
    """Return the function that says whether JSON data satisfies the schema; it fetches nothing.

    A reference is followed once for each part of the data: references that double from one
    level to the next would double the time.
    """
    draft = _draft(schema)
    follow = draft.VALIDATORS["$ref"]
    known: dict[tuple[int, int], Any] = {}  # (reference, part of the data) -> first error

    def remembered(validator: Any, target: Any, part: Any, place: Any) -> Iterator[Any]:
        key = id(place), id(part)
        if key not in known:
            known[key] = next(iter(follow(validator, target, part, place) or ()), None)
        if known[key] is not None:
            yield known[key]

    # With $schema, a reference to the root would go on with the class that does not remember.
    root = {k: v for k, v in schema.items() if k != "$schema"}
    checks = extend(draft, {"$ref": remembered})(root, registry=Registry())

    def is_valid(data: Any) -> bool:
        known.clear()
        return bool(checks.is_valid(data))

    return is_valid


def _plain(part: Any) -> Any:
    """Return a mapping that is no `dict` as one."""
    if isinstance(part, Mapping):
        return dict(part)
    raise TypeError(f"{type(part).__name__} is no JSON data: {part!r}")


def plainer(parts: Iterable[dict[str, Any]], siblings: bool) -> list[str]:
    """Leave out what llguidance refuses, in place, and return the keywords that it was.

    Keywords beside `$ref` count where `siblings`.
    """
    out: dict[str, None] = {}
    for part in parts:
        if isinstance(part.get("$ref"), str):
            for name in [k for k in part if k in _NOTES or not (siblings or k in _BESIDE)]:
                del part[name]
        pattern = part.get("pattern")
        alone = {"type": "string", "pattern": pattern}
        if isinstance(pattern, str) and not _reads(json.dumps(alone)):
            del part["pattern"]
            out["pattern"] = None
        named = part.get("patternProperties")
        names = dict.fromkeys(named, True) if isinstance(named, dict) else {}
        if names and not _reads(json.dumps({"type": "object", "patternProperties": names})):
            del part["patternProperties"]
            part.pop("additionalProperties", None)  # says which names the patterns leave
            out["patternProperties, additionalProperties"] = None
    return list(out)


@lru_cache(maxsize=1024)
def _reads(schema: str) -> bool:
    """Return whether llguidance takes a schema."""
    try:
        return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    except ValueError:
        return False


def left_out(warnings: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the formats and the keywords that warnings of llguidance name as left out."""
    formats, keywords = set(), set()
    for warning in warnings:
        for line in filter(None, map(str.strip, warning.splitlines())):
            if line.startswith(_FORMAT):
                formats.add(_COUNT.sub("", line.removeprefix(_FORMAT)).strip() or "''")
            elif line.startswith(_KEYS):
                keywords.update(re.findall(r'"([^"]*)"', line))
            else:
                keywords.add(next((v for k, v in _PHRASES.items() if line.startswith(k)), line))
    return sorted(formats), sorted(keywords)
