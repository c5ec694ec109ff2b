"""What a GPU makes of it, in one command and without a download.

    python -m benchmarks.gpu                             # at most 240 s on one GPU
    python -m benchmarks.gpu --models 8B --parts forward,particles
    python -m benchmarks.gpu --docs                      # and into docs/performance.md
    python -m benchmarks.gpu --from FILE --docs          # the same of a run that was recorded
    python -m benchmarks.gpu --device cpu --quick        # the same code at minuscule sizes

It needs torch, transformers and this package. Models have random weights and the shapes of
Llama-3.2-1B and Llama-3.1-8B (and GPT-2 medium, if `--models` names it) in bfloat16, over real
vocabularies; their rows are mixed with a bigram LM's (`gpu_models.py`). The parts, for beams of
K = 5 with threshold 0.05 and for the default pruning:

- agreement: rows, a beam and a seeded run of particles are the CPU's to 1e-4 nats, in float32;
- forward: one decoding forward of 1 to 1,024 positions, beside the time that reading all
  weights takes at the bandwidth of a copy that is measured first (the floor);
- text: bytes a second drawing one text;
- particles: particle-bytes a second of `smc` with a regular expression, and a step by stages;
- prompts: bytes a second reading a prompt;
- context: a step of 64 particles after prompts of several lengths (the first shape).

Each measurement is a line of `gpu.jsonl` in `--out` as soon as it is made; one that fails is a
line with its error, the others go on, and the exit status is 1. None begins after `--limit`
seconds. At the end: tables, `gpu.png` and `gpu.svg`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import gpu_parts as parts
from benchmarks.gpu_forward import (
    COMPILED,
    TooSlowError,
    bandwidths,
    compiled,
    forward,
    weights_read,
)
from benchmarks.gpu_models import FULL, QUICK, Mixed, Shape, Worlds, small
from benchmarks.gpu_parts import PARTS, QUICK_SIZES, Record, Sizes
from benchmarks.gpu_report import read, show, update_docs, write_figure
from benchmarks.report import machine

LIMIT = 240.0  # s
_LAST = 12.0  # s kept for the measurement that is under way at the limit, and for the figure


class Bench:
    """The measurements on one device, each written down as it is made.

    Args:
        device: where.
        sizes: how much.
        log: gets a line of JSON a record.
        stop: no measurement begins after this time of `time.perf_counter`.
        note: is told of each record.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes,
        log: TextIO,
        stop: float = float("inf"),
        note: Callable[[str], None] = print,
    ) -> None:
        self.device, self.sizes, self.worlds = device, sizes, Worlds()
        self.records: list[Record] = []
        self._log, self._stop, self._note = log, stop, note
        self._bandwidth = 0.0
        self._pair: list[Mixed] = []

    async def measure(self, shapes: Sequence[Shape], chosen: Sequence[str] = PARTS) -> None:
        """Measure the chosen parts: agreement on the first shape, then shape by shape.

        Each shape but the last may take as much of the time left as those after it.
        """
        copies = bandwidths(self.device, self.sizes.copied)
        self._bandwidth = copies["copy"]
        self._keep(Record("copies", "", "", self.sizes.copied, copies))
        if "agreement" in chosen:
            for case, size in parts.cases("agreement", self.sizes, compiles=False):
                await self._try(
                    Record("agreement", shapes[0].name, case, size),
                    partial(self._agreement, shapes[0], case),
                    self._stop,
                )
        self._pair.clear()
        for i, shape in enumerate(shapes):
            now = time.perf_counter()
            stop = now + (self._stop - now) / (len(shapes) - i)
            wanted = [p for p in PARTS[1:] if p in chosen and (p != "context" or i == 0)]
            await self._shape(shape, wanted, first=i == 0, stop=stop)

    async def _agreement(self, shape: Shape, case: str) -> dict[str, float]:
        """Compare the device with the CPU: two layers of a shape, in float32."""
        if not self._pair:
            places = self.device, torch.device("cpu")
            self._pair = [self.worlds.engine(small(shape), p, torch.float32) for p in places]
        here, there = self._pair
        return await parts.agreement(here, there, self.worlds.ngram(shape).held_out[:120], case)

    async def _shape(
        self, shape: Shape, wanted: Sequence[str], *, first: bool, stop: float
    ) -> None:
        """Measure parts of one shape."""
        cells = [
            Record(part, shape.name, case, size)
            for part in wanted
            for case, size in parts.cases(
                part, self.sizes, compiles=first and self.device.type == "cuda"
            )
        ]
        first_sizes = self.sizes.particles[:2]
        # The other sizes of particles come last, should the time be short.
        cells.sort(key=lambda r: r.part == "particles" and r.size not in first_sizes)
        try:
            engine = None
            if cells and time.perf_counter() < stop:
                engine = self.worlds.engine(shape, self.device, torch.bfloat16)
        except Exception as error:
            for cell in cells:
                self._keep(_failed(cell, error))
            return
        for i, cell in enumerate(cells):
            if engine is not None and i and cell.part != cells[i - 1].part:
                engine.clear_cache()
            await self._try(cell, partial(self._cell, engine, shape, cell), stop)
        engine = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    async def _cell(self, engine: Mixed, shape: Shape, cell: Record) -> dict[str, float]:
        """Measure what a record describes."""
        sizes, case, n = self.sizes, cell.case, cell.size
        text = self.worlds.ngram(shape).held_out
        before, floor = text[: sizes.before], weights_read(engine) / self._bandwidth
        if cell.part == "forward":
            measure: Any = compiled if case == COMPILED else forward
            way = () if case == COMPILED else (case,)
            found: dict[str, float] = measure(engine, before, n, *way, sizes.repeats)
            return found | {"floor_ms": 1e3 * floor, "weights_bytes": weights_read(engine)}
        if cell.part == "text":
            return await parts.one_text(engine, before, case, sizes, floor)
        if cell.part == "particles":
            return await parts.particles(engine, before, case, n, sizes, floor)
        if cell.part == "prompts":
            return await parts.prompt(engine, text[:n], case)
        return await parts.context(engine, text[:n], case, sizes.context_particles, sizes)

    async def _try(self, cell: Record, run: Callable[[], Any], stop: float) -> None:
        """Measure and write down, or write down why not."""
        if time.perf_counter() >= stop:
            self._keep(_with(cell, problem="skipped: the time was over"))
            return
        try:
            self._keep(_with(cell, values=await run()))
        except TooSlowError as error:
            self._keep(_with(cell, problem=f"skipped: {error}"))
        except Exception as error:
            self._keep(_failed(cell, error))

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self._log.write(json.dumps(record.line()) + "\n")
        self._log.flush()
        said = record.problem or ", ".join(f"{k} {v:.4g}" for k, v in record.values.items())
        self._note(f"{record.part} {record.model} {record.case} {record.size:,}: {said}")


def _with(record: Record, **changed: Any) -> Record:
    return Record(**{**vars(record), **changed})


def _failed(record: Record, error: Exception) -> Record:
    first = (str(error).splitlines() or [""])[0][:300]
    return _with(record, problem=f"failed: {type(error).__name__}: {first}")


def main(argv: list[str] | None = None, before: float = 0.0) -> int:
    """Measure, print and write.

    Args:
        argv: the command line's arguments.
        before: seconds that this process has taken so far; they count towards the limit.
    """
    began = time.perf_counter() - before
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else None)
    parser.add_argument("--quick", action="store_true", help="minuscule sizes")
    parser.add_argument("--models", default="Llama", help="parts of names of shapes, by commas")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts, by commas")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument(
        "--from",
        dest="recorded",
        type=Path,
        nargs="+",
        help="files that were recorded; the last counts",
    )
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md")
    args = parser.parse_args(argv)
    chosen = args.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    if args.docs and args.quick:
        parser.error("--docs is for full sizes, not for --quick")
    args.out.mkdir(parents=True, exist_ok=True)
    given = sys.argv[1:] if argv is None else argv
    paths: list[Path] = args.recorded or [args.out / "gpu.jsonl"]
    if args.recorded is None:
        if args.device is None:
            parser.error("no CUDA device here; --device cpu --quick runs the same code on the CPU")
        names = args.models.split(",")
        shapes = [s for s in (QUICK if args.quick else FULL) if any(n in s.name for n in names)]
        if not shapes:
            parser.error(f"no shape's name contains {args.models!r}")
        about = machine() | {"command": shlex.join(["python", "-m", "benchmarks.gpu", *given])}
        _measure(torch.device(args.device), shapes, chosen, args, about, began)
    elif missing := [str(path) for path in paths if not path.is_file()]:
        parser.error(f"there is no file {', '.join(missing)}")
    about, records = read(paths)
    show(records, about)
    write_figure(records, about, args.out / "gpu")
    if args.docs:
        update_docs(about, records)
    print(f"{time.perf_counter() - began:.0f} s; files in {args.out}")
    return int(any(r.problem.startswith("failed") for r in records))


def _measure(
    device: torch.device,
    shapes: Sequence[Shape],
    chosen: Sequence[str],
    args: argparse.Namespace,
    about: dict[str, str],
    began: float,
) -> None:
    """Measure into `gpu.jsonl`, whose first line says where and by what command."""
    about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    with (args.out / "gpu.jsonl").open("w") as log:
        log.write(json.dumps({"about": about}) + "\n")
        log.flush()
        bench = Bench(
            device, QUICK_SIZES if args.quick else Sizes(), log, began + args.limit - _LAST,
            lambda line: print(f"[{time.perf_counter() - began:5.1f} s] {line}", flush=True),
        )  # fmt: skip
        asyncio.run(bench.measure(shapes, chosen))


def _running_for() -> float:
    """Seconds since this process began, imports included; 0 where the system does not say."""
    try:
        started = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
        up = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return up - int(started) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main(before=_running_for()))
