"""Diagnostics of a run, on which nothing in it depends: records of steps, costs, a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from rich import progress as bars
from rich.console import Console
from rich.errors import LiveError

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.lanes import Rows
from genlm_bytes_smc.smc.particles import BoolArray, Particles, StepInfo, Weights
from genlm_bytes_smc.smc.reading import Advance
from genlm_bytes_smc.smc.resampling import FloatArray

Show = Callable[[StepInfo], object]
Progress = bool | Show | None

_EVERY = 0.1  # seconds between two drawings


def spent(engines: Sequence[Any]) -> tuple[int, int, float]:
    """Return rows and forwards of all engines so far, and the time in seconds."""
    rows, forwards = 0, 0
    for engine in engines:
        rows, forwards = rows + engine.counts.rows, forwards + engine.counts.forwards
    return rows, forwards, time.perf_counter()


def observe(
    before: Particles, step: int, read: Advance, weights: Sequence[Weights]
) -> list[StepInfo]:
    """Return the record of a step of each run; its cost and ancestors come later.

    Particles `before` the reading are those of R runs one after the other, and `weights` are
    those after it, one of each run.
    """
    plan, particles, size = read.before.plan, read.particles, len(weights[0].log)
    active, dead = particles.active, particles.dead
    reads = read.before.lane_of >= 0
    forced = bool(reads.any() and (before.length[reads] >= plan.max_bytes).all())
    died = dead & ~before.dead
    lethal = _kills(read.rows, forced) if died.any() else None
    lanes, hidden = _lanes_of_runs(read, len(weights))
    out = []
    for r, weight in enumerate(weights):
        mine = slice(r * size, (r + 1) * size)
        n_active, n_dead = int(np.count_nonzero(active[mine])), int(np.count_nonzero(dead[mine]))
        out.append(
            StepInfo(
                step=step,
                ess=weight.ess,
                log_ml=weight.log_mean,
                active=n_active,
                ended=size - n_active - n_dead,
                dead=n_dead,
                lanes=lanes[r],
                forced=forced,
                deaths=_causes(lethal, read, died, mine) if lethal is not None else (),
                uncovered=hidden[r],
                symbols=read.symbols[mine].astype(np.int16) if plan.record else None,
                log_weights=particles.log_weights[mine].copy() if plan.record else None,
            )
        )
    return out


def _lanes_of_runs(read: Advance, runs: int) -> tuple[list[int], list[float]]:
    """Return for each run the number of its lanes, and the largest share of a row of theirs
    that the proposal excludes."""
    lane_of, size = read.before.lane_of, max(read.before.size, 1)
    _, target, proposal = read.rows
    share = None if proposal is None else uncovered(target, proposal)
    if runs == 1 and not read.before.plan.distinct:  # which chooses among lanes
        return [read.before.size], [0.0 if share is None else float(share.max(initial=0.0))]
    run = np.repeat(np.arange(runs), len(lane_of) // runs)
    codes = np.unique((run * size + lane_of)[lane_of >= 0])
    hidden = np.zeros(runs)
    if share is not None:
        np.maximum.at(hidden, codes // size, share[codes % size])
    return np.bincount(codes // size, minlength=runs).tolist(), hidden.tolist()


def uncovered(target: torch.Tensor, proposal: torch.Tensor) -> FloatArray:
    """Return the share of each target row on symbols that the proposal's excludes, float64[D].

    Args:
        target, proposal: float64[D, 257], nats.
    """
    hidden = target.masked_fill(~torch.isneginf(proposal), -torch.inf)
    share = torch.logsumexp(hidden, 1) - torch.logsumexp(target, 1)
    return torch.exp(share).nan_to_num(0.0).cpu().numpy()


def _kills(rows: Rows, forced: bool) -> BoolArray:
    """Return which factors leave which lanes nothing to read (or no end, if forced): bool[F, D]."""
    where = EOS_COLUMN if forced else slice(None)
    none = [b[:, where].isneginf().reshape(len(b), -1).all(1) for b in rows.blocks]
    return np.stack([x.cpu().numpy() for x in none])


def _causes(
    lethal: BoolArray, read: Advance, died: BoolArray, mine: slice
) -> tuple[tuple[str, int], ...]:
    """Return, for each factor that gave weight zero, how many particles of a run it killed.

    Args:
        lethal: see `_kills`.
        read: what was read.
        died: bool[R N], the particles that died of it, those of all runs.
        mine: the places of the run.
    """
    if not died[mine].any():
        return ()
    plan = read.before.plan
    gone = np.arange(mine.start, mine.stop)[died[mine]]
    by_rows = gone[read.log_weights[gone] == -np.inf]
    count: dict[str, int] = {}
    if len(by_rows) < len(gone):
        judges = [w.name for w in plan.weighers if w.name]
        count[" and ".join(judges or ["tempering"])] = len(gone) - len(by_rows)
    mine_of = lethal[:, read.before.lane_of[by_rows]]
    alone = mine_of.any(axis=0)
    for name, killed in zip(plan.names, mine_of, strict=True):
        if killed.any():
            count[name] = int(killed.sum())
    if not alone.all():
        several = "the proposal's draw" if plan.proposal else " and ".join(plan.names)
        count[several] = int((~alone).sum())
    return tuple(count.items())


@contextmanager
def open_progress(progress: Progress, max_bytes: int) -> Iterator[Show]:
    """Give a function to call after each step, while the block lasts.

    Args:
        progress: True for a bar on stderr, False for none, None for one if stderr is a
            terminal; or the function to call.
        max_bytes: length of the bar.

    Raises:
        TypeError: anything else.
    """
    if progress is None:
        progress = sys.stderr.isatty()
    if not isinstance(progress, bool):
        if not callable(progress):
            raise TypeError(f"progress must be None, a bool or a function, got {progress!r}")
        yield progress
    elif progress:
        with _bar(max_bytes) as show:
            yield show
    else:
        yield lambda info: None


@contextmanager
def _bar(max_bytes: int) -> Iterator[Show]:
    console = Console(stderr=True)
    if console.is_jupyter and find_spec("ipywidgets") is None:
        # in a notebook rich draws by ipywidgets or not at all: let it write to stderr, then
        console = Console(stderr=True, force_jupyter=False)
    bar = bars.Progress(
        bars.TextColumn("byte"),
        bars.MofNCompleteColumn(),
        bars.BarColumn(bar_width=20),
        bars.TextColumn("{task.description}"),
        bars.TimeElapsedColumn(),
        console=console,
        auto_refresh=False,  # no thread: drawn from `show`
        transient=console.is_terminal,  # where it cannot be redrawn, its last line stays
    )
    task = bar.add_task("", total=max_bytes)
    began, drawn, read = time.perf_counter(), 0.0, 0

    def show(info: StepInfo) -> None:
        nonlocal drawn, read
        read += info.active
        now = time.perf_counter()
        if now - drawn < _EVERY and info.active:
            return
        drawn = now
        bar.update(
            task,
            completed=min(info.step + 1, max_bytes),
            description=f"{info.active} reading, {info.ended} ended, {info.dead} dead · "
            f"ESS {info.ess:.1f} · log ML {info.log_ml:.2f} · "
            f"{read / max(now - began, 1e-9):,.0f} bytes/s",
            refresh=True,
        )

    try:
        bar.start()
    except LiveError:  # another bar has the terminal
        yield lambda info: None
        return
    try:
        yield show
    finally:
        bar.stop()
