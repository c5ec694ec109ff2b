"""Fused kernels: the numbers that torch gives, by an interpreter; and compiled for GPUs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genlm_bytes_smc.beam import model
from genlm_bytes_smc.beam.kernels_torch import TorchKernels
from genlm_bytes_smc.fast_path import FastPathWarning
from tests.beam.test_kernels import (
    bytes_for,
    close,
    host,
    kernel_sets,
    make_world,
    on,
    random_state,
    same_state,
)

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def interpreted(what):
    done = subprocess.run(
        [sys.executable, "-m", "tests.beam.fused", what],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_each_verb_is_what_torch_makes_it():
    verbs = interpreted("verbs")
    assert set(verbs) == {
        "next_block", "advance", "advance_summed", "extensions", "extend", "gather", "select",
        "resample", "reserve", "normaliseTrue", "normaliseFalse",
    }  # fmt: skip


@needs_triton
def test_a_seeded_run_is_the_same():
    assert interpreted("run") == {"topk": True, "unbiased": True}


@needs_triton
def test_a_kernel_that_fails_or_errs_is_left_out():
    advance, block = interpreted("refused")  # each said once
    assert "'advance' on cpu differs from torch by" in advance
    assert "'next_block' on cpu failed (RuntimeError: no such instruction)" in block
    assert "GENLM_BYTES_SMC_FUSED=0" in block


@needs_triton
def test_what_a_step_starts_on_the_device():
    found = interpreted("launches")
    for prune, torch_, fused in (("topk", 248, 71), ("unbiased", 226, 64)):
        before, after = found[f"{prune} torch"], found[f"{prune} fused"]
        assert sum(before.values()) <= torch_
        assert sum(after.values()) <= fused
        assert found[f"{prune} fused waits"] == found[f"{prune} torch waits"]
        beam = [sum(n for at, n in x.items() if at.startswith("kernels.")) for x in (before, after)]
        assert beam[1] * 6 < beam[0]


KINDS = {
    "text": "*i1", "rescue": "*i1", "log_threshold": "i64", "log_share": "i64", "log_rest": "i64",
    "CUT": True, "BLOCK": 128, "WIDTH": 64, "TILE": 16, "CHILDREN": 8, "RANGE": 128,
}  # fmt: skip
FLOATS = (
    "probs", "masses", "logu", "logw", "ranked", "weights", "out_logw", "uniform", "total",
    "block", "row", "proxy",
)  # fmt: skip
INTS = (
    "plan", "slot", "skip", "first_of", "lo", "length", "symbol", "node", "ctx", "order",
    "packed", "lanes", "new", "index", "where", "cut", "byte_of", "out_node",
)  # fmt: skip
KINDS |= dict.fromkeys(FLOATS, "*fp64") | dict.fromkeys(INTS, "*i64")


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability, tmp_path, monkeypatch):
    """To machine code, by the assembler that Triton brings: no GPU is needed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from genlm_bytes_smc.beam.kernels_triton import KERNELS

    assert len(KERNELS) == 12
    for name, kernel in KERNELS.items():
        out = "*i64" if "weights" in kernel.arg_names else "*fp64"  # of states; else numbers
        kinds = {a: KINDS.get(a, out if a == "out" else "i32") for a in kernel.arg_names}
        sizes = {(i,): kinds[a] for i, a in enumerate(kinds) if a.isupper()}
        signature = {a: "constexpr" if a.isupper() else kind for a, kind in kinds.items()}
        target = GPUTarget("cuda", capability, 32)
        options = {"enable_fp_fusion": False}
        made = triton.compile(ASTSource(kernel, signature, sizes), target=target, options=options)
        assert made.asm["cubin"], name


def test_which_kernels_a_device_gets(monkeypatch):
    store = SimpleNamespace(device=torch.device("cuda"))
    made = []
    monkeypatch.setattr(TorchKernels, "__init__", lambda self, store: made.append("torch"))
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "platform", "win32")
    model._kernels(store)  # no Triton where there never was one: nothing to say
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(model, "find_spec", lambda name: object())
    monkeypatch.setenv("GENLM_BYTES_SMC_FUSED", "0")
    model._kernels(store)
    monkeypatch.delenv("GENLM_BYTES_SMC_FUSED")
    monkeypatch.setitem(sys.modules, "genlm_bytes_smc.beam.kernels_fused", None)
    with pytest.warns(FastPathWarning, match="Triton cannot be used"):
        model._kernels(store)
    assert made == ["torch"] * 3


@needs_triton
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_gpu_says_what_torch_and_the_cpu_say(seed, cut):
    from genlm_bytes_smc.beam import kernels_fused

    world = make_world(seed, cut)
    numba, plain = kernel_sets(world, "cuda")
    fused = kernels_fused.FusedKernels(plain.store)
    state = random_state(world, seed, n=64, c=20)
    byte = bytes_for(world, state, seed)
    mine = on(plain.device, state)
    for kernels in (plain, fused):
        same_state(kernels.advance(mine, byte, world.cut), numba.advance(state, byte, world.cut))
        block = kernels.next_block(mine, world.cut)
        close(block, numba.next_block(state, world.cut))
        close(kernels.next_block(mine, world.cut), block)
        same_state(kernels.advance(mine, byte, world.cut), numba.advance(state, byte, world.cut))
        for k in (None, 1, 5):
            for at in (-3.0, -0.1):
                same_state(kernels.select(mine, k, at)[0], numba.select(state, k, at)[0])
            same_state(kernels.resample(mine, k), numba.resample(state, k))
    again = [host(fused.resample(mine, 3)), fused.next_block(mine, world.cut).cpu().numpy()]
    np.testing.assert_array_equal(again[0].logw, host(fused.resample(mine, 3)).logw)
    np.testing.assert_array_equal(again[1], fused.next_block(mine, world.cut).cpu().numpy())
    assert all(kernels_fused._judged.values())
