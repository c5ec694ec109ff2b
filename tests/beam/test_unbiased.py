"""Unbiased pruning: the mean of exp(logZ) is the exact prefix probability."""

import math

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams, ByteBeamState, ByteLanes
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.pruning_numba import select_unbiased
from tests.inner import called
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

TEXT = b"abcabb"
RUNS = 4000
SETTINGS = [(1, 0.0), (2, 0.0), (5, 0.0), (1, 0.3), (2, 0.3), (5, 0.3), (2, 0.7), (None, 0.5)]


async def estimates(lm, params, text, runs=RUNS) -> np.ndarray:
    """exp(logZ) of independent beams, one a lane."""
    lanes = await ByteLanes.start(byte_model(lm), params, runs, lane_seeds=range(runs))
    for byte in text:
        lanes = await lanes.prune().read(byte)
    return np.exp(lanes.prune().log_z)


def within_four_errors(sample: np.ndarray, truth: float) -> bool:
    return abs(sample.mean() - truth) <= 4 * sample.std(ddof=1) / math.sqrt(len(sample)) + 1e-15


@pytest.mark.parametrize(("K", "threshold"), SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
async def test_mean_is_exact(seed, K, threshold):
    lm = ToyLM(seed=seed, sharpness=1.0)
    params = BeamParams(K, threshold, eos_byte_strings=[EOS_TOKEN], prune="unbiased")
    sample = await estimates(lm, params, TEXT)
    truth = Enumeration(lm, frozenset([EOS_TOKEN])).prefix(TEXT)
    assert within_four_errors(sample, truth), (sample.mean() / truth, len(sample))
    if K == 1:
        assert sample.std() > 0.05 * truth, "a beam of one that never varies proves nothing"


async def test_the_test_can_fail():
    """Top-K at the same width is biased far beyond four standard errors of the other."""
    lm = ToyLM(seed=0, sharpness=1.0)
    truth = Enumeration(lm, frozenset([EOS_TOKEN])).prefix(TEXT)
    params = BeamParams(1, eos_byte_strings=[EOS_TOKEN], heal=False)
    biased = await estimates(lm, params, TEXT, runs=2)
    unbiased = await estimates(
        lm, BeamParams(1, eos_byte_strings=[EOS_TOKEN], prune="unbiased"), TEXT
    )
    error = unbiased.std(ddof=1) / math.sqrt(RUNS)
    assert truth - biased[0] > 4 * error


@pytest.mark.parametrize(("K", "threshold"), [(1, 0.0), (2, 0.4), (5, 0.3)])
async def test_endings_and_next_bytes_are_unbiased_too(K, threshold):
    lm = ToyLM(seed=5, sharpness=1.0)
    eos = frozenset([EOS_TOKEN])
    truth = Enumeration(lm, eos)
    params = BeamParams(K, threshold, eos_byte_strings=list(eos), prune="unbiased")
    lanes = await ByteLanes.start(byte_model(lm), params, RUNS, lane_seeds=range(RUNS))
    for byte in b"abc":
        lanes = await lanes.prune().read(byte)
    lanes = lanes.prune()
    joint = np.exp(lanes.log_z[:, None] + (await lanes.logp_next()).numpy())
    for symbol, exact in [(ord("a"), truth.prefix(b"abca")), (256, truth.ended(b"abc"))]:
        assert within_four_errors(joint[:, symbol], exact)


async def test_pruning_keeps_the_total_and_at_most_k():
    lm = ToyLM(seed=2, sharpness=1.0)
    beam = await ByteBeamState.initial(lm, BeamParams(3, prune="unbiased", seed=5))
    for byte in b"abcab":
        grown = await (beam << byte)
        beam = grown.prune()
        assert len(beam) <= 3
        total = np.logaddexp.reduce([c.logw for c in beam])
        assert total == pytest.approx(grown.logZ, abs=1e-12)
        assert beam.logZ == pytest.approx(grown.logZ, abs=1e-12)


async def test_rows_agree_with_the_next_weight():
    """prefix(x b) - prefix(x) = logw_next(x)[b], draw by draw."""
    lm = ToyLM(seed=2, sharpness=1.0)
    for seed in range(20):
        beam = await ByteBeamState.initial(lm, BeamParams(2, 0.3, prune="unbiased", seed=seed))
        for byte in b"abcab":
            beam = beam.prune()
            row = await beam.logp_next()
            grown = await (beam << byte)
            assert grown.logZ - beam.logZ == pytest.approx(row[byte], abs=1e-12)
            if grown.logZ == -np.inf:
                break
            beam = grown


async def test_expected_rows_a_step_stay_below_one_over_the_threshold():
    lm = ToyLM(seed=6, sharpness=0.3)  # flat rows: many ways to cut a text
    for threshold in (0.2, 0.5):
        params = BeamParams(None, threshold, prune="unbiased")
        model = byte_model(lm)
        runs = 500
        lanes = await ByteLanes.start(model, params, runs, lane_seeds=range(runs))
        for byte in TEXT:
            lanes = lanes.prune()
            extended = await lanes.extended()
            added = (extended.logw > -np.inf).sum() - (lanes.state.logw > -np.inf).sum()
            assert added / runs <= 1 / threshold + 1
            lanes = await lanes.read(byte)


async def test_equal_seeds_and_bytes_give_equal_beams():
    lm = ToyLM(seed=3, sharpness=1.0)

    async def run(seed):
        beam = await ByteBeamState.initial(lm, BeamParams(2, 0.3, prune="unbiased", seed=seed))
        return (await beam.prefill(TEXT)).logZ

    assert await run(1) == await run(1)
    assert len({await run(s) for s in range(8)}) > 1


async def test_healing_is_off():
    assert BeamParams(2, prune="unbiased", heal=True).heal is False


async def test_weights_hundreds_of_nats_apart_do_not_underflow():
    pick, weight, _ = called(select_unbiased)(np.array([[0.0, -800.0, -801.0]]), 2, np.array([0.3]))
    assert pick[0, 0] == 0
    assert weight[0].tolist() == [0.0, pytest.approx(np.logaddexp(-800.0, -801.0))]


async def ratios(read, K, threshold, n=400):
    """Return n estimates of the probability of `TEXT` over the truth, a seed each: float64[n]."""
    lm = ToyLM(seed=3, sharpness=1.0)
    found = []
    for seed in range(n):
        params = BeamParams(K, threshold, prune="unbiased", seed=seed)
        found.append(await read(await ByteBeamState.initial(lm, params)))
    return np.exp(found) / Enumeration(lm).prefix(TEXT)


async def as_known(beam):
    return (await beam.prefill(TEXT)).logZ


async def by_bytes(beam):
    for byte in TEXT:
        beam = await (beam.prune() << byte) if beam.logZ > -math.inf else beam
    return beam.logZ


@pytest.mark.parametrize(("K", "threshold"), [(1, 0.3), (5, 0.3), (None, 0.5)])
async def test_thinning_after_the_byte_has_the_exact_mean_and_less_variance(K, threshold):
    """Known texts: the mean is the truth, within four standard errors."""
    found = await ratios(as_known, K, threshold)
    assert abs(found.mean() - 1) <= 4 * found.std() / len(found) ** 0.5 + 1e-9
    before = await ratios(by_bytes, K, threshold)
    assert found.std() <= 1.05 * before.std()
