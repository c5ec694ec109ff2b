"""Models and constraints on devices: the same numbers, few waits, and nothing mixes devices."""

import itertools
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from genlm_bytes_smc import BeamParams, ByteLanes, byte_model
from genlm_bytes_smc.beam.single import lanes_for
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.potential.power_mean import mixture
from genlm_bytes_smc.smc import smc_steps
from tests.devices import FAR, Far, FarDevice
from tests.smc.worlds import FREE
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class FarToy(RowEngine):
    """A toy model as an engine whose rows are on a given device."""

    def __init__(self, device, toy=None):
        toy = toy or ToyLM(seed=2, sharpness=1.0)
        super().__init__(
            toy.tokenizer, device=torch.device(device), width=len(toy.byte_vocab), window=None,
            start=(toy.tokenizer.bos_token_id,), byte_vocab=toy.byte_vocab,
        )  # fmt: skip
        self.toy = toy

    def evaluate(self, nodes):
        rows = torch.stack([self.toy.row(self.tree.tokens(n)) for n in nodes.tolist()])
        self.counts.rows += len(rows)
        self.counts.forwards += 1
        if self.device.type == "mps":  # there is none here
            return rows
        return Far(rows) if self.device == FAR else rows.to(self.device)


async def run(device, params, waits=None, at=None, target=None, **options):
    """The last state of a run with the model on a device and the constraint `at` one; and what
    each step waited for."""
    llm = ByteLLM(FarToy(device), params)
    target = (target or (lambda llm: llm))(llm) * ByteRegex(FREE, device=at or device)
    counted, states = [], []
    async for state in smc_steps(target, 16, 0.9, 12, seed=1, **options):
        states.append(state)
        if waits is not None:
            counted.append(dict(waits.waits))
            waits.waits.clear()
    return states[-1], counted


PARAMS = {
    "topk": {"K": 3, "prune_threshold": 0.05},
    "unbiased": {"K": 3, "prune_threshold": 0.05, "prune": "unbiased"},
    "deferred": {"K": None, "prune_threshold": 0.05, "prune": "deferred"},
}


def params_of(prune):
    return BeamParams(eos_byte_strings=[EOS_TOKEN], **PARAMS[prune])


def same(far, near, tolerance=1e-9):
    assert far.particles.texts() == near.particles.texts()
    np.testing.assert_array_equal(far.particles.ended, near.particles.ended)
    np.testing.assert_allclose(
        far.particles.log_weights, near.particles.log_weights, atol=tolerance
    )
    resampled = [[i.ancestors is not None for i in s.history] for s in (far, near)]
    assert resampled[0] == resampled[1]
    assert any(resampled[0])


@pytest.mark.parametrize("prune", ["topk", "unbiased"])
async def test_a_particle_step_waits_for_new_rows_and_for_what_was_drawn(prune):
    with FarDevice() as device:
        far, counted = await run(FAR, params_of(prune), device)
    same(far, (await run("cpu", params_of(prune)))[0])
    step = {"devices.fetched": 1, "reading.draw": 1}
    assert len(counted) > 8
    for waits in counted[2:-1]:  # the first step also reads the first rows of the root
        assert waits == step
    assert sum(counted[-1].values()) <= 2  # all end at the length limit: no draw


async def test_with_a_constraint_on_the_host_only_new_rows_are_waited_for():
    with FarDevice() as device:
        far, counted = await run(FAR, params_of("topk"), device, at="cpu")
    same(far, (await run("cpu", params_of("topk")))[0])
    assert all(set(waits) <= {"devices.fetched"} for waits in counted)


@pytest.mark.parametrize("model", ["cpu", FAR], ids=str)
@pytest.mark.parametrize("prune", PARAMS)
async def test_a_model_and_a_constraint_may_be_on_two_devices(prune, model):
    with FarDevice():
        found = [await run(model, params_of(prune), at=at) for at in ("cpu", FAR)]
    for far, _ in found:
        same(far, (await run("cpu", params_of(prune)))[0])


@pytest.mark.parametrize("prune", PARAMS)
async def test_ensembles_of_models_may_be_on_two_devices(prune):
    def both(llm):
        return mixture([llm, ByteLLM(FarToy("cpu", ToyLM(seed=5)), params_of(prune))])

    near, _ = await run("cpu", params_of(prune), target=both)
    with FarDevice():
        far, _ = await run(FAR, params_of(prune), target=both)
    same(far, near)


async def test_what_is_drawn_from_may_be_on_another_device_than_the_target():
    def options():
        return {"proposal": ByteLLM(FarToy("cpu"), params_of("topk"))}

    near, _ = await run("cpu", params_of("topk"), **options())
    with FarDevice():
        far, _ = await run(FAR, params_of("topk"), **options())
    assert far.particles.texts() == near.particles.texts()
    np.testing.assert_allclose(far.particles.log_weights, near.particles.log_weights, atol=1e-9)


@pytest.mark.parametrize("prune", PARAMS)
async def test_rows_are_returned_where_the_model_is(prune):
    with FarDevice():
        lanes = await lanes_for(params_of(prune)).start(byte_model(FarToy(FAR)), params_of(prune))
        there, here = await lanes.logp_next(), await lanes.rows()
        assert there.device == FAR
        assert here.device.type == "cpu"
        assert torch.equal(there.held, here)
        llm = ByteLLM(FarToy(FAR), params_of(prune))
        assert (await llm.batch_logw_next([[b"a"], [b"b"]])).weights.device == FAR
        assert (await llm.logw_next([b"a"])).weights.device == FAR


@pytest.mark.parametrize("prune", PARAMS)
async def test_rows_of_a_model_on_metal_are_returned_on_the_host(prune):
    """It has no float64."""
    llm = ByteLLM(FarToy("mps"), params_of(prune))
    found = await llm.batch_logw_next([[b"a"], [b"b"]])
    assert found.weights.device.type == llm.device.type == llm.alloc_rows(1).device.type == "cpu"
    want = await ByteLLM(FarToy("cpu"), params_of(prune)).batch_logw_next([[b"a"], [b"b"]])
    assert torch.equal(found.weights, want.weights)


@pytest.mark.parametrize("prune", [pytest.param(p, marks=CUDA) for p in PARAMS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
async def test_a_gpu_makes_the_rows_and_particles_of_the_cpu(prune, dtype):
    toy = ToyLM(seed=2, sharpness=1.0, dtype=dtype)
    rows = []
    for device in ("cpu", "cuda"):
        model = byte_model(FarToy(device, toy))
        lanes = await lanes_for(params_of(prune)).start(model, params_of(prune), 2)
        for byte in b"abc":
            lanes = await lanes.step([byte, byte])
        rows.append((await lanes.logp_next()).cpu())
    torch.testing.assert_close(rows[1], rows[0], atol=1e-4, rtol=0)
    near, far = [(await run(at, params_of(prune)))[0] for at in ("cpu", "cuda")]
    same(far, near, 1e-4)


@pytest.mark.parametrize("device", ["cpu", FAR, pytest.param("cuda", marks=CUDA)], ids=str)
async def test_large_vocabularies_are_the_same_from_a_device(device):
    """Rows that are made linear and landed in place, through evictions, beside float64 rows."""
    with FarDevice() if device == FAR else nullcontext():
        await compare_large(device)


async def compare_large(device):
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["".join(t).encode() for n in (1, 2, 3) for t in itertools.product(letters, repeat=n)]
    logs = []
    for dtype, where in ((torch.float64, "cpu"), (torch.float32, device)):
        lm = FarToy(where, ToyLM([*tokens, b"<e>"], seed=3, dtype=dtype))
        model = byte_model(lm, row_bytes=40 * 4 * len(tokens))
        lanes = await ByteLanes.start(model, BeamParams(4, 0.01, heal=False), 3)
        for symbols in ([97, 98, 99], [100, 97, 98], [101, 102, 97], [98, 99, 101]):
            lanes = await lanes.step(symbols)
        logs.append((torch.from_numpy(lanes.log_z), (await lanes.logp_next()).cpu()))
    torch.testing.assert_close(logs[1], logs[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
async def test_unbiased_beams_over_rows_of_a_gpu_are_unbiased(device):
    lm, text, runs = ToyLM(seed=1), b"abcabb", 4000
    truth = Enumeration(lm, len(text)).prefix(text)
    params = BeamParams(2, 0.3, prune="unbiased")
    lanes = await ByteLanes.start(
        byte_model(FarToy(device, lm)), params, runs, lane_seeds=range(runs)
    )
    for byte in text:
        lanes = await lanes.prune().read(byte)
    found = np.exp(lanes.prune().log_z)
    error = found.std() / np.sqrt(runs)
    assert abs(found.mean() - truth) <= 4 * error


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
async def test_a_real_device_says_the_same_of_its_waits():
    await run("cuda", params_of("topk"))  # what is set up once may wait
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            await run("cuda", params_of("topk"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in said if "synchroniz" in str(w.message)]
    assert len(waits) <= 13 * 2 + 40  # thirteen steps; the start may wait too
