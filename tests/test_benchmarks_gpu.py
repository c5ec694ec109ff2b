"""The GPU benchmark's code on the CPU at minuscule sizes; its tables and documents from records."""

import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf

from benchmarks import gpu, gpu_forward, gpu_parts, gpu_report, report
from benchmarks.gpu_models import FULL, QUICK, Mixed, Worlds
from benchmarks.gpu_parts import DEFAULT, ON_HOST, PARTS, QUICK_SIZES, TOP, Record
from benchmarks.gpu_stages import MIX, STAGES, Stages, Waits, patched
from genlm_bytes_smc.beam.single import ByteBeamState
from genlm_bytes_smc.lm.transformer import TreeTransformer

CPU = torch.device("cpu")
LLAMA = QUICK[1]
WORLDS = Worlds()
SIZES = replace(
    QUICK_SIZES, positions=(3,), particles=(4, 2), on_host=(4,), prompts=(30,), contexts=(30,),
    text=5, steps=4, before=20, repeats=1, copied=1 << 20, seconds=60.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return WORLDS.engine(LLAMA, CPU, torch.float32)


@pytest.fixture(scope="module")
def pair():
    return [WORLDS.engine(LLAMA, CPU, torch.float32) for _ in range(2)]


# -- the command -----------------------------------------------------------------------------


def test_the_command_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "QUICK_SIZES", SIZES)
    quick = ["--device", "cpu", "--quick", "--models", "Llama", "--out", str(tmp_path)]
    assert gpu.main(quick) == 0
    about, records = gpu_report.read([tmp_path / "gpu.jsonl"])
    assert about["command"].endswith("--quick --models Llama --out " + str(tmp_path))
    assert [r.problem for r in records if r.problem] == []
    assert {r.part for r in records} == {"copies", *PARTS}
    by = {(r.part, r.case, r.size): r.values for r in records}
    assert by["agreement", TOP, 16]["apart"] == by["agreement", DEFAULT, 16]["apart"] == 0.0
    for case in (TOP, DEFAULT):
        text = by["text", case, 5]
        assert 0 < text["forwards"] <= text["rows"]
        assert 0 < text["inside"] < 1
        run = by["particles", case, 4]
        assert run["steps"] == 4
        assert 1 <= run["lanes"] <= 4
        assert run["forwards"] <= run["rows"] <= run["positions"]
        split = {stage: run[f"{stage}_ms"] for stage in STAGES}
        assert min(split.values()) > 0
        assert run["inside"] == pytest.approx(split["forward"] / sum(split.values()), rel=1e-4)
        assert by["prompts", case, 30]["forwards"] < 1
    assert by["particles", ON_HOST, 4]["rows"] == by["particles", DEFAULT, 4]["rows"]
    assert all(by["forward", way, 3]["ms"] > 0 for way in gpu_forward.WAYS)
    out = capsys.readouterr().out
    assert "One decoding forward, ms" in out
    assert "transformers' modules" in out
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert "Not measured" not in out


def test_a_failure_is_written_down_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    async def fails(engine, text, case):
        raise ArithmeticError("no [red] prompt")

    monkeypatch.setattr(gpu, "QUICK_SIZES", SIZES)
    monkeypatch.setattr(gpu_parts, "prompt", fails)
    argv = ["--device", "cpu", "--quick", "--parts", "prompts,context", "--out", str(tmp_path)]
    assert gpu.main(argv) == 1
    _, records = gpu_report.read([tmp_path / "gpu.jsonl"])
    problems = {r.part: r.problem for r in records}
    assert problems["prompts"] == "failed: ArithmeticError: no [red] prompt"
    assert problems["context"] == ""
    assert "ArithmeticError: no [red] prompt" in capsys.readouterr().out


def test_nothing_begins_after_the_limit(tmp_path, capsys):
    argv = ["--device", "cpu", "--quick", "--limit", "1", "--out", str(tmp_path)]
    assert gpu.main(argv) == 0
    _, records = gpu_report.read([tmp_path / "gpu.jsonl"])
    assert {r.part for r in records if r.problem} == set(PARTS)
    assert all("the time was over" in r.problem for r in records if r.part != "copies")


async def test_each_line_is_written_as_soon_as_it_is_known():
    log, seen = io.StringIO(), []
    bench = gpu.Bench(
        CPU, SIZES, log, note=lambda line: seen.append(len(log.getvalue().splitlines()))
    )
    await bench.measure([LLAMA], ["forward"])
    assert seen == [1, 2, 3, 4]  # copies, and three ways of one forward


def test_what_cannot_be_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ["--out", str(tmp_path)]
    for argv, said in (
        ([], "no CUDA device here"),
        (["--device", "cpu", "--models", "abacus"], "no shape's name contains 'abacus'"),
        (["--device", "cpu", "--parts", "forward,wings"], "got wings"),
        (["--device", "cpu", "--quick", "--docs"], "--docs is for full sizes"),
        (["--from", str(tmp_path / "none")], "there is no file"),
    ):
        with pytest.raises(SystemExit):
            gpu.main([*argv, *out])
        assert said in capsys.readouterr().err


# -- agreement -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [TOP, DEFAULT])
@pytest.mark.parametrize("what", ["rows", "beam", "weights", "texts"])
async def test_devices_that_disagree_are_found_out(monkeypatch, pair, case, what):
    """The first of two engines is made to differ by 0.001 nats, or in one text."""
    first = []

    async def off_beam(self, text):
        state = await prefill(self, text)
        if not first:
            first.append(state)
            state.lanes.log_z[:] -= 1e-3
        return state

    async def off_run(engine, *args):
        state, values = await run(engine, *args)
        if not first:
            first.append(state)
            particles = state.particles
            if what == "texts":
                particles.text[3, 0] ^= 1
            else:
                particles.log_weights[3] += 1e-3
        return state, values

    def off_rows(self, rows, nodes):
        first.append(self)
        return mix(self, rows, nodes).sub_(1e-3 * (self is first[0]))

    if what == "rows":
        mix = Mixed.mix
        monkeypatch.setattr(Mixed, "mix", off_rows)
    elif what == "beam":
        prefill = ByteBeamState.prefill
        monkeypatch.setattr(ByteBeamState, "prefill", off_beam)
    else:
        run = gpu_parts._run
        monkeypatch.setattr(gpu_parts, "_run", off_run)
    said = "1 of 16 texts" if what == "texts" else "0 of 16 texts"
    with pytest.raises(AssertionError, match=f"cpu and the CPU differ by .*{said}"):
        await gpu_parts.agreement(*pair, WORLDS.ngram(LLAMA).held_out[:120], case)


# -- stages and waits ------------------------------------------------------------------------


async def test_stages_add_up_and_leave_nothing_watched(engine):
    text = WORLDS.ngram(LLAMA).held_out
    before = TreeTransformer.evaluate, Mixed.mix
    start = time.perf_counter()
    with Stages(CPU) as stages:
        _, values = await gpu_parts._run(engine, text[:20], TOP, 4, 3, np.inf, stages)
    assert (TreeTransformer.evaluate, Mixed.mix) == before
    whole = sum(stages.seconds[name] for name in (*STAGES, MIX))
    assert 3e-3 * values["ms"] <= whole <= time.perf_counter() - start


def test_waits_are_counted_inside_the_forward_and_outside(engine, monkeypatch):
    x, tree = torch.arange(4.0), engine._tree
    node = np.array([engine.tree.insert([*engine.start, 3])])
    with Waits(CPU) as waits:
        x.sum()
        assert (waits.inside, waits.outside) == (0, 0)
        x[2].item()
        x.nonzero()
        x[x > 1]
        assert (waits.inside, waits.outside) == (0, 3)
        waits.restart()
        TreeTransformer.evaluate(engine, node)
        assert waits.outside == 0
        inside = waits.inside
        monkeypatch.setattr(engine, "_tree", lambda nodes: (x[0].item(), tree(nodes))[1])
        waits.restart()
        TreeTransformer.evaluate(engine, node)
        assert (waits.inside, waits.outside) == (inside + 1, 0)


def test_what_is_to_be_watched_must_be_there():
    with (
        pytest.raises(AttributeError, match="Mixed has no blend"),
        patched(Mixed, "blend", lambda call: call),
    ):
        pass


# -- forwards --------------------------------------------------------------------------------


def test_the_forward_of_a_fixed_shape_is_the_engines():
    engine = WORLDS.engine(LLAMA, CPU, torch.float32)
    tokens = torch.arange(17, 21)
    run = gpu_forward.over_fixed_shape(engine, 0, 4)
    nodes = np.array([engine.tree.insert([t]) for t in tokens.tolist()])
    torch.testing.assert_close(run(tokens), TreeTransformer.evaluate(engine, nodes))


def test_each_way_runs_its_own_forward(engine, monkeypatch):
    seen = []
    evaluate = TreeTransformer.evaluate

    def watch(self, nodes):
        inner = self._forward
        seen.append((str(self.forward), getattr(inner, "graphs", True), len(nodes)))
        return evaluate(self, nodes)

    monkeypatch.setattr(TreeTransformer, "evaluate", watch)
    for way in gpu_forward.WAYS:
        assert gpu_forward.forward(engine, b"Once", 3, way, 1)["ms"] > 0
    once = 1 + 1 + 3  # what is before, one that is timed, three that warm up
    assert seen == [
        *[("written out", True, 3)] * once,
        *[("written out", False, 3)] * once,
        *[("modules", True, 3)] * once,
    ]
    assert engine.forward == "written out"
    with pytest.raises(ValueError, match="way must be one of engine, eager, modules, got 'x'"):
        gpu_forward.forward(engine, b"Once", 3, "x", 1)


def test_the_floor_reads_the_embedding_only_where_the_head_shares_it():
    tied, apart = WORLDS.engine(LLAMA, CPU, torch.float32), QUICK[1].config()
    assert gpu_forward.weights_read(tied) == 4 * sum(p.numel() for p in tied.base.parameters())
    apart.tie_word_embeddings = False
    tied.base = tf.AutoModelForCausalLM.from_config(apart)
    every = 4 * sum(p.numel() for p in tied.base.parameters())
    assert gpu_forward.weights_read(tied) == every - 4 * LLAMA.columns * LLAMA.width


# -- tables and documents --------------------------------------------------------------------


def recorded(path, *, rate=6000.0, device="NVIDIA H200", problem=""):
    """Write a run as a GPU might have made it."""
    large = "Llama-3.1-8B"
    step = {f"{stage}_ms": 1.0 for stage in STAGES} | {"forward_ms": 5.0, "mix_ms": 0.4}
    step |= {"ms": 10.0, "rows": 10.0, "forwards": 0.9, "positions": 10.0, "lanes": 30.0}
    step |= {"rate": rate, "inside": 0.5, "floor_ms": 3.75, "waits": 2.0, "waits_inside": 1.0}
    step["peak_bytes"] = 2.0**34
    text = step | {"rate": 300.0, "over_floor": 1.4}
    records = [
        Record("copies", "", "", 1 << 30, {"copy": 4e12, "pinned": 53.7e9}),
        Record("agreement", "Llama-3.2-1B", TOP, 16, {"apart": 1.9e-6}),
        Record("forward", large, "engine", 64, {"ms": 7.5, "floor_ms": 3.75}),
        Record("forward", large, "modules", 64, {"ms": 42.0, "floor_ms": 3.75}),
        Record("text", large, TOP, 300, text),
        Record("particles", large, TOP, 64, step, problem),
        Record("particles", large, DEFAULT, 1024, step),
        Record("prompts", large, DEFAULT, 500, step),
        Record("context", large, DEFAULT, 8000, step, "skipped: the time was over"),
    ]
    about = report.machine() | {"device": device, "command": "python -m benchmarks.gpu"}
    lines = [{"about": about}, *(r.line() for r in records)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_documents_from_a_recorded_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(gpu_report, "RAW", tmp_path / "raw.jsonl")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    page.write_text("a <!-- measured gpu: begin --> outdated <!-- measured gpu: end --> b")
    path = recorded(tmp_path / "run.jsonl")
    assert gpu.main(["--from", str(path), "--docs", "--out", str(tmp_path)]) == 0
    text = page.read_text()
    assert text.startswith("a <!--")
    assert text.endswith("--> b")
    assert "outdated" not in text
    assert "6,000 | at least 5,000: met" in text
    assert "6,000 | at least 25,000: missed" in text
    assert "300 | at least 400: missed" in text
    assert "1.4 | at most 1.5: met" in text
    assert "50% | at least 85%: missed" in text
    assert "| Llama-3.1-8B | 64 | 3.75 | 7.5 | 42 | 2.00 |" in text
    assert "NVIDIA H200; `python -m benchmarks.gpu`. Copies: 4,000 GB/s on the device" in text
    assert "skipped: the time was over" in text
    assert gpu_report.read([tmp_path / "raw.jsonl"]) == gpu_report.read([path])
    assert (tmp_path / "docs" / "images" / "gpu.svg").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "missed" in out
    assert "25,000" in out
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must have the mark '<!-- measured gpu: begin -->' once"):
        gpu.main(["--from", str(path), "--docs", "--out", str(tmp_path)])
    assert page.read_text() == "no marks"


def test_runs_of_one_device_are_joined(tmp_path):
    old = recorded(tmp_path / "old.jsonl", rate=1.0)
    new = recorded(tmp_path / "new.jsonl", rate=2.0, problem="failed: no memory")
    _, records = gpu_report.read([old, new])
    rates = {(r.part, r.size): r.values.get("rate") for r in records if not r.problem}
    assert rates["particles", 64] == 1.0  # the later run failed
    assert rates["particles", 1024] == 2.0
    other = recorded(tmp_path / "other.jsonl", device="NVIDIA H100")
    with pytest.raises(ValueError, match="NVIDIA H100, NVIDIA H200"):
        gpu_report.read([old, other])
    old.write_text('{"about": {}}\n[]')
    with pytest.raises(ValueError, match=r"old\.jsonl is no record of benchmarks\.gpu"):
        gpu_report.read([old])


def test_the_document_shows_what_the_data_say():
    text = (report.DOCS / "performance.md").read_text()
    block = text.split("<!-- measured gpu: begin -->")[1].split("<!-- measured gpu: end -->")[0]
    if gpu_report.RAW.exists():
        about, records = gpu_report.read([gpu_report.RAW])
        assert block.strip() == gpu_report.block(records, about).strip()
    else:
        assert "not been measured" in block


# -- models ----------------------------------------------------------------------------------


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
