"""At equal or fewer language-model rows the estimates of log_ml vary much less."""

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams
from genlm_bytes_smc.constraints import ByteGrammar, ByteJsonSchema, ByteRegex
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc
from tests.smc.worlds import toy
from tests.toys import EOS_TOKEN

PARAMS = BeamParams(K=5, prune_threshold=0.0, eos_byte_strings=[EOS_TOKEN])
MAX_BYTES = 12

# Each begins with a choice that decides what is forced later.
FORKS = [
    ("a(b|c)c{5}|b(a|c)b{4}|cab", 2),
    ("(aa|b)(c[ab]){2}cc|cb*a", 2),
    ("[ab]{3}c{4}|c[ab]a{4}b", 1),
]


def target_of(pattern, model):
    """The toy language model of that seed under a pattern, with an engine of its own."""
    return toy(seed=model, params=PARAMS, sharpness=2.0) * ByteRegex(pattern)


async def repeated(pattern, model, n, runs, ahead=None):
    """log_ml of each run and the rows of all of them; an engine, and so a cache, a run."""
    log_mls, rows = [], 0
    for seed in range(runs):
        target = target_of(pattern, model)
        options = {} if ahead is None else {"proposal": ahead, "twist": ahead}
        result = await smc(target, n, 0.5, MAX_BYTES, seed=seed, progress=False, **options)
        log_mls.append(result.log_ml)
        rows += result.rows
    return np.array(log_mls), rows


@pytest.mark.parametrize(("pattern", "model"), FORKS)
async def test_a_pilot_makes_the_variance_a_fraction(pattern, model):
    target = target_of(pattern, model)
    ahead = await Lookahead.from_pilot(target, 32, MAX_BYTES, rounds=2, seed=1000)
    plain, plain_rows = await repeated(pattern, model, 16, 12)
    better, better_rows = await repeated(pattern, model, 8, 12, ahead)
    assert better_rows <= plain_rows
    assert better.var() * 4 <= plain.var(), (better.std(), plain.std())
    # and of the same quantity: it lies within what the plain runs spread over
    assert abs(np.log(np.exp(plain).mean()) - np.log(np.exp(better).mean())) < 4 * plain.std()


CALLS = r"""
start: "return " call
call: NAME "(" (value (", " value)*)? ")"
value: call | NAME | NUMBER | "[" (value (", " value)*)? "]"
NAME: /[a-z_]{1,12}/
NUMBER: /[0-9]{1,3}/
"""
POINT = {
    "type": "object",
    "required": ["latitude", "longitude"],
    "properties": {
        "latitude": {"type": "number", "minimum": -90, "maximum": 90},
        "longitude": {"type": "number", "minimum": -180, "maximum": 180},
    },
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("constraint", "prompt", "max_bytes", "n"),
    [
        (ByteGrammar(CALLS), b"    ", 60, 16),
        (ByteJsonSchema(POINT, "python"), b"A point: ", 80, 12),
    ],
    ids=["grammar", "schema"],
)
async def test_so_does_one_for_a_grammar_and_a_schema(tiny, constraint, prompt, max_bytes, n):
    """On the bundled model; the automata are found by exploration."""
    llm = ByteLLM(tiny, BeamParams(K=5, prune_threshold=0.05)).with_prompt(prompt)
    target = llm * constraint
    ahead = await Lookahead.from_pilot(target, 32, max_bytes, rounds=2, seed=10_000)
    log_mls, rows = [], []
    for size, options in ((16, {}), (n, {"proposal": ahead, "twist": ahead})):
        found = []
        before = tiny.counts.rows
        for seed in range(6):
            llm.clear_cache()
            llm.model.store.clear()
            result = await smc(target, size, 0.5, max_bytes, seed=seed, progress=False, **options)
            found.append(result.log_ml)
        log_mls.append(np.array(found))
        rows.append(tiny.counts.rows - before)
    assert rows[1] <= rows[0]
    assert log_mls[1].var() * 4 <= log_mls[0].var(), [v.std() for v in log_mls]
