"""Look-ahead along automata found for grammars and schemas: unbiased, however rough."""

import math

import numpy as np
import pytest

from genlm_bytes_smc import as_engine
from genlm_bytes_smc.constraints import ByteGrammar, ByteJsonSchema, ByteRegex, MaxBytes
from genlm_bytes_smc.lookahead import Lookahead, lookahead
from genlm_bytes_smc.lookahead.future_mass import TableFactor
from genlm_bytes_smc.lookahead.lookahead import automata_of
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc
from genlm_bytes_smc.smc.factors import compile_rows
from tests.smc.worlds import EXACT, LONGEST, TEXTS, estimates, exact_weights, toy
from tests.toys import EOS_TOKEN, ToyLM

RUNS = 150
NESTED = 'start: s\ns: "a" s "b" | "c" | "c" s\n'
LIST = "start: " + " | ".join(f'"{t.decode()}"' for t in TEXTS) + "\n"


def texts_of(constraint, longest, letters=b"abc"):
    """Every text of some letters that a constraint admits, by asking."""
    found, stems = [], [b""]
    for _ in range(longest + 1):
        found += [t for t in stems if constraint.log_complete(constraint.states([t]))[0] == 0]
        more = [t + bytes([b]) for t in stems for b in letters]
        stems = [t for t in more if constraint.log_prefix(constraint.states([t]))[0] == 0]
    return found


async def by_ngram(target, **settings):
    return Lookahead(**settings)


async def by_pilot(target, **settings):
    return await Lookahead.from_pilot(target, 6, LONGEST, rounds=2, order=2, seed=5000, **settings)


@pytest.mark.parametrize("make", [by_ngram, by_pilot])
@pytest.mark.parametrize(
    ("grammar", "settings"),
    [(LIST, {}), (NESTED, {}), (NESTED, {"max_states": 3, "outside": -2.0})],
    ids=["finite", "nested", "folded"],
)
async def test_estimates_are_unbiased(make, grammar, settings):
    llm, constraint = toy(seed=12), ByteGrammar(grammar)
    truth = sum(exact_weights(llm, texts_of(constraint, LONGEST)).values())
    ahead = await make(llm * constraint, **settings)
    found = await estimates(llm * constraint, RUNS, n=3, ess=1.0, proposal=ahead, twist=ahead)
    assert found.agree(truth), (found, truth)


async def test_a_schema_is_unbiased():
    """Lists of zeros and strings under a model that writes little else."""
    tokens = [b'"', b"[", b"]", b",", b"0", b"a", b'["', b'",', b"0,", EOS_TOKEN]
    llm = ByteLLM(as_engine(ToyLM(tokens, seed=4, sharpness=1.0)), EXACT)
    zero, string = {"const": 0}, {"type": "string", "pattern": "^a*$"}
    items = {"anyOf": [zero, string]}
    constraint = ByteJsonSchema({"type": "array", "items": items}, "none")
    texts = texts_of(constraint, 6, b'"[],0a')
    assert b'["aa"]' in texts
    truth = sum(exact_weights(llm, texts).values())
    ahead = Lookahead()
    found = await estimates(llm * constraint, RUNS, n=6, max_bytes=6, proposal=ahead, twist=ahead)
    assert found.agree(truth), (found, truth)
    assert found.error < truth


async def test_with_an_automaton_beside_it():
    llm, constraint, also = toy(seed=9), ByteGrammar(NESTED), ByteRegex("(a|c)+b{0,2}")
    texts = [
        t for t in texts_of(constraint, LONGEST) if also.log_complete(also.states([t]))[0] == 0
    ]
    truth = sum(exact_weights(llm, texts).values())
    target = llm * constraint * also
    ahead = Lookahead()
    found = await estimates(target, RUNS, n=3, proposal=ahead, twist=ahead)
    assert found.agree(truth), (found, truth)
    course = automata_of(target)
    assert course.approximate
    assert course.dfa.states([b"aacbb"])[0] >= 0
    assert course.dfa.states([b"aaacb"])[0] == -1  # it would need three b


async def test_psi_is_above_zero_for_all_that_is_admitted():
    llm, constraint = toy(), ByteGrammar(NESTED)
    target = llm * constraint
    ahead = Lookahead(0, max_states=2, max_bytes=None)
    leaves = []
    compile_rows(target, leaves)
    factor = await ahead.start(target, leaves, LONGEST)
    assert isinstance(factor, TableFactor)
    for text in texts_of(constraint, LONGEST):
        here = factor
        for byte in text:
            here, _ = await here.step(np.array([byte]))
            assert math.isfinite(float(here.value[0])), text


async def test_nothing_is_uncovered():
    llm, constraint = toy(seed=4), ByteGrammar(LIST)
    ahead = Lookahead(constraint=ByteGrammar('start: "c"\n'))
    result = await smc(llm * constraint, 50, 0.5, LONGEST, proposal=ahead, seed=1)
    assert result.uncovered == 0.0


def test_what_is_beyond_the_approximation_is_looked_at_along_the_rest():
    """Forty a's are deeper than three states reach: the expression alone is left."""
    also = ByteRegex("a{40}cb{40}")
    course = automata_of(toy() * ByteGrammar(NESTED) * also, max_states=3)
    assert not course.approximate
    assert course.dfa.n_states == also.n_states


async def test_grammars_and_schemas_may_be_the_constraint_of_a_look_ahead():
    ahead = Lookahead(constraint=ByteJsonSchema({"enum": [1, 22]}))
    course = automata_of(toy(), ahead.constraint)
    assert course.approximate
    assert course.wfsa is None
    assert course.dfa.states([b"22"])[0] >= 0


async def test_the_automaton_of_a_pilot_stays():
    """Its rows are counted by state, so later runs must use the automaton of the pilot."""
    target = toy(seed=12) * ByteGrammar(NESTED)
    ahead = await by_pilot(target, max_states=8)
    assert ahead.constraint.n_states <= 8
    await smc(target, 4, 0.5, LONGEST, proposal=ahead, twist=ahead, progress=False)
    _, _, table = ahead._solved._held[0]
    assert table.dfa.n_states == ahead.constraint.n_states


async def test_an_automaton_is_found_once_for_each_target(monkeypatch):
    calls, real = [], lookahead.automata_of
    monkeypatch.setattr(lookahead, "automata_of", lambda *a: calls.append(a) or real(*a))
    target, ahead = toy() * ByteGrammar(NESTED) * MaxBytes(20), Lookahead()
    for limit in (3, 4, 5):
        await smc(target, 4, 0.5, limit, proposal=ahead, twist=ahead, progress=False)
    assert len(calls) == 1
