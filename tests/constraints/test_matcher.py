"""Grammars and schemas: exact membership, sound samples, and counted work."""

import json
import pickle
import random
from itertools import product
from types import MappingProxyType

import jsonschema
import pytest
import torch
from genlm.control import BoolCFG

from genlm_bytes_smc import ByteLLM, smc_sync
from genlm_bytes_smc.constraints import (
    ByteGrammar,
    ByteJsonSchema,
    ByteRegex,
    ConstraintError,
    MatcherError,
)
from tests.constraints.oracles import accepted, walk

NESTED = 'start: pair*\npair: "(" pair* ")" | "[" pair* "]"\n'
SUMS = 'start: sum\nsum: term | sum "+" term\nterm: "x" | "(" sum ")"\n'
WORDS = 'start: word (" " word)*\nword: /[a-cé]{2}/ | "b"\n'


def balanced(text):
    stack = []
    for c in text:
        if c in "([":
            stack.append(c)
        elif not stack or stack.pop() != {")": "(", "]": "["}[c]:
            return None  # nothing can follow
    return stack


def test_nesting_against_a_stack():
    constraint = ByteGrammar(NESTED)
    texts = ["".join(t) for k in range(7) for t in product("()[]", repeat=k)]
    state = constraint.states([t.encode() for t in texts])
    stacks = [balanced(t) for t in texts]
    assert (state >= 0).tolist() == [s is not None for s in stacks]
    assert (constraint.log_complete(state) == 0).tolist() == [s == [] for s in stacks]


@pytest.mark.parametrize("grammar", [NESTED, SUMS])
async def test_a_grammar_agrees_with_genlm_control(grammar):
    ours, theirs = ByteGrammar(grammar), BoolCFG.from_lark(grammar)
    letters = "()[]" if grammar == NESTED else "x+()"
    for text in [bytes(t) for k in range(5) for t in product(letters.encode(), repeat=k)]:
        assert await ours.prefix(text) == await theirs.prefix(list(text)), text
        assert await ours.complete(text) == await theirs.complete(list(text)), text


def test_terminals_are_whole_unicode():
    grammar, automaton = ByteGrammar(WORDS), ByteRegex(r"([a-cé]{2}|b)( ([a-cé]{2}|b))*")
    rng = random.Random(0)
    texts = {"".join(rng.choices("abcé d", k=rng.randrange(7))).encode() for _ in range(400)}
    texts |= {t for seed in range(30) if (t := walk(automaton, random.Random(seed)))}
    for text in sorted(texts):
        for k in range(len(text) + 1):
            live = (grammar.states([text[:k]])[0] >= 0) == (automaton.states([text[:k]])[0] >= 0)
            assert live, text[:k]
        assert accepted(grammar, text) == accepted(automaton, text), text


def test_another_start():
    grammar = ByteGrammar('sum: term ("+" term)*\nterm: /[0-9]/\n', start="sum")
    assert accepted(grammar, b"1+2")
    assert not accepted(grammar, b"1+")
    with pytest.raises(ConstraintError, match="has a rule named start"):
        ByteGrammar(SUMS, start="term")
    with pytest.raises(ConstraintError, match=r"name of a rule \(lower case\), got 'A B'"):
        ByteGrammar(SUMS, start="A B")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('start: "a', "lexer error"),
        ("start: nothing", 'unknown name: "nothing"'),
        ('other: "a"', "no start rule"),
        ("start: /(?=a)b/", "look-around"),
        (b"start: x", "a grammar is a str .* got bytes"),
    ],
)
def test_a_grammar_that_cannot_be_is_refused_with_its_reason(grammar, message):
    with pytest.raises(ConstraintError, match=message):
        ByteGrammar(grammar)


@pytest.mark.parametrize("rule", ["start:", "root ::="])
def test_the_longest_string_that_may_stand_at_a_place_is_taken(rule):
    """llguidance reads strings by a lexer (documented)."""
    parted = ByteGrammar(f'{rule} "a" "b" "c" | "ab" "d"\n')
    assert not accepted(parted, b"abc")
    assert accepted(parted, b"abd")
    joined = ByteGrammar(f'{rule} "ab" ("c" | "d")\n')
    assert accepted(joined, b"abc")
    assert accepted(joined, b"abd")


def test_a_rule_that_derives_nothing_is_not_seen():
    """llguidance does not look for it (documented): it gives up, or goes on for ever."""
    forced = ByteGrammar('start: "a" x | "b"\nx: "c" x\n')
    with pytest.raises(MatcherError, match="llguidance gave up"):
        forced.block(forced.states([b"ac"]))
    free = ByteGrammar('start: "a" x | "b"\nx: /[cd]/ x\n')
    row = free.block(free.states([b"acdcd"]))[0]
    assert (row > float("-inf")).nonzero().flatten().tolist() == [ord("c"), ord("d")]


SCHEMAS = [
    {"type": "integer", "minimum": -3, "maximum": 120},
    {"type": "number"},
    {"type": "string", "minLength": 1, "maxLength": 4},
    {"type": "string", "pattern": "^[a-d]{2,3}é?$"},
    {"type": "string", "format": "date"},
    {"enum": ["a", 1, None, {"b": [2]}]},
    {"const": "日本"},
    {"type": ["boolean", "null"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "null"}, {"const": 5}], "items": False},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
        "required": ["name"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/tree"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {
            "tree": {
                "anyOf": [
                    {"type": "null"},
                    {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                ]
            }
        },
    },
    {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 13}]},
    {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "null"}},
     "additionalProperties": False, "maxProperties": 2},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:50])
@pytest.mark.parametrize("whitespace", ["none", "any", "python"])
def test_what_is_admitted_is_valid_and_can_be_finished(schema, whitespace):
    constraint = ByteJsonSchema(schema, whitespace)
    rng = random.Random(str(schema))
    done = 0
    for _ in range(15):
        text = walk(constraint, rng, longest=20)  # fails where a prefix cannot be completed
        if text is not None:
            value = json.loads(text)
            jsonschema.validate(value, schema)
            done += 1
            if whitespace == "none" and not any(c in text for c in b'"'):
                assert not any(c in text for c in b" \n\t")
    assert done


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (SCHEMAS[0], [0, -3, 120], [121, -4, 1.5, "1", None]),
        (SCHEMAS[2], ["a", "é日", "\U0001f600"], ["", "abcde", 1]),
        (SCHEMAS[3], ["ab", "abcé"], ["a", "abe", "abcd"]),
        (SCHEMAS[5], ["a", 1, None, {"b": [2]}], ["b", 2, {"b": []}]),
        (SCHEMAS[8], [[True], [True, False, True]], [[], [1], [True] * 4]),
        (SCHEMAS[10], [{"name": "Ann"}, {"name": "", "age": 3}], [{}, {"age": 3}, {"name": 1}]),
        (SCHEMAS[11], [{"a": None}, {"a": [[], [None, []]]}], [{"a": 1}, {"a": [None] * 3}]),
    ],
)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_values_against_jsonschema(schema, valid, invalid, ensure_ascii):
    constraint = ByteJsonSchema(schema, "python")
    for value, right in [(v, True) for v in valid] + [(v, False) for v in invalid]:
        assert jsonschema.validators.validator_for(schema)(schema).is_valid(value) == right
        text = json.dumps(value, ensure_ascii=ensure_ascii).encode()
        if b"\\u" not in text:  # escapes are left out by llguidance, see below
            assert accepted(constraint, text) == right, text


def test_the_end_of_a_text_is_checked_again():
    """llguidance 1.9.1 lets the first schema end at 0, which breaks it."""
    constraint = ByteJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 5})
    assert not accepted(constraint, b"0")
    assert accepted(constraint, b"0.5")
    assert accepted(constraint, b"5")
    deep = ByteJsonSchema({"type": "array", "items": {"$ref": "#"}})
    assert accepted(deep, b"[" * 3000 + b"]" * 3000)


def test_whitespace():
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    forms = {"none": b"[1,2]", "python": b"[1, 2]", "any": b"[1 ,\n\t2 ]", r"[ ]{0,2}": b"[ 1,  2]"}
    for whitespace, text in forms.items():
        constraint = ByteJsonSchema(schema, whitespace)
        for other in forms.values():
            expected = other == text or (whitespace == "any") or (
                other == b"[1,2]" and whitespace != "python") or (
                other == b"[1, 2]" and whitespace.startswith("[ ]"))  # fmt: skip
            assert accepted(constraint, other) == expected, (whitespace, other)


def test_the_order_of_properties_is_the_schemas():
    schema = {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"]}
    constraint = ByteJsonSchema(schema)
    assert accepted(constraint, b'{"a":1,"b":2}')
    assert accepted(constraint, b'{"a":1,"b":2,"c":[]}')
    assert not accepted(constraint, b'{"b":2,"a":1}')


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, r"not a JSON Schema: at \$.type"),
        ({"properties": {"a": {"minimum": "1"}}}, r"at \$.properties.a.minimum, '1' is not of"),
        ({"$id": "a", "$ref": "a", "type": ["array"]}, "llguidance refuses"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "Unsatisfiable schema"),
        ("{", "JSON data or JSON text: Expecting property name"),
        ({"a": object()}, "JSON data or JSON text: object is no JSON data"),
        ([1], r"an object or a bool, got \[1\]"),
        (False, "schema false accepts nothing"),
    ],
)
def test_a_schema_that_cannot_be_is_refused_with_its_reason(schema, message):
    with pytest.raises(ConstraintError, match=message):
        ByteJsonSchema(schema)


DRAFT_7 = "http://json-schema.org/draft-07/schema#"
LEFT_TO_THE_END = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems", [[1, 2]], [[1, 1]]),
    ({"not": {"type": "string"}, "maximum": 5}, "not", [1, None], ["a", 6]),
    ({"type": "string", "pattern": "^(?!a)"}, "pattern", ["b", ""], ["ab"]),
    (
        {"oneOf": [{"type": "number", "minimum": 2}, {"type": "integer"}]},
        "oneOf",
        [1, 2.5],
        [2, 1.5],
    ),
    (
        {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}},
        "if, then",
        [{"a": 1, "b": 2}, {"a": 2}],
        [{"a": 1}],
    ),
    (
        {
            "type": "object",
            "patternProperties": {"^(?!x)": {"type": "integer"}},
            "additionalProperties": False,
        },
        "patternProperties, additionalProperties",
        [{"a": 1}, {}],
        [{"x": 1}, {"a": "b"}],
    ),
    (
        {
            "type": "object",
            "patternProperties": {"^a": {"type": "integer"}, "b$": {"minimum": 3}},
        },
        "patternProperties",
        [{"ab": 3, "a": 1}],
        [{"ab": 1}, {"a": "c"}],
    ),
    ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "min", [{"b": 1}], [{}]),
]


@pytest.mark.parametrize(("schema", "said", "inside", "outside"), LEFT_TO_THE_END)
def test_keywords_that_llguidance_does_not_know_are_checked_at_the_end(
    schema, said, inside, outside
):
    """A warning names them, and texts that break them come to no end; a copy does the same."""
    with pytest.warns(UserWarning, match=f"checked only where a text ends.*{said}"):
        constraint = ByteJsonSchema(schema, "none")
    for some in (constraint, pickle.loads(pickle.dumps(constraint))):
        for value in inside:
            assert accepted(some, json.dumps(value, separators=(",", ":")).encode()), value
        for value in outside:
            assert not accepted(some, json.dumps(value, separators=(",", ":")).encode()), value


def test_what_stands_beside_a_reference_is_no_hindrance():
    """A note beside a circular reference, and in draft 7 any keyword, is nothing to llguidance."""
    node = {
        "type": "object",
        "properties": {"next": {"$ref": "#/definitions/node", "description": "the next one"}},
        "additionalProperties": False,
    }
    for draft in (DRAFT_7, "https://json-schema.org/draft/2020-12/schema"):
        schema = {"$schema": draft, "$ref": "#/definitions/node", "definitions": {"node": node}}
        constraint = ByteJsonSchema(schema, "none")
        assert accepted(constraint, b'{"next":{"next":{}}}')
        assert not accepted(constraint, b'{"next":1}')


@pytest.mark.parametrize(
    "draft",
    [
        "https://json-schema.org/draft-07/schema",
        "http://json-schema.org/draft/2019-09/schema#",
        "http://json-schema.org/schema#",
    ],
)
def test_a_draft_by_another_address(draft):
    """`https` or `http`, with `#` or without; the same draft may be named in a part."""
    schema = {"$schema": draft, "type": "array", "items": {"$schema": draft, "type": "integer"}}
    constraint = ByteJsonSchema(schema, "none")
    assert accepted(constraint, b"[1,2]")
    assert not accepted(constraint, b'["a"]')


def test_names_in_dependencies_are_no_schemas():
    """Beside a schema in `dependencies`, a list of names is left alone."""
    schema = {"$schema": DRAFT_7, "dependencies": {"a": {"required": ["b"]}, "c": ["d"]}}
    with pytest.warns(UserWarning, match="dependencies"):
        constraint = ByteJsonSchema(schema, "none")
    assert accepted(constraint, b'{"c":1,"d":1}')
    assert not accepted(constraint, b'{"c":1}')


def test_a_schema_may_be_text_or_true():
    assert accepted(ByteJsonSchema('{"type": "null"}'), b"null")
    assert accepted(ByteJsonSchema(True), b'{"a": [1, "b", null]}')


def test_a_schema_may_come_from_a_class_or_in_mappings_that_are_no_dict():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

    class Model:
        """As pydantic's classes do."""

        @classmethod
        def model_json_schema(cls):
            return schema

    frozen = MappingProxyType({**schema, "properties": MappingProxyType(schema["properties"])})
    for form in (schema, json.dumps(schema), json.dumps(schema).encode(), Model, frozen):
        assert ByteJsonSchema(form).schema == schema


def test_lanes_that_read_the_same_share_one_matcher_and_one_mask():
    constraint = ByteJsonSchema({"type": "array", "items": {"type": "integer"}})
    state = constraint.initial(100)
    for byte in b"[12, 3":
        constraint.block(state)
        state = constraint.step(state, torch.full((100,), byte))
    assert constraint.reads == 5  # the last byte was read by nobody yet
    fork = state.clone()
    fork[50:] = constraint.step(fork[50:], torch.full((50,), ord("]")))
    constraint.block(fork)
    assert constraint.reads == 7
    assert constraint.n_texts == 8


def test_a_snapshot_is_not_changed_by_what_its_children_read():
    constraint = ByteJsonSchema({"enum": ["abc", "abd", 12]})
    state = constraint.states([b'"ab'])
    before = constraint.block(state).clone()
    children = constraint.step(state.repeat(2), torch.tensor([ord("c"), ord("d")]))
    rows = constraint.block(children)
    assert torch.equal(constraint.block(state), before)
    assert (rows[:, ord('"')] == 0).all()
    assert torch.equal(rows, constraint.block(constraint.states([b'"abc', b'"abd'])))


def test_a_schema_as_critic_is_asked_of_texts_that_are_terminated():
    """What is checked only where a text ends goes unnoticed without it, as documented."""
    with pytest.warns(UserWarning, match="uniqueItems"):
        schema = ByteJsonSchema(
            {"type": "array", "items": {"enum": [1]}, "uniqueItems": True, "minItems": 1},
            whitespace="none",
        )
    options = {"max_bytes": 5, "terminate_when": lambda text: text.endswith(b"]"), "seed": 0}
    target = ByteLLM("tiny", prompt=b"JSON: ") * schema
    texts = set(smc_sync(target, 64, **options).byte_posterior)
    assert texts == {b"[1]", b"[1,1]"}
    assert set(smc_sync(target, 64, critic=schema, **options).byte_posterior) == {b"[1]"}
