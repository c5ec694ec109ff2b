"""Endurance: a million bytes in one process, and nothing that grows.

    python -m benchmarks.endurance                    # a million bytes: about a quarter of an hour
    python -m benchmarks.endurance --bytes 50000      # a shorter look
    python -m benchmarks.endurance --out DIR          # where endurance.jsonl goes

Round after round, `smc_many` runs a handful of targets side by side: the bundled model after
a prompt from its held-out texts, times a constraint that is made anew each time. All caches
are given small limits, so that they fill early and have to give things up all the time. After
each round the process is looked at; in the end the run fails if

- the resident memory of the second half rises by more than `SLOPE` bytes for each byte generated
  (least squares over the rounds),
- a task or thread is left that was not there before,
- a cache is beyond its limit, or the number of objects or of live contexts keeps rising.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc import BeamParams, byte_model, load_model
from genlm_bytes_smc.constraints import (
    ByteGrammar,
    ByteJsonSchema,
    ByteRegex,
    Containing,
    FiniteSet,
    MaxBytes,
    StopStrings,
    Utf8,
)
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import smc_many

SLOPE = 16.0
"""Most bytes of resident memory for each byte generated: 16 MB a million."""

KV_BYTES, ROW_BYTES = 1 << 25, 1 << 26
SLACK_ROWS = 1024  # beyond the limit, while one call needs them
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_SUMS = 'start: sum\nsum: number ("+" number)*\nnumber: /[0-9]{1,3}/\n'

# Each makes a constraint anew from the round's number, so that no two rounds share tables.
CONSTRAINTS: list[Callable[[int], Any]] = [
    lambda i: ByteRegex(rf"[a-z ]{{{8 + i % 5},40}}[.]"),
    lambda i: ByteRegex(rf"(19|20)[0-9]{{2}}-[01][0-9]-[0-3][0-9]( [a-z]{{1,{3 + i % 9}}})?"),
    lambda i: FiniteSet([f"number {k * (i % 7 + 1)}".encode() for k in range(50)]),
    lambda i: ByteJsonSchema({**_SCHEMA, "title": f"round {i}"}),
    lambda i: ByteGrammar(_SUMS),
    lambda i: Utf8() * MaxBytes(30 + i % 20),
    lambda i: Containing([b"aeiou"[i % 5 : i % 5 + 1]]),
    lambda i: StopStrings([b". ", b"\n"]),
]


@dataclass(frozen=True)
class Sizes:
    """How much to generate, and how much at a time."""

    n_bytes: int = 1_000_000
    targets: int = 8
    particles: int = 32
    max_bytes: int = 48
    prompt_bytes: int = 200


@dataclass(frozen=True)
class Look:
    """The process after one round.

    Attributes:
        bytes: generated so far, over all particles.
        seconds: since the start.
        rss: resident memory, bytes.
        tasks, threads: that are not the run's own.
        objects: that Python's collector knows.
        contexts: alive in the context tree.
        entries, kv_bytes: keys and values held.
        rows, row_bytes: rows held and the bytes of their slots.
        forwards: of the model so far.
        deaths: runs so far all of whose particles died.
    """

    bytes: int
    seconds: float
    rss: int
    tasks: int
    threads: int
    objects: int
    contexts: int
    entries: int
    kv_bytes: int
    rows: int
    row_bytes: int
    forwards: int
    deaths: int


class Enduring:
    """The model and what is asked of it, round by round."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.engine = load_model("tiny", device="cpu", limit_bytes=KV_BYTES)
        self.model = byte_model(self.engine, row_bytes=ROW_BYTES)
        self.params = BeamParams(K=4, prune_threshold=0.05)
        self.prompts = _held_out(sizes.prompt_bytes)
        self.made = self.deaths = self.passed = 0
        self.threads = threading.active_count()
        self.started = time.perf_counter()

    async def targets(self, i: int) -> list[Any]:
        """Return the targets of round `i`: other prompts and other constraints each time.

        A prompt that so narrow a beam cannot read (one in some hundreds: healing respells
        greedily, and may find no way) is passed over.
        """
        out = []
        for k in range(self.sizes.targets):
            n = i * self.sizes.targets + k
            prompt = self.prompts[n % len(self.prompts)]
            params = self.params if n % 3 else BeamParams(K=3, prune="unbiased", seed=n)
            llm = ByteLLM(self.engine, params, cache_size=64, prompt=prompt)
            constraint = CONSTRAINTS[n % len(CONSTRAINTS)](n)
            try:
                await llm.prompt_weight()
            except ValueError:
                self.passed += 1
            else:
                out.append(llm * constraint)
        return out

    async def rounds(self) -> AsyncIterator[Look]:
        """Generate until there are enough bytes, looking at the process after each round."""
        i = 0
        while self.made < self.sizes.n_bytes:
            results = await smc_many(
                await self.targets(i),
                self.sizes.particles,
                max_bytes=self.sizes.max_bytes,
                seed=1000 * i,
                dead="return",
            )
            self.made += sum(len(text) for r in results for text in r.texts)
            self.deaths += sum(r.log_ml == -np.inf for r in results)
            del results
            yield self.look()
            i += 1

    def look(self) -> Look:
        """Return the state of the process now."""
        gc.collect()
        kv, store = self.engine.memory(), self.model.store
        return Look(
            bytes=self.made,
            seconds=round(time.perf_counter() - self.started, 2),
            rss=resident(),
            tasks=len(asyncio.all_tasks()) - 1,
            threads=threading.active_count() - self.threads,
            objects=len(gc.get_objects()),
            contexts=len(self.engine.tree),
            entries=kv["entries"],
            kv_bytes=kv["bytes"],
            rows=len(store),
            row_bytes=store.nbytes,
            forwards=self.engine.counts.forwards,
            deaths=self.deaths,
        )


def resident() -> int:
    """Resident memory of this process, bytes (0 where the system does not say)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(looks: list[Look], of: str) -> float:
    """Least-squares growth of one figure for each byte generated, over the second half."""
    half = looks[len(looks) // 2 :]
    x = np.array([look.bytes for look in half], dtype=np.float64)
    y = np.array([getattr(look, of) for look in half], dtype=np.float64)
    return float(np.polyfit(x - x.mean(), y, 1)[0]) if len(half) > 1 else 0.0


def complaints(looks: list[Look]) -> list[str]:
    """Return what is wrong with a run, in words; nothing if all is well."""
    out = []
    row = 8 * (8192 + 256)
    for look in looks:
        if look.tasks or look.threads:
            out.append(f"{look.tasks} tasks and {look.threads} threads left at {look.bytes:,}")
        if look.kv_bytes > KV_BYTES:
            out.append(f"{look.kv_bytes:,} bytes of keys and values at {look.bytes:,}")
        if look.row_bytes > ROW_BYTES + SLACK_ROWS * row:
            out.append(f"{look.row_bytes:,} bytes of rows at {look.bytes:,}")
    if slope(looks, "rss") > SLOPE:
        out.append(f"resident memory rises by {slope(looks, 'rss'):.1f} bytes a byte")
    for name, most in (("objects", 0.02), ("contexts", 0.02)):
        if slope(looks, name) > most:
            out.append(f"{name} rise by {slope(looks, name):.3f} a byte")
    return out


def _held_out(size: int) -> list[bytes]:
    path = resources.files("genlm_bytes_smc.lm") / "tiny" / "heldout.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [text.encode()[:size] for text in texts if len(text) >= 20]


async def endure(sizes: Sizes, note: Callable[[Look], object] = lambda look: None) -> list[Look]:
    """Run all rounds; `note` is called after each."""
    looks = []
    async for look in Enduring(sizes).rounds():
        looks.append(look)
        note(look)
    return looks


def main(argv: list[str] | None = None) -> int:
    """Run, write `endurance.jsonl`, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=Sizes.n_bytes)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "endurance.jsonl").open("w") as file:

        def note(look: Look) -> None:
            print(json.dumps(asdict(look)), file=file, flush=True)
            print(
                f"\r{look.bytes:>9,} bytes  {look.seconds:6.0f} s  {look.rss / 2**20:5.0f} MiB  "
                f"{look.contexts:6,} contexts  {look.objects:,} objects",
                end="",
                file=sys.stderr,
                flush=True,
            )

        looks = asyncio.run(endure(Sizes(n_bytes=args.bytes), note))
    last, wrong = looks[-1], complaints(looks)
    print(file=sys.stderr)
    print(
        f"{last.bytes:,} bytes in {len(looks)} rounds and {last.seconds:.0f} s, {last.forwards:,} "
        f"forwards; resident memory {last.rss / 2**20:.0f} MiB, rising by "
        f"{slope(looks, 'rss'):.2f} bytes a byte over the second half; {last.deaths} runs died"
    )
    for line in wrong:
        print(f"FAILED: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
