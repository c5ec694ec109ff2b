"""Automata that approximate grammars and schemas: equal where they can be, sound where not."""

import json
import random
from itertools import product

import numpy as np
import pytest

from genlm_bytes_smc.constraints import (
    ByteGrammar,
    ByteJsonSchema,
    ByteRegex,
    ConstraintError,
    approximate_automaton,
)
from genlm_bytes_smc.constraints.learning import Hypothesis
from genlm_bytes_smc.constraints.learning_table import MembershipOracle, ObservationTable
from tests.constraints.oracles import accepted, walk

NESTED = 'start: pair*\npair: "(" pair* ")" | "[" pair* "]"\n'
SUMS = 'start: sum\nsum: term | sum "+" term\nterm: "x" | "(" sum ")"\n'

REGULAR = [
    ('start: word (" " word)*\nword: /[a-cé]{2}/ | "b"\n', "([a-cé]{2}|b)( ([a-cé]{2}|b))*"),
    ('start: "a" rest | "b"\nrest: "x" rest | "y"\n', "ax*y|b"),
    ('start: /[ab]{4,7}/ "."\n', r"[ab]{4,7}\."),
    ('start: "no" | "none" | "nothing" | "on"\n', "no|none|nothing|on"),
    ('start: (even even)*\neven: "a" | "b"\n', "([ab]{2})*"),
    ('start: "if " NAME | "return " NAME\nNAME: /[a-z_]+/\n', "(if |return )[a-z_]+"),
    ('start: NUMBER ("," NUMBER)*\nNUMBER: /-?(0|[1-9][0-9]*)/\n',
     "-?(0|[1-9][0-9]*)(,-?(0|[1-9][0-9]*))*"),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "pattern"), REGULAR)
def test_of_a_regular_grammar_it_is_the_minimal_automaton(grammar, pattern):
    """Minimal tables are equal exactly where languages are."""
    found, truth = approximate_automaton(ByteGrammar(grammar)), ByteRegex(pattern)
    assert found.n_states == truth.n_states
    assert np.array_equal(found.table, truth.table)
    assert np.array_equal(found.accept, truth.accept)


@pytest.mark.parametrize(
    ("grammar", "letters", "longest"), [(NESTED, "()[]", 6), (SUMS, "x+()", 6)]
)
def test_of_nesting_it_is_exact_on_short_texts(grammar, letters, longest):
    constraint = ByteGrammar(grammar)
    automaton = approximate_automaton(constraint)
    texts = [bytes(t) for k in range(longest + 1) for t in product(letters.encode(), repeat=k)]
    for ask in (lambda c: c.log_prefix(c.states(texts)), lambda c: c.log_complete(c.states(texts))):
        assert ask(automaton).tolist() == ask(constraint).tolist()


@pytest.mark.parametrize("max_states", [3, 6, 12])
def test_nesting_beyond_the_limit_is_folded(max_states):
    """A text is admitted, or leaves the automaton; none is at a state that cannot end."""
    automaton = approximate_automaton(ByteGrammar(SUMS), max_states=max_states)
    assert automaton.n_states <= max_states
    assert accepted(automaton, b"x")
    deep = b"(" * 30 + b"x" + b")" * 30
    state = automaton.states([deep[:k] for k in range(len(deep) + 1)]).tolist()
    assert accepted(automaton, deep) or -1 in state


STRING = {"type": "string"}
SCHEMAS = [
    {"enum": ["cat", "dog", "dodo", 12, None]},
    {"type": "integer", "minimum": -3, "maximum": 120},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    {
        "type": "object",
        "properties": dict.fromkeys("abc", STRING),
        "required": ["a", "c"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["file", "link"]},
            "names": {"type": "array", "items": STRING},
            "at": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                "required": ["x", "y"],
                "additionalProperties": False,
            },
        },
        "required": ["kind", "names", "at"],
        "additionalProperties": False,
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:40])
@pytest.mark.parametrize("whitespace", ["python", "any"])
def test_of_a_schema_both_admit_each_others_texts(schema, whitespace):
    constraint = ByteJsonSchema(schema, whitespace)
    automaton = approximate_automaton(constraint)
    for one, other in ((constraint, automaton), (automaton, constraint)):
        rng = random.Random(7)
        texts = [t for _ in range(30) if (t := walk(one, rng, longest=60)) is not None]
        assert len(texts) >= 5
        assert all(accepted(other, t) for t in texts), [t for t in texts if not accepted(other, t)]


def test_three_strings_in_a_row_are_three_states():
    """Inside each string the same may follow; what is owed afterwards tells them apart."""
    schema = {
        "type": "object",
        "properties": dict.fromkeys("abc", STRING),
        "required": ["a", "b", "c"],
        "additionalProperties": False,
    }
    automaton = approximate_automaton(ByteJsonSchema(schema, "python"))
    inside = automaton.states(
        [b'{"a": "x', b'{"a": "xy', b'{"a": "", "b": "x', b'{"a": "", "b": "']
    )
    assert inside[0] == inside[1] >= 0
    assert inside[2] == inside[3] >= 0
    assert inside[0] != inside[2]


@pytest.mark.parametrize("limits", [{"max_states": 90}, {"max_calls": 3000}, {"tests": 1}])
def test_limits(limits):
    constraint = ByteJsonSchema(SCHEMAS[6], "python")
    automaton = approximate_automaton(constraint, **limits)
    assert automaton.n_states <= limits.get("max_states", 1000)
    assert automaton.n_states > 1


def test_calls_are_about_as_many_as_allowed():
    oracle = MembershipOracle(ByteGrammar(NESTED).matcher(), 2000)
    table = ObservationTable(oracle, [], 8, 0)
    assert not Hypothesis(table, (), 100_000).complete
    assert 2000 <= oracle.calls < 3000  # a state that was begun is finished


def test_no_text_within_the_limits():
    with pytest.raises(ConstraintError, match="raise max_states or max_calls"):
        approximate_automaton(ByteGrammar('start: "abcdef"\n'), max_states=3)


def test_whole_texts_stand_in_where_nothing_explored_ends():
    constraint = ByteGrammar('start: /[ab]{30}/ | "c" /[ab]{20}/\n')
    automaton = approximate_automaton(constraint, max_states=25, texts=[b"c" + b"a" * 20])
    assert accepted(automaton, b"c" + b"a" * 20)


@pytest.mark.parametrize("texts", [(), ['{"kind": "file", "names": ["a'], [b"\xff", b"{"]])
def test_equal_arguments_give_equal_automata(texts):
    made = [
        approximate_automaton(
            ByteJsonSchema(SCHEMAS[6], "any"), max_states=200, texts=texts, seed=3
        )
        for _ in range(2)
    ]
    assert np.array_equal(made[0].table, made[1].table)
    assert np.array_equal(made[0].accept, made[1].accept)


def test_the_way_of_known_texts_is_explored_first():
    """Up to the limit, a text that is given is followed where others are not."""
    deep = b"(" * 12 + b"x" + b")" * 12
    oracle = MembershipOracle(ByteGrammar(SUMS).matcher(), 100_000)
    table = ObservationTable(oracle, [deep], 24, 0)
    passed = {deep[:k] for k in range(len(deep) + 1)}
    explored = [n.text for n in Hypothesis(table, passed, 12).nodes if n.arcs is not None]
    assert sum(text in passed for text in explored) >= 10
    plain = [n.text for n in Hypothesis(table, (), 12).nodes if n.arcs is not None]
    assert sum(text in passed for text in plain) < 10


def test_a_coarse_automaton_is_better_than_one_that_is_cut_off():
    """Lengths up to 40 in three strings are more than the limit holds: they become loops."""
    string = {"type": "string", "minLength": 2, "maxLength": 40}
    schema = {
        "type": "object",
        "properties": dict.fromkeys("abc", string),
        "required": ["a", "b", "c"],
        "additionalProperties": False,
    }
    automaton = approximate_automaton(ByteJsonSchema(schema, "python"), max_states=150)
    assert automaton.n_states <= 150
    for n in (2, 7, 30):
        assert accepted(automaton, json.dumps(dict.fromkeys("abc", "x" * n)).encode())


def test_the_constraint_is_left_as_it_was():
    constraint = ByteGrammar(SUMS)
    state = constraint.states([b"(x"])
    reads = constraint.reads
    approximate_automaton(constraint)
    assert constraint.reads == reads
    assert constraint.states([b"(x"]).tolist() == state.tolist()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"constraint": ByteRegex("a")}, "ByteGrammar or a ByteJsonSchema, got ByteRegex"),
        ({"max_states": 0}, "max_states must be at least 1, got 0"),
        ({"max_calls": 1.5}, r"max_calls must be an integer, got 1\.5"),
        ({"tests": True}, "tests must be an integer, got True"),
        ({"texts": "x+x"}, "several texts, got one of type str"),
    ],
)
def test_bad_arguments_are_refused(options, error):
    options = {"constraint": ByteGrammar(SUMS), **options}
    with pytest.raises((TypeError, ValueError), match=error):
        approximate_automaton(**options)
