"""Where a byte's time goes over the n-gram LM: `python -m benchmarks.parts [--bytes 1000]`.

Times the calls below one another that part a of `benchmarks.beam` is made of: the LM's own rows,
taking rows in, and the compiled steps. What is left is Python: requests, coroutines, bookkeeping.
One thread, wall time; the median run of five counts.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import K, Side, _ours
from benchmarks.ngram import NgramLM
from genlm_bytes_smc import BeamParams, ByteBeamState
from genlm_bytes_smc.beam import steps_numba
from genlm_bytes_smc.lm import host_rows

PARTS = ("LM rows", "taking rows in", "compiled steps", "Python")
_REPEATS = 5
_TIMED = (
    ("LM rows", NgramLM, ("rows",)),
    ("taking rows in", host_rows, ("take_32", "take_64")),
    ("compiled steps", steps_numba, ("look", "step", "read", "prune", "run_texts")),
)


def _timed(call: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    """`call`, adding the seconds that it takes to `spent[part]`."""

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - start

    return run


async def split(run: Callable[[], Awaitable[Any]], n_bytes: int) -> dict[str, float]:
    """Microseconds a byte of one run over `n_bytes` bytes, by part and in all."""
    spent: dict[str, float] = defaultdict(float)
    with ExitStack() as stack:
        for part, owner, names in _TIMED:
            for name in names:
                timed = _timed(getattr(owner, name), spent, part)
                stack.enter_context(mock.patch.object(owner, name, timed))
        cost = (await run())[1]
    out = {part: 1e6 * spent[part] / n_bytes for part in PARTS[:-1]}
    whole = 1e6 * cost.wall
    return out | {"Python": whole - sum(out.values()), "in all": whole}


async def measure(lm: NgramLM, n_bytes: int) -> list[tuple[str, dict[str, float]]]:
    """Measure the parts of prefill, the loop and greedy decoding, at both thresholds."""
    found = []
    text = lm.held_out
    prompt, rest = text[:32], text[32 : 32 + n_bytes]
    for threshold in (0.0, 0.05):
        beam = await ByteBeamState.initial(lm, BeamParams(K=K, prune_threshold=threshold))
        side: Side = _ours(beam)
        runs: dict[str, Callable[[], Awaitable[Any]]] = {
            "prefill": functools.partial(side.prefill, text[:n_bytes]),
            "loop": functools.partial(side.loop, prompt, rest),
            "greedy": functools.partial(side.greedy, prompt, n_bytes),
        }
        for name, run in runs.items():
            await run()  # compile
            splits = [await split(run, n_bytes) for _ in range(_REPEATS)]
            splits.sort(key=lambda s: s["in all"])
            found.append((f"{name}, threshold {threshold:g}", splits[len(splits) // 2]))
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    parser.add_argument("--bytes", type=int, default=1000, help="read or decoded (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = Table(title="Microseconds a byte, n-gram LM, 50,257 tokens, K=5, one thread")
    table.add_column()
    for column in (*PARTS, "in all"):
        table.add_column(column, justify="right")
    for case, parts in asyncio.run(measure(NgramLM(), args.bytes)):
        table.add_row(case, *(f"{parts[name]:.0f}" for name in (*PARTS, "in all")))
    Console().print(table)


if __name__ == "__main__":
    main()
