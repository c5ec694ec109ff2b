"""Fused kernels on a machine without a GPU, by Triton's interpreter: what `test_fused` runs.

    TRITON_INTERPRET=1 python -m tests.beam.fused verbs|run|launches|refused

In a process of its own, because Triton reads the variable when a kernel is defined.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc import BeamParams, byte_model
from genlm_bytes_smc.beam import kernels_fused
from genlm_bytes_smc.beam.kernels_fused import FusedKernels
from genlm_bytes_smc.beam.kernels_torch import TorchKernels
from genlm_bytes_smc.beam.state import BeamState
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc_steps
from tests.beam.test_kernels import NO_CUT, World, bytes_for, host, make_world, on, random_state
from tests.devices import FAR, Far, FarDevice, launched, launches
from tests.smc.test_device import PARAMS, FarToy
from tests.smc.worlds import FREE
from tests.toys import EOS_TOKEN


class Both(FusedKernels):
    """Fused kernels that are compared with torch at every call, to 1e-12."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.verbs: Counter[str] = Counter()

    def _either(self, verb: str, fused: Any, plain: Any) -> Any:
        got, want = fused(), plain()
        apart = kernels_fused._apart(got, want)
        assert apart <= 1e-12, f"{verb}: {apart}"
        self.verbs[verb] += 1
        return got


def prune(kernels: Both, state: BeamState) -> None:
    for k, log_threshold in ((None, np.log(0.05)), (1, -np.inf), (3, np.log(0.9))):
        kernels.select(state, k, log_threshold)
        kernels.resample(state, k)


def every_verb(kernels: Both, state: BeamState, world: World, cut: np.ndarray) -> None:
    byte = bytes_for(world, host(state), 7)
    kernels.advance(state, byte, cut)
    block = kernels.next_block(state, cut)
    kernels.advance(state, byte, cut)  # summed already
    kernels.normalise(block, kernels.log_z(state))
    rescue = np.random.default_rng(0).random((len(block), 256)) < 0.5
    proxy = kernels.next_block(kernels.roots(state), cut)
    kernels.reserve(kernels.normalise(block, None), proxy, rescue, 5e-5)
    prune(kernels, state)


def lanes_of(world: World, n: int, width: int) -> BeamState:
    """Many lanes or wide ones, with equal weights and empty places among them."""
    rng = np.random.default_rng(n)
    logw = rng.choice([-1.0, -2.5, -400.0, -np.inf], size=(n, width), p=[0.2, 0.4, 0.2, 0.2])
    some = logw > -np.inf
    ctx = np.where(some, rng.choice(world.contexts, size=(n, width)), -1)
    key = np.arange(n, dtype=np.uint64)
    return BeamState(ctx, np.zeros_like(ctx), logw, logw.copy(), key)


def verbs() -> dict[str, int]:
    """Each fused verb on random states: duplicates, dead lanes, cuts, slices, no candidates."""
    total: Counter[str] = Counter()
    for seed, cut in ((0, False), (1, True)):
        world = make_world(seed, cut=cut)
        kernels = Both(world.store)
        state = on("cpu", random_state(world, seed, n=6, c=5))
        ext = kernels.extensions(state, world.cut)
        new = np.random.default_rng(seed).choice(world.contexts, size=len(ext.lane))
        grown = kernels.extend(state, ext, new)
        kept, _ = kernels.select(grown, 4, -np.inf)  # not contiguous
        for each in (state, kernels.gather(grown, np.array([3, 1, 1, 0])), kept):
            every_verb(kernels, each, world, world.cut)
        every_verb(kernels, grown, world, NO_CUT)
        total += kernels.verbs
    for n, width in ((1, 1), (20, 2), (1, 300), (1, 1024), (1, 1025)):
        prune(kernels, on("cpu", lanes_of(world, n, width)))
    for shape in ((0, 3), (2, 0), (0, 0), (3, 2)):
        none = np.full(shape, -np.inf)
        ctx = np.full(shape, -1)
        key = np.arange(shape[0], dtype=np.uint64)
        empty = on("cpu", BeamState(ctx, np.zeros_like(ctx), none, none.copy(), key))
        every_verb(kernels, empty, world, world.cut)
    return dict(total)


async def particles(kind: Any, prune: str, device: Any, n: int) -> tuple[Any, list[Counter[Any]]]:
    """A seeded run; and what each step started on the device."""
    params = BeamParams(eos_byte_strings=[EOS_TOKEN], **PARAMS[prune] | {"K": 5})
    engine = FarToy(device)
    model = byte_model(engine)
    model.kernels = kind(model.store)
    target = ByteLLM(engine, params) * ByteRegex(FREE, device=device)
    steps, states = [], []
    async for state in smc_steps(target, n, 0.9, 7, seed=1):
        states = [state]
        steps.append(Counter(launches))
        launches.clear()
    return states[0], steps


def run() -> dict[str, bool]:
    """Whether a seeded run is the same with fused kernels."""
    same = {}
    for prune_ in PARAMS:
        a, b = (
            asyncio.run(particles(kind, prune_, "cpu", 5))[0].particles
            for kind in (TorchKernels, FusedKernels)
        )
        np.testing.assert_allclose(a.log_weights, b.log_weights, rtol=1e-12, atol=1e-12)
        same[prune_] = a.texts() == b.texts() and bool((a.ended == b.ended).all())
    assert set(kernels_fused._judged.values()) == {True}  # torch stood in for none
    return same


def far_launch(kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
    """On the device that is not there: one launch, done by the interpreter on what it holds."""
    tensors = [x for x in args if isinstance(x, torch.Tensor)]
    assert all(isinstance(x, Far) for x in tensors), "a kernel mixes devices"
    launched(f"triton {kernel.fn.__name__}")
    kernel[grid](*(x.held if isinstance(x, Far) else x for x in args), **sizes)


class Trusted(FusedKernels):
    """Without the comparison at first use, whose launches are not the step's."""

    def _either(self, verb: str, fused: Any, plain: Any) -> Any:
        return fused()


def counts() -> dict[str, Any]:
    """What one step starts on the device besides the model, by kernels, pruning and place.

    The same for five particles as for sixty-four, which the interpreter would take minutes for.
    """
    kernels_fused.launch = far_launch  # type: ignore[assignment]
    out: dict[str, Any] = {}
    with FarDevice() as device:
        for prune_ in PARAMS:
            for kind in (TorchKernels, Trusted):
                device.waits.clear()
                _, steps = asyncio.run(particles(kind, prune_, FAR, 5))
                most = max(steps[3:], key=lambda step: step.total())
                places: Counter[str] = Counter()
                for (place, _), n in most.items():
                    places[place] += n
                name = "torch" if kind is TorchKernels else "fused"
                out[f"{prune_} {name}"] = dict(places.most_common())
                out[f"{prune_} {name} waits"] = device.total
    return out


def refused() -> list[str]:
    """What is said where a kernel fails or errs; the answers are torch's."""
    world = make_world(3, cut=True)
    state = on("cpu", random_state(world, 3))
    want = TorchKernels(world.store)

    def broken(kernel: Any, grid: Any, *args: Any, **sizes: Any) -> None:
        if kernel.fn.__name__ == "next_block":
            raise RuntimeError("no such instruction")
        launch(kernel, grid, *args, **sizes)
        if kernel.fn.__name__ == "advance":
            args[-1].add_(1e-6)

    launch = kernels_fused.launch
    kernels_fused.launch = broken  # type: ignore[assignment]
    kernels = FusedKernels(world.store)
    byte = bytes_for(world, host(state), 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        for _ in range(2):
            for a, b in (
                (kernels.advance(state, byte, world.cut), want.advance(state, byte, world.cut)),
                (kernels.select(state, 2, -3.0)[0], want.select(state, 2, -3.0)[0]),
            ):
                assert torch.allclose(a.logw, b.logw, rtol=1e-12)
            block = kernels.next_block(state, world.cut)
            assert torch.equal(block, want.next_block(state, world.cut))
    return [str(w.message) for w in said if "fused kernel" in str(w.message)]


if __name__ == "__main__":
    np.seterr(all="ignore")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    found = {"verbs": verbs, "run": run, "launches": counts, "refused": refused}[sys.argv[1]]()
    print(json.dumps(found))
