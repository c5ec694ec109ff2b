"""One forward of the bundled model, taken apart: `python -m benchmarks.forward [--docs]`.

Two questions. What does a forward over a few positions cost by the model's own modules, written
out (`lm/decoder.py`), and in matrix products alone, which nothing can be faster than? And which
way of laying keys out is the cheapest for which contexts, and is it the one chosen?
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.attention_costs import KeyShape, measure
from genlm_bytes_smc import load_model

PAGE = report.DOCS / "performance.md"
BEGIN, END = "<!-- forward: begin -->", "<!-- forward: end -->"
LAYOUTS = ("range", "listed", "rows")
LAYOUT_NAMES = {"range": "as they lie", "listed": "listed", "rows": "a row each"}


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    positions: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128)
    prefix: int = 50  # tokens of context in front
    # Contexts, tokens that all share, tokens of each one's own.
    worlds: tuple[tuple[int, int, int], ...] = (
        (8, 500, 8), (64, 500, 8), (256, 500, 8), (2, 0, 300), (8, 0, 300), (16, 0, 200),
        (32, 0, 200), (64, 0, 200),
    )  # fmt: skip
    repeats: int = 20


QUICK = Sizes((1, 4), 8, ((4, 20, 2), (4, 0, 20)), 2)


class Bench:
    """The bundled model on one device."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.engine: Any = load_model("tiny", device=device)
        self.sizes = sizes
        self.rng = np.random.default_rng(0)

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the time of the fastest of some runs, the device's work included."""
        best = float("inf")
        for _ in range(self.sizes.repeats):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            best = min(best, time.perf_counter() - start)
        return best

    def _wait(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)

    # -- forwards ----------------------------------------------------------------------

    def forwards(self) -> Iterable[list[str]]:
        """Rows of the first table: positions, by modules, written out, products alone (ms)."""
        for count in self.sizes.positions:
            times = [self._step(count, direct=False), self._step(count, direct=True)]
            times.append(self._products(count))
            yield [str(count), *(f"{1e3 * t:.2f}" for t in times), f"{times[0] / times[1]:.2f}x"]

    def _step(self, count: int, *, direct: bool) -> float:
        """Rows of `count` contexts that share all but their last token."""
        self.engine.clear_cache()
        self.engine._forward.doubt = None if direct else "the modules are timed"
        self.engine._told_forward = True  # nobody need be warned of it
        shared = self._tokens(self.sizes.prefix)
        self._rows([shared])
        seconds = self.seconds(
            lambda: self._rows([[*shared, t] for t in self._tokens(count)], expect=count)
        )
        self.engine._forward.doubt = None
        return seconds

    def _products(self, count: int) -> float:
        """Return the matrix products of such a forward and nothing else."""
        decoder = self.engine._forward.decoder
        linears = [x for at in decoder.layers for x in (at.into, at.out, at.up, at.down)]
        inputs: dict[int, torch.Tensor] = {}
        for linear in (*linears, decoder._head):
            wide = linear._plain[0][0].shape[1]
            inputs[wide] = torch.randn((count, wide), device=self.engine.device)

        @torch.inference_mode()
        def run() -> None:
            for linear in (*linears, decoder._head):
                linear(inputs[linear._plain[0][0].shape[1]])

        return self.seconds(run)

    # -- layouts -----------------------------------------------------------------------

    def layouts(self) -> Iterable[list[str]]:
        """Rows of the second table: the contexts, ms by each layout and as chosen."""
        for world in self.sizes.worlds:
            times = [self._next(*world, layout) for layout in (*LAYOUTS, None)]
            chosen = self.chosen(*world)
            yield [*map(str, world), *(f"{1e3 * t:.1f}" for t in times), LAYOUT_NAMES[chosen]]

    def _next(self, n: int, shared: int, own: int, layout: str | None) -> float:
        """One more token in each of n contexts."""
        contexts = self._known(n, shared, own)
        self.engine._forward.layout = layout

        def step() -> None:
            self._rows([[*c, t] for c, t in zip(contexts, self._tokens(n), strict=True)])

        seconds = self.seconds(step)
        self.engine._forward.layout = None
        return seconds

    def chosen(self, n: int, shared: int, own: int) -> str:
        """Return the layout that is taken for one more token in each of n contexts."""
        contexts = self._known(n, shared, own)
        taken: list[str] = []
        prepare = self.engine._forward._buffer.prepare

        def noted(attention: Any) -> None:
            taken.append(attention.layout)
            prepare(attention)

        self.engine._forward._buffer.prepare = noted
        self._rows([[*c, t] for c, t in zip(contexts, self._tokens(n), strict=True)])
        del self.engine._forward._buffer.prepare
        return taken[-1]

    def _known(self, n: int, shared: int, own: int) -> list[list[int]]:
        self.engine.clear_cache()
        trunk = self._tokens(shared)
        contexts = [[*trunk, *self._tokens(own)] for _ in range(n)]
        for context in contexts:
            self._rows([context])
        return contexts

    # -- contexts ----------------------------------------------------------------------

    def _tokens(self, n: int) -> list[int]:
        out: list[int] = self.rng.choice(np.arange(3, 4000), n, replace=n > 3000).tolist()
        return out

    def _rows(self, contexts: Sequence[Sequence[int]], expect: int | None = None) -> None:
        tree = self.engine.tree
        nodes = np.unique([tree.insert([0, *c]) for c in contexts])
        assert expect is None or len(nodes) == expect
        self.engine.rows_sync(nodes)

    def costs(self) -> str:
        """Measure what attention costs here."""
        keys = self.engine._forward._buffer.keys
        heads = self.engine._architecture.heads
        shape = KeyShape(keys.device, keys.dtype, heads, keys.shape[1], keys.shape[3])
        found = measure(shape)
        return ", ".join(f"{name} {value:.3g} ns" for name, value in vars(found).items())


FORWARD_HEADS = ("positions", "modules, ms", "written out, ms", "products alone, ms", "gain")
LAYOUT_HEADS = ("contexts", "shared tokens", "own tokens")
LAYOUT_HEADS += (*LAYOUT_NAMES.values(), "as chosen", "chosen")


def markdown(parts: Sequence[tuple[str, Sequence[str], list[list[str]]]], about: str) -> str:
    """Return the tables as Markdown."""
    lines = []
    for title, heads, rows in parts:
        lines += [f"**{title}**", "", "| " + " | ".join(heads) + " |"]
        lines += ["|" + "|".join("--:" for _ in heads) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, about])


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and with `--docs` put the tables into docs/performance.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward", description=__doc__)
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few sizes only")
    parser.add_argument("--docs", action="store_true", help="update docs/performance.md")
    args = parser.parse_args(argv)
    if args.docs and args.quick:
        parser.error("--docs needs a full run, got --quick")
    torch.set_num_threads(args.threads)
    bench = Bench(args.device, QUICK if args.quick else Sizes())
    parts = [
        ("One forward: contexts that differ in their last token", FORWARD_HEADS,
         list(bench.forwards())),
        ("One more token in each context, ms", LAYOUT_HEADS, list(bench.layouts())),
    ]  # fmt: skip
    console = Console()
    for title, heads, rows in parts:
        table = Table(title=title)
        for head in heads:
            table.add_column(head, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    about = f"Attention costs, measured: {bench.costs()}. Threads: {args.threads}. "
    about += report.describe(report.machine()) + "."
    console.print(about)
    if args.docs:
        before, rest = PAGE.read_text().split(BEGIN)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{markdown(parts, about)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
