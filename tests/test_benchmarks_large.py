"""The GPU benchmark's code on the CPU at minuscule sizes, and a short endurance run."""

import gc
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers as tf

from benchmarks import endurance, gpu
from benchmarks.gpu_models import FULL, QUICK, Worlds
from genlm_bytes_smc.beam.kernels_torch import TorchKernels

CPU = torch.device("cpu")
SIZES = gpu.Sizes(
    beams=(2,), particles=(6,), prompts=(30,), text=5, steps=4, seconds=60.0, before=20
)


async def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path, capsys):
    bench = gpu.Bench(CPU, SIZES)
    records = await gpu.measure(bench, QUICK[1:], note=lambda line: None)
    assert [r.kind for r in records] == ["agreement", "one text", "particles", "prefill"]
    agreement, text, particles, prefill = records
    assert agreement.rate < 1e-6
    assert all(r.rate > 0 for r in records[1:])
    assert 1 <= text.waits <= 3.5  # two a byte, and one more where healing may be called for
    assert 1 <= particles.waits <= 4
    assert 0 < particles.outside < 1
    assert 50 < particles.launches < 300
    assert 0 < text.forwards <= text.rows
    assert prefill.forwards < 1
    about = dict.fromkeys(("device", "date"), "x")
    gpu.show(records, about)
    assert "Llama minute" in capsys.readouterr().out
    gpu.write(records, about, tmp_path, quick=True)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert lines[0]["quick"] is True
    assert len(lines) == 5
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


async def test_devices_that_disagree_are_found_out(monkeypatch):
    bench = gpu.Bench(CPU, SIZES)
    advance = TorchKernels.advance

    def off(self, state, byte, cut):
        out = advance(self, state, byte, cut)
        return out._replace(logw=out.logw - 0.02)

    monkeypatch.setattr(TorchKernels, "advance", off)
    with pytest.raises(AssertionError, match="cpu and the CPU differ by"):
        await bench.agree(QUICK[1])


def test_what_cannot_be_measured(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, said in (
        ([], "no CUDA device here"),
        (["--device", "cpu", "--models", "abacus"], "no shape's name contains 'abacus'"),
    ):
        with pytest.raises(SystemExit):
            gpu.main(argv)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("shape", FULL, ids=lambda s: s.name)
def test_shapes_are_those_of_the_models(shape):
    billions = {"GPT-2 medium": 0.355, "Llama-3.2-1B": 1.236, "Llama-3.1-8B": 7.505}
    assert shape.weights / 1e9 == pytest.approx(billions[shape.name], rel=0.02)
    config = shape.config()
    assert config.vocab_size == shape.columns
    assert config.hidden_size == shape.width
    assert config.num_hidden_layers == shape.layers
    if shape.tokens:
        assert len(Worlds().ngram(QUICK[0]).tokens) < shape.tokens <= shape.columns


def test_weights_are_counted_as_transformers_counts_them():
    for shape in QUICK:
        model = tf.AutoModelForCausalLM.from_config(shape.config())
        count = sum(p.numel() for p in model.parameters())
        positions = 4096 * shape.width if shape.family == "gpt2" else 0
        assert shape.weights == pytest.approx(count - positions, rel=0.02)


# -- endurance -------------------------------------------------------------------------------


async def test_rounds_leave_nothing_behind(monkeypatch):
    sizes = endurance.Sizes(n_bytes=400, targets=3, particles=6, max_bytes=12, prompt_bytes=60)
    monkeypatch.setattr(endurance, "KV_BYTES", 1 << 21)
    monkeypatch.setattr(endurance, "ROW_BYTES", 40 * 8 * (8192 + 256))
    alive, before = [], ours_alive()

    def note(look):
        now = ours_alive()
        now.subtract(before)
        alive.append(now)

    looks = await endurance.endure(sizes, note)
    assert len(looks) >= 3
    assert looks[-1].bytes >= 400
    assert looks[-1].forwards > 15
    for look, names in zip(looks, alive, strict=True):
        assert (look.tasks, look.threads) == (0, 0)
        assert look.kv_bytes <= 1 << 21
        assert look.rows <= 40 + 64  # what one call needs is held beyond the limit
        assert names["ByteLLM"] == names["StatesFactor"] == names["ByteLanes"] == 0
        assert names["TreeTransformer"] == 1
    assert sum(alive[-1].values()) - sum(alive[0].values()) < 50


def ours_alive():
    """How many objects of each of this package's classes are alive."""
    gc.collect()
    kinds = (type(o) for o in gc.get_objects())
    return Counter(k.__name__ for k in kinds if str(k.__module__).startswith("genlm_bytes_smc"))


def test_a_leak_is_complained_of():
    look = endurance.Look(0, 0.0, 10**9, 0, 0, 10**6, 1000, 9, 9, 9, 9, 9, 0)
    steady = [_at(look, i) for i in range(10)]
    assert endurance.complaints(steady) == []
    leaking = [_at(look, i, rss=10**9 + 20_000 * i) for i in range(10)]
    assert "resident memory rises by 20.0 bytes a byte" in endurance.complaints(leaking)[0]
    tasks = [_at(look, i, tasks=int(i == 5)) for i in range(10)]
    assert "1 tasks and 0 threads left at 5,000" in endurance.complaints(tasks)[0]
    objects = [_at(look, i, objects=10**6 + 100 * i) for i in range(10)]
    assert "objects rise" in endurance.complaints(objects)[0]
    full = [_at(look, i, kv_bytes=10**9) for i in range(10)]
    assert "keys and values" in endurance.complaints(full)[0]


def _at(look, i, **changed):
    return replace(look, bytes=1000 * i, **changed)
