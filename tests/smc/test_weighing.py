"""Rows propose and steps weigh: a factor may give a byte another weight than its row said."""

import math

import numpy as np
import pytest
import torch
from genlm.control.potential.base import Potential

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_SYMBOLS, TABLES
from genlm_bytes_smc.smc import BadWeightError, Suffix, frontier, particle_gibbs, smc, smc_repeat
from genlm_bytes_smc.smc.ensembles import lanes_of
from genlm_bytes_smc.smc.factors import compile_rows
from genlm_bytes_smc.smc.lanes import Lanes
from tests.smc.invariance import LEAST, exact_draws, p_value
from tests.smc.worlds import LONGEST, exact_weights, finite, total_variation, toy


class Known(Potential):
    """A potential that knows the weight of a byte only once it has been read.

    Its rows guess: as if every byte weighed `guess[byte]`. Steps tell: a byte at an even place
    weighs `truth[byte]`, one at an odd place twice as much in nats.
    """

    def __init__(self, guess, truth):
        super().__init__(BYTES, tables=TABLES)
        self.guess, self.truth = np.full(N_SYMBOLS, guess[0]), np.zeros(N_SYMBOLS)
        self.guess[[*b"abc", EOS_COLUMN]] = [*guess, 0.0]
        self.truth[list(b"abc")] = truth

    async def prefix(self, context):
        return sum(self.truth[ord(b)] * (1 + k % 2) for k, b in enumerate(context))

    async def complete(self, context):
        return await self.prefix(context)


class KnownLanes(Lanes):
    """`Known` at D texts, which have read `age` bytes."""

    waits = False

    def __init__(self, known, n, age=0):
        self.known, self.n, self.age = known, n, age

    async def rows(self):
        return torch.from_numpy(self.known.guess).expand(self.n, -1)

    async def step(self, symbols):
        weights = self.known.truth[symbols] * (1 + self.age % 2)
        return KnownLanes(self.known, self.n, self.age + 1), weights

    def gather(self, lanes):
        return KnownLanes(self.known, len(lanes), self.age)


@pytest.fixture
def known(monkeypatch):
    async def start(potential):
        if isinstance(potential, Known):
            return KnownLanes(potential, 1)
        return await lanes_of(potential)

    monkeypatch.setattr(frontier, "lanes_of", start)
    return Known([0.9, -0.4, 0.3], [-0.5, 0.8, 0.1])


async def truth_of(llm, known, power=1.0):
    """The exact weight of each text under the model times the factor."""
    return {
        t: w * math.exp(power * await known.complete([bytes([b]) for b in t]))
        for t, w in exact_weights(llm).items()
    }


def agrees(values, truth):
    """Whether the mean of independent estimates is within its error of the truth."""
    return abs(np.mean(values) - truth) < 4.5 * np.std(values, ddof=1) / math.sqrt(len(values))


CASES = {
    "own row": {},
    "another model proposes": {"proposal": finite(toy(seed=5))},
    "a critic": {"critic": toy(seed=7) ** 0.5},
    "roll-outs": {"rollout": 2},
}


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("name", list(CASES))
async def test_particles_have_the_weights_that_steps_tell(known, name, power):
    llm = toy(seed=4)
    weights = await truth_of(llm, known, power)
    if "critic" in CASES[name]:
        judged = exact_weights(toy(seed=7))
        weights = {t: w * judged[t] ** 0.5 for t, w in weights.items()}
    factor = known if power == 1 else known**power
    target = finite(llm) * factor
    runs = await smc_repeat(target, 6, 0.7, LONGEST, seeds=200, at_once=50, **CASES[name])
    total = sum(weights.values())
    assert agrees([math.exp(r.log_ml) for r in runs.results], total)
    for text, truth in weights.items():  # and so has the mass of each text that is not rare
        if truth > 0.05 * total:
            mass = [math.exp(r.log_ml) * r.byte_posterior[text] for r in runs.results]
            assert agrees(mass, truth), text


async def test_weights_of_the_rows_alone_are_noticed(known, monkeypatch):
    llm = toy(seed=4)
    weights = await truth_of(llm, known)

    async def step(self, symbols):
        return KnownLanes(self.known, self.n, self.age + 1), None

    monkeypatch.setattr(KnownLanes, "step", step)
    runs = await smc_repeat(finite(llm) * known, 6, 0.7, LONGEST, seeds=200, at_once=50)
    assert not agrees(np.exp(runs.log_mls), sum(weights.values()))


async def test_moves_and_ancestor_sampling_weigh_by_steps_too(known):
    llm = toy(seed=1)
    weights = await truth_of(llm, known)
    starts = exact_draws(weights, 1000, seed=1)
    chains = await particle_gibbs(
        finite(llm) * known, 4, 2, 1.0, LONGEST, start=starts, chains=1000, seed=5
    )
    assert chains.changed.mean() > 0.05
    assert p_value([chain[-1] for chain in chains.chains], weights) > LEAST
    moves = {"rejuvenate": Suffix(None, sweeps=2)}
    one = await smc(finite(llm) * known, 4000, 1.0, LONGEST, seed=1, **moves)
    assert total_variation(one.byte_posterior, weights) < 0.05


async def test_a_step_may_kill_and_must_not_give_nan(known):
    target = finite(toy(seed=4), [b"ab", b"ba", b"aa"]) * known
    known.truth[ord("b")] = -np.inf
    result = await smc(target, 300, 0.0, LONGEST, seed=1)
    assert set(result.byte_posterior) == {b"aa"}
    assert any(k for name, k in result.deaths.items() if "Known" in name)
    known.truth[ord("b")] = np.nan
    with pytest.raises(BadWeightError, match="Known gave nan to the byte b'b' that it has read"):
        await smc(target, 30, 0.5, LONGEST, seed=1)


def test_the_power_of_each_leaf_in_a_tree():
    one, other, third = (Known([0, 0, 0], [0, 0, 0]) for _ in range(3))
    leaves = []
    tree = compile_rows(((one * other**0.5) * one).normalize() ** 2 * third, leaves)
    assert leaves == [one, other, third]
    assert tree.exponents(3).tolist() == [4.0, 1.0, 1.0]
