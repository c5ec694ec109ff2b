"""Patterns, grammars and schemas made to hurt: each is served, or refused with a reason."""

import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from genlm_bytes_smc.constraints import (
    ByteDFA,
    ByteGrammar,
    ByteJsonSchema,
    BytePredicate,
    ByteRegex,
    ByteWFSA,
    ConstraintError,
    FiniteSet,
    Length,
)
from tests.constraints.oracles import accepted, in_a_process

PREAMBLE = """
import threading
from genlm_bytes_smc.constraints import *
def says(make):
    try:
        return make()
    except ConstraintError as e:
        return str(e)
"""


# -- patterns ----------------------------------------------------------------------------


def test_counts_are_looked_at_before_anything_is_written_out():
    """`regex.compile` takes more than 10 GB for each of these."""
    said = in_a_process(
        PREAMBLE
        + r"""
patterns = ["a{1000000000}", "(a?){1000000000}", "(?:(?:a{1000}){1000}){1000}", "(^|a?){99999999}"]
out = [says(lambda: ByteRegex(p).n_states) for p in patterns]
"""
    )
    assert all("needs more than max_states=50000 states" in s for s in said), said


def test_deep_and_ambiguous_patterns_are_built_in_nearly_linear_time():
    """The first took 56 s of an idle core, the others 24 s to be refused, or were refused."""
    out = in_a_process(
        PREAMBLE
        + r"""
import random
rng = random.Random(0)
words = sorted({"".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(3, 11)))
                for _ in range(20_000)})
of_words = ByteRegex("|".join(rng.sample(words, len(words))))
out = [
    ByteRegex("(a|aa|aaa){1,2000}").n_states,
    ByteRegex("ab" * 10_000).n_states,
    bool((of_words.table == FiniteSet(words).table).all()),
    of_words.log_complete(of_words.states([w.encode() for w in words])).sum().item(),
]
""",
        seconds=60,
    )
    assert out == [6001, 20_001, True, 0.0]


def test_a_pattern_may_take_so_long():
    with pytest.raises(ConstraintError, match=r"takes longer to construct than max_seconds=0\.5"):
        ByteRegex("(a|aa|aaa){1,20000}", max_seconds=0.5)


def test_states_that_no_text_passes_are_not_counted():
    """Overlong spellings of ASCII used to be."""
    assert ByteRegex("ab" * 50, max_states=101).n_states == 101
    assert ByteRegex("[a-é]", max_states=4).n_states == 4
    with pytest.raises(ConstraintError, match="more than max_states=100 states"):
        ByteRegex("ab" * 50, max_states=100)


def test_groups_inside_one_another():
    assert accepted(ByteRegex("(" * 100 + "a" + ")" * 100), b"a")
    with pytest.raises(ConstraintError, match="nests its groups more deeply"):
        ByteRegex("(" * 400 + "a" + ")" * 400)


# -- grammars ----------------------------------------------------------------------------


def test_grammars_and_schemas_that_took_the_process_down():
    """Segmentation faults of llguidance 1.9.1 on a stack of 8 MiB; here it has 1 MiB."""
    out = in_a_process(
        PREAMBLE
        + r"""
def rules(n, right):
    return "start: r0\n" + "".join(f"r{i}: {right(i)}\n" for i in range(n)) + f'r{n}: "b"\n'
def refs(n, inside):
    chain = {f"d{i}": inside({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{n}": {"type": "null"}}}
many = [f"T{i}" for i in range(10_000)]
terminals = "".join(f'{t}: "{t};"\n' for t in many)
cases = [
    (lambda: ByteGrammar(rules(3_000, lambda i: f'"a" r{i + 1}')), b"a" * 3_000 + b"b"),
    (lambda: ByteGrammar(rules(9_000, lambda i: f"r{i + 1}")), b"b"),
    (lambda: ByteGrammar("start: R0\n" + rules(9_000, lambda i: f"r{i + 1}")[10:]
                         .replace("r", "R")),
     b"b"),
    (lambda: ByteGrammar(f"start: T\nT: {' | '.join(many)}\n" + terminals), b"T77;"),
    (lambda: ByteGrammar(f"start: {' '.join(many)}\n" + terminals), None),
    (lambda: ByteJsonSchema(refs(5_000, lambda r: r)), b"null"),
    (lambda: ByteJsonSchema(refs(3_000, lambda r: {"type": "array", "items": r})), None),
]
out = []
def go():
    for make, text in cases:
        made = says(make)
        if isinstance(made, str) or text is None:
            out.append(made if isinstance(made, str) else "built")
        else:
            out.append(made.log_complete(made.states([text])).item())
threading.stack_size(2**20)
thread = threading.Thread(target=go)
thread.start()
thread.join()
"""
    )
    assert out == [0.0, 0.0, 0.0, 0.0, "built", 0.0, "built"]


def test_a_source_may_be_so_long():
    long = "start: " + '"a" ' * 100
    message = r"has 407 characters, more than max_size=400; raise max_size"
    with pytest.raises(ConstraintError, match=message):
        ByteGrammar(long, max_size=400)
    assert accepted(ByteGrammar(long, max_size=407), b"a" * 100)
    with pytest.raises(ConstraintError, match="more than max_size=262,144"):
        ByteGrammar('start: "a"\n' * 30_000)
    with pytest.raises(ConstraintError, match="has 300,014 characters"):
        ByteJsonSchema({"const": "a" * 300_000 + "b"}, max_size=300_010)


@pytest.mark.parametrize(
    "grammar",
    [
        "start: start",
        'start: "a" start',
        'start: a "x"\na: a "y"',
        'start: "ab" T\nT: /a/ & /b/',
    ],
)
def test_a_grammar_that_derives_nothing_is_refused_when_it_is_made(grammar):
    with pytest.raises(ConstraintError, match="the grammar admits no text at all: nothing may"):
        ByteGrammar(grammar)


def test_a_lone_surrogate_is_no_text():
    with pytest.raises(ConstraintError, match="got a lone surrogate at position 8"):
        ByteGrammar('start: "\ud800"')
    for schema in ({"const": "\ud800"}, '{"const": "\ud800"}', '{"const": "\\ud800"}'):
        with pytest.raises(ConstraintError, match="llguidance refuses this schema"):
            ByteJsonSchema(schema)
    with pytest.raises(ConstraintError, match="language is empty"):
        ByteRegex("\ud800")


def test_a_second_thread_is_refused_while_one_is_answered():
    """It used to get `Already borrowed` from llguidance, or the tree of another."""
    constraint = BytePredicate(lambda text: (asked.set(), go_on.wait(60)) and True)
    asked, go_on, seen = threading.Event(), threading.Event(), []
    first = threading.Thread(target=lambda: seen.append(constraint.block(constraint.initial(1))))
    first.start()
    assert asked.wait(60)
    try:
        for call in (
            lambda: constraint.block(constraint.initial(1)),
            lambda: constraint.step(constraint.initial(1), torch.tensor([97])),
            lambda: constraint.states([b"a"]),
            lambda: constraint.keep([]),
        ):
            with pytest.raises(RuntimeError, match=r"one thread at a time.*`spawn` makes one"):
                call()
    finally:
        go_on.set()
        first.join()
    assert len(seen) == 1
    assert constraint.spawn().block(torch.zeros(1, dtype=torch.int64)).shape == (1, 257)


# -- schemas -----------------------------------------------------------------------------


class _Watched(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"type": "string"}')

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A server on this machine that notes what it is asked for."""
    with HTTPServer(("127.0.0.1", 0), _Watched) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("keyword", ["disallow", "extends", "$ref", "allOf", "unknown", "$schema"])
def test_a_schema_makes_nobody_fetch(server, keyword, tmp_path):
    (tmp_path / "s.json").write_text('{"type": "string"}')
    for base in (f"http://127.0.0.1:{server.server_port}/s.json", (tmp_path / "s.json").as_uri()):
        ref = {"$ref": base}
        part = {"$ref": base, "$schema": base, "allOf": [ref], "unknown": ref,
                "disallow": [ref], "extends": ref}[keyword]  # fmt: skip
        refused = []
        for draft in (3, 4, 6, 7, None):
            schema = {"$schema": f"http://json-schema.org/draft-0{draft}/schema#"} if draft else {}
            schema = {"type": "string", **schema, keyword: part}
            try:
                constraint = ByteJsonSchema(schema)
            except ConstraintError:
                refused.append(draft)
                continue
            constraint.block(constraint.states([b'"a"']))
        assert server.asked == []
        assert 3 in refused


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "must name one of the drafts"),
        ({"$schema": "http://nowhere/x"}, "must name one of the drafts .* got 'http://nowhere/x'"),
        ({"$schema": 5}, "must name one of the drafts .* got 5"),
        ({"$ref": "#/nope"}, "the reference '#/nope' leads to no place in this schema"),
        ({"items": {"$ref": "file:///etc/passwd"}}, "nothing is fetched"),
        ({"properties": {"const": {"$ref": "other.json"}}}, "'other.json' leads to no place"),
        (
            {"items": {"$schema": "http://json-schema.org/draft-07/schema#"}},
            "another draft at the root only",
        ),
    ],
)
def test_a_draft_or_a_reference_that_is_not_known_is_refused(schema, message):
    with pytest.raises(ConstraintError, match=message):
        ByteJsonSchema(schema)


def test_references_within_a_schema_are_followed():
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": {"$ref": "#/definitions/$ref"},
        "definitions": {"$ref": {"enum": [None, {"$ref": "data, not a reference"}]}},
    }
    constraint = ByteJsonSchema(schema, "none")
    assert accepted(constraint, b'[null,{"$ref":"data, not a reference"}]')
    assert not accepted(constraint, b"[1]")


def test_references_that_double_are_followed_once(monkeypatch):
    """Each level used to double the time: what 16 lead to was looked at 65,536 times an end."""
    looked = []
    minimum = Draft202012Validator.VALIDATORS["exclusiveMinimum"]
    monkeypatch.setitem(
        Draft202012Validator.VALIDATORS,
        "exclusiveMinimum",
        lambda *args: looked.append(args) or minimum(*args),
    )
    levels = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(9)}
    levels["d9"] = {"type": "number", "exclusiveMinimum": 0}
    constraint = ByteJsonSchema({"$ref": "#/$defs/d0", "$defs": levels})
    ends = constraint.log_complete(constraint.states([b"1", b"0", b"0.5", b"2"]))
    assert ends.exp().tolist() == [1.0, 0.0, 1.0, 1.0]
    assert len(looked) <= 2 * 4


def test_schemas_inside_one_another():
    def arrays(n):
        schema = {"type": "null"}
        for _ in range(n):
            schema = {"type": "array", "items": schema}
        return schema

    assert accepted(ByteJsonSchema(arrays(30)), b"[" * 30 + b"]" * 30)
    for deep in (arrays(150), arrays(3000), "[" * 200_000, '{"a":' * 40_000):
        with pytest.raises(ConstraintError, match=r"nests more deeply|an object or a bool"):
            ByteJsonSchema(deep)


NAMES = st.sampled_from(["a", "b", "$ref", "const"])
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=True) | st.text(max_size=3)
    | st.sampled_from(["#", "#/$defs/a", "#/a", "http://json-schema.org/draft-03/schema#", "null",
                       "http://127.0.0.1:1/", "\ud800", "string", "(", "a{99999}"])
)  # fmt: skip
KEYWORDS = st.sampled_from(
    ["$schema", "$id", "$ref", "$defs", "definitions", "type", "enum", "const", "items", "allOf",
     "anyOf", "oneOf", "properties", "required", "minimum", "maxLength", "minItems", "pattern",
     "additionalProperties", "patternProperties", "format", "multipleOf", "$anchor"]
)  # fmt: skip
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYWORDS, inner, max_size=4)
        | st.dictionaries(NAMES, inner, max_size=2)
    ),
    max_leaves=12,
)


@pytest.mark.filterwarnings("ignore:unknown formats", "ignore:checked only where a text ends")
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYWORDS, SCHEMAS, max_size=5))
def test_a_mutated_schema_is_served_or_refused(schema):
    try:
        constraint = ByteJsonSchema(schema, max_states=50)
    except ConstraintError:
        return
    row = constraint.block(constraint.initial(1))[0]
    for byte in (row[:256] == 0).nonzero().flatten().tolist()[:3]:
        constraint.block(constraint.step(constraint.initial(1), torch.tensor([byte])))


# -- limits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: ByteRegex("a", **o),
        lambda **o: ByteDFA(np.full((1, 256), -1), np.array([True]), **o),
        lambda **o: FiniteSet(["a"], **o),
        lambda **o: Length(1, **o),
        lambda **o: ByteGrammar('start: "a"', **o),
        lambda **o: ByteJsonSchema({"type": "null"}, **o),
        lambda **o: BytePredicate(bool, **o),
        lambda **o: ByteWFSA([0.0], [], [0.0], **o),
    ],
)
@pytest.mark.parametrize("limit", [None, 1.5, True])
def test_a_limit_is_an_int(make, limit):
    with pytest.raises(TypeError, match=f"max_states must be an integer, got {limit!r}"):
        make(max_states=limit)
    with pytest.raises(ValueError, match="max_states must be at least 1, got 0"):
        make(max_states=0)


def test_flags_are_flags():
    with pytest.raises(TypeError, match="flags must be flags of the regex module, got None"):
        ByteRegex("a", None)
    with pytest.raises(ConstraintError, match="the flags ASCII and UNICODE exclude one another"):
        ByteRegex("(?u)a", 128)
    with pytest.raises(ConstraintError, match="the flags VERSION0 and VERSION1 exclude"):
        ByteRegex("ab", regex.V0 | regex.V1)
    with pytest.raises(ConstraintError, match="unbalanced parenthesis at position 1"):
        ByteRegex("a)")
    with pytest.raises(TypeError, match="max_size must be an integer, got None"):
        ByteGrammar('start: "a"', max_size=None)


def test_json_of_a_schema_is_what_is_counted():
    schema = {"const": "é"}
    assert ByteJsonSchema(schema, max_size=len(json.dumps(schema))).schema == schema


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "number", "multipleOf": 0.5}, b"1" + b"0" * 400),
        ({"type": "integer"}, b"1" * 5000),
        ({"not": {"type": "number", "multipleOf": 0.1}}, b"1e999"),
    ],
)
def test_a_number_that_python_cannot_check_is_no_crash(schema, text):
    with warnings.catch_warnings(action="ignore"):
        constraint = ByteJsonSchema(schema)
    row = constraint.block(constraint.states([text]))[0]
    assert row[256] == float("-inf")
    assert (row[:256] > float("-inf")).any()
