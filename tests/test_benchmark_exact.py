"""What `exact_sample` is compared with: each baseline against enumeration on a toy model."""

from collections import Counter

import numpy as np
import pytest

from benchmarks import auto, exact
from benchmarks.baselines import ASAp, Chain, Rows, constrained, drive, enumerated, rejected
from benchmarks.exact import chi_squared
from genlm_bytes_smc import load_model
from genlm_bytes_smc.constraints import FiniteSet
from tests.smc.test_exact import TEXTS, toy, truth


async def world():
    llm = toy(sharpness=0.8)
    rows = Rows(llm * FiniteSet(TEXTS))
    law = truth(llm, TEXTS)
    return rows, await enumerated(rows, TEXTS), law


def shares(texts, known):
    counts = Counter(texts)
    assert set(counts) <= set(known.texts)
    return np.array([counts[t] for t in known.texts]) / len(texts)


async def test_texts_have_the_enumerated_weights():
    """Their product of rows is what the enumeration of token strings says."""
    _, known, law = await world()
    assert known.texts == TEXTS
    assert np.exp(known.logw) == pytest.approx(law, rel=1e-6)
    assert known.local.sum() == pytest.approx(1)
    assert known.away(known.local) > 0.05


async def test_rejection_accepts_as_often_as_the_marginal_likelihood_says():
    """The share of draws that are kept, and their law, within the noise of 6,000 draws."""
    rows, known, law = await world()
    rng = np.random.default_rng(1)
    drawn = await drive(rows, lambda: rejected(rng), 6000, at_once=50)
    kept = [t for t in drawn if t is not None]
    error = np.sqrt(law.sum() * (1 - law.sum()) / 6000)
    assert abs(len(kept) / 6000 - law.sum()) < 4 * error
    assert chi_squared(kept, known) > 1e-4


async def test_locally_constrained_draws_have_the_law_of_their_rows():
    rows, known, _ = await world()
    rng = np.random.default_rng(1)
    drawn = await drive(rows, lambda: constrained(rng), 3000, at_once=20)
    assert known.away(known.local) > 0.05
    assert 0.5 * np.abs(shares(drawn, known) - known.local).sum() < 0.03
    assert chi_squared(drawn, known) < 1e-4  # and that is not the target's


async def test_asap_converges():
    """Its law, computed, is that of its draws at first; in the end it is the target's."""
    rows, known, law = await world()
    sampler, rng = ASAp(), np.random.default_rng(2)
    assert known.asap(sampler) == pytest.approx(known.local)
    for _ in range(3):
        await drive(rows, lambda: sampler.draw(rng), 1)
    now = ASAp()
    now.mass = sampler.mass
    between = known.asap(sampler)

    def again():
        one = ASAp()
        one.mass = dict(now.mass)
        return one.draw(rng)

    found = shares(await drive(rows, again, 3000, at_once=20), known)
    assert 0.5 * np.abs(found - between).sum() < 0.03
    assert known.away(between) > 0.03
    for _ in range(300):
        await drive(rows, lambda: sampler.draw(rng), 1)
    assert known.away(known.asap(sampler)) < 1e-6
    assert sampler.mass[b""] == pytest.approx(law.sum(), rel=1e-6)


async def test_a_chain_moves_by_the_computed_kernel_and_converges():
    """The kernel keeps the target; ends of chains have the law that it computes."""
    rows, known, _ = await world()
    kernel = known.kernel()
    assert kernel.sum(axis=1) == pytest.approx(1)
    assert known.law @ kernel == pytest.approx(known.law)
    flow = known.law[:, None] * kernel
    assert flow == pytest.approx(flow.T)
    rng = np.random.default_rng(3)
    found = shares(await drive(rows, lambda: Chain(2).draw(rng), 4000, at_once=40), known)
    assert 0.5 * np.abs(found - known.local @ kernel @ kernel).sum() < 0.03
    steps = known.steps(0.01)
    powers = [known.local @ np.linalg.matrix_power(kernel, k) for k in (steps - 1, steps)]
    assert known.away(powers[0]) >= 0.01 > known.away(powers[1])
    ends = await drive(rows, lambda: Chain(steps).draw(rng), 400, at_once=40)
    assert chi_squared(ends, known) > 1e-4


async def test_a_line_of_the_table_on_the_bundled_model():
    """Fewer draws than rejection, and a law that passes; the line has all cells."""
    world = auto.World(
        load_model("tiny"), "Once upon a time there was a ", ["dog.", "cat.", "cow."]
    )
    cells, found = await exact.measure(world, 4, 1)
    assert len(cells) == len(exact.HEADS) - 1
    assert found["exact"] < found["plain"]
    assert found["p"] > 1e-4
    assert "plain on 1" in exact.verdict([found], 4)
