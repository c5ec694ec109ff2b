"""The coverage of JSON Schemas is counted, and a document that is not valid is found."""

import json
import pickle
import sqlite3

import pytest

from benchmarks import schema_coverage
from genlm_bytes_smc.constraints import ByteJsonSchema

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TOOL = {
    "name": "move",
    "parameters": {
        "type": "dict",
        "properties": {
            "type": {"type": "string", "enum": ["dict", "float"]},
            "by": {"type": "tuple", "items": {"type": "float"}},
            "any": {"type": "any", "default": "dict"},
        },
    },
}


def test_schemas_are_read_from_folders_and_lines(tmp_path):
    """A schema file, tools one a line and in OpenAI's form; equal ones count once."""
    (tmp_path / "point.json").write_text(json.dumps(POINT), encoding="utf-8")
    (tmp_path / "same.json").write_text(json.dumps(POINT), encoding="utf-8")
    (tmp_path / "data.json").write_text("[1, 2]", encoding="utf-8")
    lines = [json.dumps({"id": 1, "function": [TOOL]}), json.dumps({"id": 2, "answer": {"a": 1}})]
    (tmp_path / "tools.json").write_text("\n".join(lines), encoding="utf-8")
    tools = {"tools": [{"type": "function", "function": {"name": "go", "parameters": {}}}]}
    (tmp_path / "tools2.json").write_text(json.dumps(tools), encoding="utf-8")
    found = dict(schema_coverage.distinct([tmp_path]))
    assert found.pop(str(tmp_path / "point.json")) == POINT
    assert found["move"]["type"] == "object"
    named = found["move"]["properties"]
    assert named["type"] == {"type": "string", "enum": ["dict", "float"]}
    assert named["by"] == {"type": "array", "items": {"type": "number"}}
    assert named["any"] == {"default": "dict"}
    assert len(found) == 1
    assert dict(schema_coverage.read(tmp_path / "tools2.json")) == {"go": {}}


def test_a_cache_of_pages_is_read_without_running_code(tmp_path):
    """Pages that are JSON are schemas; a pickled object of any class is inert."""
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (ran.touch, ())

    path = tmp_path / "cache.sqlite"
    with sqlite3.connect(path) as store:
        store.execute("create table responses (key text, value blob, expires integer)")
        for i, content in enumerate((json.dumps(POINT).encode(), b"<html>")):
            page = {"url": f"https://a/{i}", "_content": content, "headers": Hostile()}
            store.execute("insert into responses values (?, ?, 0)", (i, pickle.dumps(page)))
    store.close()
    assert list(schema_coverage.read(path)) == [("https://a/0", POINT)]
    assert not ran.exists()


def test_each_outcome_is_counted(tmp_path, capsys):
    """Schemas that are built, checked late in part, and refused; every document is valid."""
    schemas = {
        "a": POINT,
        "b": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True},
        "c": {"type": "object", "properties": {"a": {"$ref": "https://nowhere/x.json"}}},
        "d": {"type": "strin"},
    }
    for name, schema in schemas.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(schema), encoding="utf-8")
    assert schema_coverage.main([str(tmp_path), "--documents", "12"]) == 0
    said = capsys.readouterr().out
    assert [c.strip() for c in said[said.index("┡") :].splitlines()[1].split("│")[1:5]] == list(
        "4212"
    )
    assert "1 checked where a text ends: uniqueItems" in said
    assert "1 refused: a reference leads out of the schema" in said
    assert "1 refused: not a JSON Schema" in said
    assert "INVALID" not in said


def test_a_document_that_is_not_valid_fails_the_command(tmp_path, monkeypatch, capsys):
    """A constraint that checks nothing at the end lets some documents of `not` through."""
    monkeypatch.setattr(ByteJsonSchema, "_may_end", lambda self, node: True)
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"enum": [1, 2, 3], "not": {"const": 2}}), encoding="utf-8")
    assert schema_coverage.main([str(file), "--documents", "30"]) == 1
    assert f"INVALID: {file}: 2" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.slow
def test_documents_of_a_model(tmp_path, capsys):
    """The bundled model writes documents of a schema, which are valid."""
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "array", "maxItems": 1, "items": {"enum": [1, 22]}}))
    assert schema_coverage.main([str(file), "--model", "tiny", "--max-bytes", "8"]) == 0
    assert "│ 4     │ 4 " in capsys.readouterr().out
