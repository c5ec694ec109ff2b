"""Grammars in GBNF, and formats of JSON Schema that nobody knows."""

import re

import pytest

from genlm_bytes_smc import BeamParams, ByteLLM, smc
from genlm_bytes_smc.constraints import ByteGrammar, ByteJsonSchema, ConstraintError

GREETING = """
# a greeting
root ::= greeting " " name ("!" | "?")*
greeting ::= "hi" | "hello"
name ::= [a-z]+ ("-" [a-z]+)?
"""
LIST = """
value ::= "[" (value ("," value)*)? "]" | number
number ::= [0-9]+
root ::= value
"""


async def accepts(grammar, text):
    return await grammar.complete([bytes([b]) for b in text.encode()]) == 0


@pytest.mark.parametrize(
    ("source", "start", "inside", "outside"),
    [
        (GREETING, "start", ["hi bob", "hello a-b!?"], ["hi", "hi Bob", "hey bob"]),
        (GREETING, "root", ["hi bob"], ["hi"]),
        (GREETING, "name", ["bob", "a-b"], ["hi bob", "-a"]),
        (LIST, "start", ["[]", "[1,[2,3]]", "17"], ["[1,]", "[", ""]),
    ],
)
async def test_gbnf_is_taken_as_it_stands(source, start, inside, outside):
    """Texts inside and outside of each grammar, from each rule."""
    grammar = ByteGrammar(source, start)
    for text in inside:
        assert await accepts(grammar, text), text
    for text in outside:
        assert not await accepts(grammar, text), text


async def test_gbnf_constrains_a_run(tiny):
    llm = ByteLLM(tiny, BeamParams(K=5, prune_threshold=0.01))
    found = await smc(llm * ByteGrammar(GREETING), 8, max_bytes=20, seed=1, progress=False)
    for text in found.byte_posterior:
        assert isinstance(text, bytes) is False or re.fullmatch(rb"(hi|hello) [a-z-]+[!?]*", text)


@pytest.mark.parametrize(
    ("source", "start", "said"),
    [
        ('root ::= "a\n', "start", "does not parse as GBNF.*line"),
        ('item ::= "a"\n', "start", "begins with its rule 'root', got item"),
        ('root ::= "a"\n', "other", "begins with its rule 'other', got root"),
        ('root ::= "a" | b\n', "start", "does not parse as GBNF: Rule 'b' not found"),
    ],
)
def test_errors_of_gbnf(source, start, said):
    with pytest.raises(ConstraintError, match=said):
        ByteGrammar(source, start)


async def test_unknown_formats_are_annotations():
    """They constrain nothing, in parts of the schema too; data of that name is left alone."""
    schema = {
        "type": "object",
        "properties": {
            "site": {"type": "string", "format": "iri"},
            "day": {"type": "string", "format": "date"},
            "kind": {"const": {"format": "iri"}},
        },
        "required": ["site", "day", "kind"],
        "additionalProperties": False,
    }
    with pytest.warns(UserWarning, match="unknown formats constrain nothing: iri"):
        constraint = ByteJsonSchema(schema, "none")
    assert schema["properties"]["site"]["format"] == "iri"
    good = '{"site":"höme","day":"2026-11-27","kind":{"format":"iri"}}'
    assert await accepts(constraint, good)
    assert not await accepts(constraint, good.replace("2026-11-27", "tomorrow"))


@pytest.mark.parametrize("name", ["", "\n", " (2x)"])
def test_a_format_without_a_name_constrains_nothing(name):
    with pytest.warns(UserWarning, match="unknown formats constrain nothing: ''"):
        ByteJsonSchema({"format": name}, "none")
