"""What a GPU makes of it, in one command and without a download.

    python -m benchmarks.gpu                         # everything: under ten minutes on one GPU
    python -m benchmarks.gpu --models 1B             # shapes whose names contain this
    python -m benchmarks.gpu --device cpu --quick    # the same code at minuscule sizes

It needs torch, transformers and this package. Models have random weights and the shapes of
GPT-2 medium, Llama-3.2-1B and Llama-3.1-8B in bfloat16, over real vocabularies of 50,257 and
128,001 tokens; their rows are mixed with a bigram LM's (`gpu_models.py`).

First the device is compared with the CPU, in float32 on two layers of each shape: rows, beams
and a seeded run of particles must agree, or nothing is measured. Then, for each shape:

- bytes a second drawing one text, K = 1, 5, 20, 64;
- particle-bytes a second of `smc` with a regular expression, up to 1,024 particles;
- the share of a particle step outside the model's forward, launches there and waits for the
  device a step; on a GPU with Triton the same by plain torch kernels;
- bytes a second reading a prompt of 500 to 8,000 bytes;
- peak memory.

Output: a table, and `gpu.jsonl`, `gpu.png` and `gpu.svg` in `--out`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_models import FULL, QUICK, Mixed, Shape, Worlds, small, wait_for
from benchmarks.report import machine
from genlm_bytes_smc import BeamParams, ByteBeamState, ByteLanes, byte_model
from genlm_bytes_smc.beam.kernels_host import NumbaKernels
from genlm_bytes_smc.beam.kernels_torch import TorchKernels
from genlm_bytes_smc.beam.model import FUSED
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import SMCState, smc_steps

THRESHOLD = 0.05
PATTERN = r"[A-Za-z0-9 ,.;:'\"()=_*/<>\[\]\n-]+"
GOALS = {  # on an H200
    ("one text", "Llama-3.1-8B", 5): 400.0,
    ("particles", "Llama-3.1-8B", 64): 5000.0,
}
OUTSIDE_GOALS = {("Llama-3.2-1B", 64): 0.1}


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    beams: Sequence[int] = (1, 5, 20, 64)
    particles: Sequence[int] = (1, 4, 16, 64, 256, 1024)
    prompts: Sequence[int] = (500, 1000, 2000, 4000, 8000)
    text: int = 400  # bytes drawn at most
    steps: int = 64  # of particles at most
    seconds: float = 4.0  # a measurement at most, roughly
    before: int = 100  # bytes of the prompt that texts are drawn after


QUICK_SIZES = Sizes(
    beams=(1, 4), particles=(1, 8), prompts=(40, 120), text=16, steps=8, seconds=1.0, before=30
)


@dataclass
class Record:
    """One measurement.

    Attributes:
        kind: "agreement", "one text", "particles" or "prefill".
        model: which shape.
        size: K, particles or bytes.
        rate: bytes or particle-bytes a second (agreement: largest difference, nats).
        outside: share of the time outside the model's forward; None: not measured.
        waits: waits for the device by the beam's kernels, for each byte or step.
        rows, forwards: asked of the model, for each byte or step.
        launches: operations started on the device outside the forward, for each step: torch's
            that are no views, and Triton's; a torch operation can be more than one kernel.
        peak_bytes: of device memory so far; None where the device does not say.
        goal: what `rate` should reach.
    """

    kind: str
    model: str
    size: int
    rate: float
    outside: float | None = None
    waits: float | None = None
    rows: float | None = None
    forwards: float | None = None
    peak_bytes: int | None = None
    goal: float | None = field(default=None)
    launches: float | None = None


class Bench:
    """The measurements on one device."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.worlds = Worlds()

    # -- agreement with the CPU ----------------------------------------------------------

    async def agree(self, shape: Shape) -> Record:
        """Rows, a beam and a run of particles here and on the CPU, in float32.

        Raises:
            AssertionError: they differ.
        """
        shape = small(shape)
        here = self.worlds.engine(shape, self.device, torch.float32)
        there = self.worlds.engine(shape, torch.device("cpu"), torch.float32)
        _use(here, best_kernels(self.device))
        _use(there, NumbaKernels)
        text = self.worlds.ngram(shape).held_out[:120]
        contexts = [[*here.start, *here.tokenizer.encode(text[:n].decode())] for n in (0, 9, 90)]
        rows = [e.batch_next_token_logprobs_sync(contexts).cpu() for e in (here, there)]
        apart = float((rows[0] - rows[1])[:, : len(here.byte_vocab)].abs().max())
        beams = [await self._read(e, text, 5) for e in (here, there)]
        apart = max(apart, abs(float(beams[0].log_z[0] - beams[1].log_z[0])))
        runs = [(await self._particles(e, 16, 12, np.inf, text[:40]))[0] for e in (here, there)]
        texts = [run.particles.texts() for run in runs]
        if apart > 1e-2 or texts[0] != texts[1]:
            raise AssertionError(
                f"{shape.name}: {self.device} and the CPU differ by {apart:.2e} nats, and "
                f"{sum(a != b for a, b in zip(*texts, strict=True))} of 16 texts"
            )
        return Record("agreement", shape.name, 16, apart)

    async def _read(self, engine: Mixed, text: bytes, k: int) -> ByteLanes:
        params = BeamParams(K=k, prune_threshold=THRESHOLD)
        beam = await ByteBeamState.initial(engine, params)
        return (await beam.prefill(text)).lanes

    # -- speed ---------------------------------------------------------------------------

    async def shape(self, shape: Shape) -> list[Record]:
        """All measurements of one shape."""
        engine = self.worlds.engine(shape, self.device, torch.bfloat16)
        best = best_kernels(self.device)
        _use(engine, best)
        await self._one_text(engine, shape, self.sizes.beams[0])  # compile, allocate
        out = [await self._one_text(engine, shape, k) for k in self.sizes.beams]
        out += [await self._many(engine, shape, n) for n in self.sizes.particles]
        if best is not TorchKernels:
            _use(engine, TorchKernels)
            plain = [await self._many(engine, shape, n) for n in self.sizes.particles]
            out += [replace(r, kind="particles, torch kernels", goal=None) for r in plain]
            _use(engine, best)
        out += [await self._prefill(engine, shape, n) for n in self.sizes.prompts]
        del engine
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return out

    async def _one_text(self, engine: Mixed, shape: Shape, k: int) -> Record:
        _fresh(engine)
        prompt = self.worlds.ngram(shape).held_out[: self.sizes.before]
        lanes = await self._read(engine, prompt, k)
        rng = np.random.default_rng(k)
        timed = _Timed(engine)
        made = 0
        while made < self.sizes.text and timed.seconds < self.sizes.seconds:
            row = (await lanes.logp_next())[0].cpu().numpy()
            p = np.exp(row[:256])
            lanes = await lanes.step([int(rng.choice(256, p=p / p.sum()))])
            made += 1
        goal = GOALS.get(("one text", shape.name, k))
        return timed.record("one text", shape.name, k, made, made, goal)

    async def _many(self, engine: Mixed, shape: Shape, n: int) -> Record:
        _fresh(engine)
        prompt = self.worlds.ngram(shape).held_out[: self.sizes.before]
        steps, limit = self.sizes.steps, self.sizes.seconds
        await self._particles(engine, n, 4, limit, prompt)  # memory is allocated
        state, timed = await self._particles(engine, n, steps, limit, prompt)
        goal = GOALS.get(("particles", shape.name, n))
        made = int(state.particles.length.sum())
        record = timed.record("particles", shape.name, n, made, state.step, goal)
        engine.timed = True  # once more, with a wait around each forward
        _, timed = await self._particles(engine, n, max(4, steps // 4), limit, prompt)
        record.outside = 1 - (engine.forward_seconds - timed.forward_seconds) / timed.stopped
        engine.timed = False
        with Launches(engine) as launches:
            state, _ = await self._particles(engine, n, 4, limit, prompt, launches)
        record.launches = launches.count / max(1, state.step)
        return record

    async def _particles(
        self,
        engine: Mixed,
        n: int,
        steps: int,
        seconds: float,
        prompt: bytes = b"",
        launches: Launches | None = None,
    ) -> tuple[SMCState, _Timed]:
        """Particles after some steps, and the time since they had read the prompt."""
        _fresh(engine)
        params = BeamParams(K=5, prune_threshold=THRESHOLD)
        llm = ByteLLM(engine, params, prompt=prompt)
        await llm.prompt_weight()  # reads the prompt
        target = llm * ByteRegex(PATTERN, device=engine.device)
        states: list[SMCState] = []
        # Texts end without a weight, at any length: it is steps that are measured.
        run = smc_steps(target, n, 0.5, 4 * steps, seed=1, terminate_when=lambda t: False)
        timed = _Timed(engine)
        if launches is not None:
            launches.count = 0
        async for state in run:
            states = [state]
            if state.step >= steps or (state.step and timed.seconds > seconds):
                break
        timed.stop()
        await run.aclose()
        return states[0], timed

    async def _prefill(self, engine: Mixed, shape: Shape, n: int) -> Record:
        text = self.worlds.ngram(shape).held_out[:n]
        _fresh(engine)
        timed = _Timed(engine)
        await self._read(engine, text, 5)
        return timed.record("prefill", shape.name, n, len(text), len(text), None)


class _Timed:
    """Time and counts since it was made."""

    def __init__(self, engine: Mixed) -> None:
        self.engine = engine
        self.kernels = byte_model(engine).kernels
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)
        wait_for(engine.device)
        engine.counts.reset()
        self.syncs = getattr(self.kernels, "syncs", 0)  # numba's have nobody to wait for
        self.forward_seconds = engine.forward_seconds
        self.stopped = 0.0
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def stop(self) -> None:
        """Take the time, once the device has done all it was given."""
        wait_for(self.engine.device)
        self.stopped = self.seconds

    def record(
        self, kind: str, name: str, size: int, made: int, steps: int, goal: float | None
    ) -> Record:
        if not self.stopped:
            self.stop()
        seconds, counts = self.stopped, self.engine.counts
        peak = None
        if self.engine.device.type == "cuda":
            peak = int(torch.cuda.max_memory_allocated(self.engine.device))
        return Record(
            kind, name, size, made / seconds, None, (self.kernels.syncs - self.syncs) / steps,
            counts.rows / steps, counts.forwards / steps, peak, goal,
        )  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what is started outside the model's forward."""

    def __init__(self, engine: Mixed) -> None:
        super().__init__()
        self.engine, self.count, self._inside = engine, 0, False

    def __enter__(self) -> Launches:
        evaluate = self.engine.evaluate

        def uncounted(nodes: np.ndarray) -> torch.Tensor:
            self._inside = True
            try:
                return evaluate(nodes)
            finally:
                self._inside = False

        self.engine.evaluate = uncounted  # type: ignore[method-assign]
        self._fused = sys.modules.get("genlm_bytes_smc.beam.kernels_fused")
        if self._fused is not None:
            self._launch, self._fused.launch = self._fused.launch, self._counted
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        del self.engine.evaluate
        if self._fused is not None:
            self._fused.launch = self._launch

    def _counted(self, *args: Any, **sizes: Any) -> None:
        self.count += 1
        self._launch(*args, **sizes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        idle = func.is_view or name.startswith("empty") or name in ("detach", "scalar_tensor")
        if not (self._inside or idle):
            device = self.engine.device.type
            tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
            self.count += any(x.device.type == device for x in tensors)
        return out


def best_kernels(device: torch.device) -> Any:
    """Return the kernels that a run on `device` gets, of those that work on torch tensors."""
    if device.type != "cuda" or os.environ.get(FUSED) == "0" or find_spec("triton") is None:
        return TorchKernels
    from genlm_bytes_smc.beam.kernels_fused import FusedKernels

    return FusedKernels


def _use(engine: Mixed, kind: Any) -> None:
    """Have the beams of an engine computed by one set of kernels."""
    model = byte_model(engine)
    model.kernels = kind(model.store)


def _fresh(engine: Mixed) -> None:
    """Forget what earlier measurements computed."""
    engine.clear_cache()
    byte_model(engine).store.clear()


# -- what is shown ---------------------------------------------------------------------------


def show(records: Sequence[Record], about: dict[str, str]) -> None:
    """Print the table."""
    heads = (
        "",
        "model",
        "size",
        "rate",
        "goal",
        "outside the forward",
        "launches",
        "waits",
        "rows",
    )
    table = Table(*heads, "forwards", "peak memory", title=about["device"])
    kind = ""
    for r in records:
        if r.kind != kind:
            table.add_section()
        rate = f"{r.rate:.1e} nats" if r.kind == "agreement" else f"{r.rate:,.0f}/s"
        cells = [r.kind if r.kind != kind else "", r.model, f"{r.size:,}", rate]
        cells += ["" if r.goal is None else f"{r.goal:,.0f}/s"]
        goal = OUTSIDE_GOALS.get((r.model, r.size)) if r.kind == "particles" else None
        most = "" if goal is None else f" (goal: {goal:.0%})"
        cells += ["" if r.outside is None else f"{r.outside:.1%}{most}"]
        cells += ["" if r.launches is None else f"{r.launches:.0f}"]
        cells += ["" if x is None else f"{x:.2f}" for x in (r.waits, r.rows, r.forwards)]
        cells += ["" if r.peak_bytes is None else f"{r.peak_bytes / 2**30:.2f} GiB"]
        table.add_row(*cells)
        kind = r.kind
    Console(width=max(Console().width, 140)).print(table)


def figure(records: Sequence[Record], device: str) -> Figure:
    """Rates against sizes, a panel a kind."""
    kinds = {"one text": "K", "particles": "particles", "prefill": "bytes of prompt"}
    fig = Figure(figsize=(10, 3.4), layout="constrained")
    for ax, (kind, label) in zip(fig.subplots(1, 3), kinds.items(), strict=True):
        for i, name in enumerate(dict.fromkeys(r.model for r in records if r.kind == kind)):
            mine = [r for r in records if r.kind == kind and r.model == name]
            ax.plot([r.size for r in mine], [r.rate for r in mine], "o-", color=f"C{i}", label=name)
            for r in mine:
                if r.goal is not None:
                    ax.plot(r.size, r.goal, "_", color=f"C{i}", ms=18, mew=2)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_minor_formatter("{x:,.0f}" if _narrow(records, kind) else NullFormatter())
        sizes = sorted({r.size for r in records if r.kind == kind})
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.set_xticks([], minor=True)
        ax.set_xlabel(label)
        ax.set_title(
            "particle-bytes a second" if kind == "particles" else f"{kind}: bytes a second"
        )
    fig.axes[0].legend(frameon=False)
    fig.suptitle(f"{device} (bars: goals)", fontsize=9)
    return fig


def _narrow(records: Sequence[Record], kind: str) -> bool:
    """Whether the rates of a kind lie within a factor of ten, so that minor ticks need names."""
    rates = [r.rate for r in records if r.kind == kind]
    return bool(rates) and max(rates) < 10 * min(rates)


def write(records: Sequence[Record], about: dict[str, str], out: Path, *, quick: bool) -> None:
    """`gpu.jsonl` (first line: the machine), `gpu.png` and `gpu.svg` in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"about": about, "quick": quick})]
    lines += [json.dumps(asdict(r)) for r in records]
    (out / "gpu.jsonl").write_text("\n".join(lines) + "\n")
    with mpl.rc_context({"svg.hashsalt": "genlm-bytes-smc", "font.size": 9}):
        fig = figure(records, about["device"])
        fig.savefig(out / "gpu.png", dpi=150)
        fig.savefig(out / "gpu.svg", metadata={"Date": None})


async def measure(bench: Bench, shapes: Sequence[Shape], *, note: Any = print) -> list[Record]:
    """Agreement first, then speed, shape by shape."""
    records = []
    for shape in shapes:
        records.append(await bench.agree(shape))
    for shape in shapes:
        note(f"{shape.name}: {shape.weights / 1e9:.2f} billion weights")
        records += await bench.shape(shape)
    order = ("agreement", "one text", "particles", "particles, torch kernels", "prefill")
    return sorted(records, key=lambda r: order.index(r.kind))


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else None)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)
    if args.device is None:
        parser.error("no CUDA device here; --device cpu --quick runs the same code on the CPU")
    shapes = [s for s in (QUICK if args.quick else FULL) if args.models in s.name]
    if not shapes:
        parser.error(f"no shape's name contains {args.models!r}")
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = machine() | {"device": f"{name}, torch {torch.__version__}"}
    started = time.perf_counter()
    bench = Bench(device, QUICK_SIZES if args.quick else Sizes())
    records = asyncio.run(measure(bench, shapes))
    show(records, about)
    write(records, about, args.out, quick=args.quick)
    print(f"{time.perf_counter() - started:.0f} s; {about['date']}; files in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
