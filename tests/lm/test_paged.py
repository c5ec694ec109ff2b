"""Keys read where they lie: by Triton's interpreter, compiled for GPUs, and on one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from genlm_bytes_smc.fast_path import FastPathWarning
from genlm_bytes_smc.lm.contexts import ContextTree
from genlm_bytes_smc.lm.transformer import TreeTransformer
from genlm_bytes_smc.lm.tree_cache import TreeCache
from genlm_bytes_smc.lm.tree_forward import TreeForward
from tests.lm.families import WRITTEN_OUT, distance, make_model, random_contexts, whole_rows

ROOT = Path(__file__).parents[2]
PAGED = ("gpt2", "llama", "mistral", "qwen2-mixed", "qwen3")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_rows_are_those_of_whole_forwards():
    done = subprocess.run(
        [sys.executable, "-m", "tests.lm.paged_rows", *PAGED],
        capture_output=True, text=True, cwd=ROOT, timeout=900,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(PAGED)
    for family, each in found.items():
        assert each["worst"] < 2e-5, family
        assert each["positions"] > 5, family


KINDS = {"scale": "fp32", "head_stride": "i32", "T": "i32", "plan": "*i32", "inner": "i32"}
KINDS |= dict.fromkeys(("tops", "totals", "sums"), "*fp32")
KINDS |= {"sin_stride": "i32"}
SIZES = {
    "HEADS": 32, "KV": 8, "D": 128, "BD": 128, "BM": 64, "BN": 64, "PARTS": 2,
    "SLIDES": True, "TURNS": True, "HALF": 64, "BP": 4, "BLOCK": 1024,
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability, dtype, tmp_path, monkeypatch):
    """To machine code, by the assembler that Triton brings: no GPU is needed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from genlm_bytes_smc.lm import paged_triton as pt

    for kernel in (pt.keep, pt.shared, pt.own, pt.combine, pt.gated):
        names = kernel.arg_names
        constant = {a for a in names if a in SIZES}
        signature = {a: "constexpr" if a in constant else KINDS.get(a, dtype) for a in names}
        keys = 128 // (4 if dtype == "*fp32" else 2)
        sizes = {
            (i,): keys if a == "BN" else SIZES[a] for i, a in enumerate(names) if a in constant
        }
        options = {"enable_fp_fusion": True}
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(ASTSource(kernel, signature, sizes), target=target, options=options)
        assert made.asm["cubin"], kernel.__name__
        assert made.metadata.shared <= 99 << 10  # what a block may have on a GeForce


def test_paths_are_what_the_tree_says():
    """Common entries and each one's own, against walking up the tree one by one."""
    rng = np.random.default_rng(0)
    for trial in range(30):
        cache = TreeCache(ContextTree(capacity=4))
        tree, known = cache.tree, [[1, 2, 3][: 1 + trial % 3]]
        for _ in range(4):
            contexts = random_contexts(rng, known, 1 + trial % 5)
            asked = np.unique([tree.insert(c) for c in contexts])
            work = cache.work(asked)
            nodes = np.array(work.nodes)
            slot = {int(n): cache.used + i for i, n in enumerate(nodes[: work.fresh])}
            paths = cache.paths(nodes, work.fresh, 10_000)
            starts = paths.length.cumsum() - paths.length
            every = []
            for i, node in enumerate(nodes.tolist()):
                got = [*paths.common, *paths.own[starts[i] :][: paths.length[i]]]
                want, at = [cache.used + i], int(tree.parent[node])
                while at > 0:
                    want.append(slot.get(at, int(cache._slot[at])))
                    at = int(tree.parent[at])
                assert got == want[::-1]
                every.append(want[::-1][:-1])
                assert paths.token[i] == tree.token[node]
                assert paths.depth[i] == tree.depth[node] == len(want)
            shared = [s[0] for s in zip(*every, strict=False) if len(set(s)) == 1]
            assert paths.common.tolist() == shared  # as many as can be
            assert cache.paths(nodes, work.fresh, len(paths.common) + len(paths.own) - 1) is None
            assert (cache._slot[nodes[: work.fresh]] == -1).all()
            cache.append(nodes[: work.fresh])


@pytest.mark.parametrize("family", WRITTEN_OUT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_on_a_gpu(family, dtype, tokenizer):
    """Recorded and replayed forwards give the rows of whole forwards, whatever the buffer does."""
    model = make_model(family).to("cuda", dtype)
    engine = TreeTransformer(model, tokenizer)
    assert engine._forward.paging
    forward, rng = engine._forward, np.random.default_rng(0)
    known, replayed = [[5, 6, 7, 8, 9]], 0
    for step in range(12):
        contexts = random_contexts(rng, known, 4)
        nodes = np.array([engine.tree.insert(c) for c in contexts])
        if step == 8:
            engine.clear_cache()
        if step in (5, 10):  # a larger buffer, with recordings at hand
            forward._buffer.reserve(2 * forward._buffer._capacity, forward.cache.used, 1 << 20)
        rows = engine.rows_sync(nodes)
        replayed += bool(forward._paged._recorded)
        with torch.no_grad():
            whole = engine._plain(nodes)
        apart = 0.5 * (rows.exp() - whole.exp()).abs().sum(dim=1).max()
        assert float(apart) < (1e-4 if dtype == torch.float32 else 0.1)
    assert replayed > 4
    assert forward.paging  # nothing failed on the way


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_rows_of_a_cpu(tokenizer):
    model = make_model("llama")
    contexts = random_contexts(np.random.default_rng(1), [[5, 6, 7, 8, 9]], 60)
    want = whole_rows(model, contexts)
    engine = TreeTransformer(model.to("cuda"), tokenizer)
    nodes = np.array([engine.tree.insert(c) for c in contexts])
    for _ in range(3):
        assert distance(engine.rows_sync(nodes).cpu(), want) < 1e-4


@pytest.mark.parametrize("when", ["made", "asked"])
def test_kernels_that_fail_are_left_out(gpt2, tokenizer, monkeypatch, when):
    """When the engine is made, or later with a size that needs more of the GPU."""
    init = TreeForward.__init__

    def paging(self, *args, **options):
        init(self, *args, **options)
        self.paging = True

    def fails(self, decoder):
        raise RuntimeError("no such instruction")

    engine = None
    if when == "made":
        monkeypatch.setattr(TreeForward, "__init__", paging)
    else:
        engine = TreeTransformer(gpt2, tokenizer)
        engine._forward.paging = True
    monkeypatch.setattr(TreeForward, "_paged_by", fails)
    contexts = [[1, 5, 9], [1, 5, 8]]

    def answer(engine):
        engine = engine or TreeTransformer(gpt2, tokenizer)
        return engine, engine.batch_next_token_logprobs_sync(contexts)

    with pytest.warns(FastPathWarning, match="no such instruction"):
        engine, rows = answer(engine)
    assert not engine._forward.paging
    assert engine.forward == "written out"
    assert distance(rows, whole_rows(gpt2, contexts)) < 1e-5
    assert len(engine._forward.cache) == 4
