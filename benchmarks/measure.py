"""The measurements of `benchmarks.beam`, each a function that returns records.

A record is one line of the table: what was measured on this package ("ours") and, where
there is one, on genlm-bytes 0.2.0 ("peer") in the same process, one right after the other.
Sizes are arguments throughout, so that the tests can run everything on minuscule ones.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genlm.bytes import BeamParams as PeerParams
from genlm.bytes import ByteBeamState as PeerBeam

from benchmarks.ngram import NgramLM, gpt2_tokens
from genlm_bytes_smc import BeamParams, ByteBeamState, ByteLanes, TokenTrie, Vocabulary, load_model
from genlm_bytes_smc.lm.transformer import TreeTransformer
from studies.texts import held_out, real_texts

K = 5
TINY_THRESHOLD = 0.05
CONTEXT = 100  # bytes read before decoding is timed


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    peer_seconds: float = 5.0  # of genlm-bytes, for each measurement that can be cut short
    ngram_tokens: int | None = None  # vocabulary of the n-gram LM; None: all 50,257
    ngram_bytes: int = 1000  # read or decoded over the n-gram LM
    trie_tokens: int | None = None
    prompt: int = 1000  # bytes of the model's prompt
    decoded: int = 200  # bytes decoded with the model
    lanes: int = 64
    steps: int = 50  # of the lanes
    long: int = 2000  # bytes of a long context, against CONTEXT
    repeats: int = 3  # of what is fast
    device: str = "cpu"  # of models


FULL = Sizes()
QUICK = Sizes(
    peer_seconds=1.0,
    ngram_tokens=8000,
    ngram_bytes=300,
    trie_tokens=20_000,
    prompt=150,
    decoded=60,
    steps=12,
    long=1000,
    repeats=1,
)


# Of a real model, whose forwards take all the time: less of everything, once.
REAL = Sizes(peer_seconds=20.0, prompt=500, decoded=60, steps=16, long=1000, repeats=1)


@dataclass
class Cost:
    """Cost of a byte (or of a step): seconds of wall and of processor time, and LM work."""

    wall: float
    cpu: float
    rows: float | None = None
    forwards: float | None = None


@dataclass
class Record:
    """One line of the table.

    Attributes:
        part: a..e.
        case: what was measured.
        unit: of `ours` and `peer`.
        ours, peer: the measured values; None: not measured.
        ratio: how many times better ours is (or, in part d, how many times dearer the harder
            case is), by wall time.
        goal: `ratio` should be at least this, or at most if `at_most`.
        cpu_ratio: `ratio` by processor time, which other programs on the machine disturb less.
        apart: largest difference of the two results, nats of log Z (see `check`).
        log_z: what it is a difference of.
        work: LM rows and forwards per byte, ours and the peer's, and other counts.
        threads: "1", or "default" for torch's own choice.
    """

    part: str
    case: str
    unit: str
    ours: float
    peer: float | None = None
    ratio: float | None = None
    goal: float | None = None
    at_most: bool = False
    cpu_ratio: float | None = None
    apart: float | None = None
    log_z: float | None = None
    work: dict[str, float] = field(default_factory=dict)
    threads: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self) | {"met": self.met})


def check(record: Record) -> None:
    """Raise if the two results differ by more than the peer's float32 sums explain.

    genlm-bytes sums 50k probabilities one after the other in float32, which loses up to
    5e-4 of each token's mass; over a text this adds up, in proportion to its length.
    """
    if record.apart is None:
        return
    allowed = max(1e-2, 1e-3 * abs(record.log_z or 0.0))
    if not record.apart <= allowed:
        raise AssertionError(
            f"{record.case}: log Z differs by {record.apart:.2e} nats, allowed {allowed:.2e}"
        )


class _Clock:
    """Wall and processor seconds inside a with block."""

    def __enter__(self) -> _Clock:
        gc.collect()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = self.now()

    def now(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


def _versus(ours: Cost, peer: Cost) -> dict[str, Any]:
    """Return the part of a record that compares two speeds in bytes a second."""
    work = {
        f"{name}_{what}": round(value, 3)
        for name, cost in (("ours", ours), ("peer", peer))
        for what, value in (("rows", cost.rows), ("forwards", cost.forwards))
        if value is not None
    }
    return {
        "unit": "bytes/s",
        "ours": 1 / ours.wall,
        "peer": 1 / peer.wall,
        "ratio": peer.wall / ours.wall,
        "cpu_ratio": peer.cpu / ours.cpu,
        "work": work,
    }


# -- the two sides, as one interface ---------------------------------------------------------


@dataclass
class Side:
    """One implementation over one model: a fresh beam, and counters of LM work.

    Attributes:
        beam: a beam that has read nothing.
        clear: drop every cache.
        rows, forwards: counts so far.
    """

    beam: Any
    clear: Callable[[], None]
    rows: Callable[[], int]
    forwards: Callable[[], int]

    async def prefill(self, text: bytes, seconds: float | None = None) -> tuple[Any, Cost, int]:
        """Read `text`, or as much of it as `seconds` allow: the beam, cost a byte, bytes."""
        self.clear()
        rows, forwards, beam = self.rows(), self.forwards(), self.beam
        with _Clock() as clock:
            if seconds is None:
                beam, n = await beam.prefill(text), len(text)
            else:  # reading piece by piece is the same as reading at once
                n, piece = 0, 4
                while n < len(text) and (n == 0 or clock.now()[0] < seconds):
                    beam = await beam.prefill(text[n : n + piece])
                    n += len(text[n : n + piece])
        return beam, self._cost(clock, n, rows, forwards), n

    async def loop(
        self, prompt: bytes, text: bytes, seconds: float | None = None
    ) -> tuple[Any, Cost, int]:
        """Distribution, prune, read for each byte of `text`, after `prompt`."""
        self.clear()
        beam = await self.beam.prefill(prompt)
        rows, forwards, n = self.rows(), self.forwards(), 0
        with _Clock() as clock:
            for byte in text:
                await beam.logp_next()
                beam = await (beam.prune() << byte)
                n += 1
                if seconds is not None and clock.now()[0] > seconds:
                    break
        return beam, self._cost(clock, n, rows, forwards), n

    async def greedy(self, prompt: bytes, steps: int) -> tuple[bytes, Cost]:
        """Read the likeliest byte, `steps` times, after `prompt`; return bytes and cost of one."""
        self.clear()
        beam = await self.beam.prefill(prompt)
        rows, forwards = self.rows(), self.forwards()
        with _Clock() as clock:
            out = await beam.greedy(b"", steps)
        return out, self._cost(clock, steps, rows, forwards)

    async def greedy_for(self, prompt: bytes, steps: int, seconds: float) -> tuple[bytes, Cost]:
        """As `greedy`, with as many of `steps` as about `seconds` allow."""
        tried = min(steps, 4)
        out, cost = await self.greedy(prompt, tried)
        fit = min(steps, int(seconds / cost.wall))
        return (out, cost) if fit <= tried else await self.greedy(prompt, fit)

    def _cost(self, clock: _Clock, n: int, rows: int, forwards: int) -> Cost:
        return Cost(
            clock.wall / n,
            clock.cpu / n,
            (self.rows() - rows) / n,
            (self.forwards() - forwards) / n,
        )


def _ours(beam: ByteBeamState) -> Side:
    engine, store = beam.lanes.model.engine, beam.lanes.model.store

    def clear() -> None:
        store.clear()
        if hasattr(engine, "memory"):  # an engine with keys and values of its own
            engine.clear_cache()

    return Side(beam, clear, lambda: engine.counts.rows, lambda: engine.counts.forwards)


async def _best(repeats: int, act: Callable[[], Awaitable[tuple[Any, ...]]]) -> tuple[Any, ...]:
    """Return what `act` returned on its run of median wall time; its second item is a Cost."""
    runs = sorted([await act() for _ in range(repeats)], key=lambda r: r[1].wall)
    return runs[len(runs) // 2]


# -- a: the engine alone ----------------------------------------------------------------------


async def engine_alone(lm: NgramLM, sizes: Sizes) -> list[Record]:
    """Prefill, the loop and greedy decoding over an LM whose rows cost microseconds.

    Each side is measured with nothing left of the other: genlm-bytes keeps a task while it is
    in use, for whose requests ours would wait.
    """
    out = []
    text = lm.held_out
    prompt, rest = text[:32], text[32 : 32 + sizes.ngram_bytes]
    for threshold, goal in ((0.0, 100.0), (0.05, 300.0)):
        theirs = await _peer_alone(lm, threshold, sizes)
        beam = await ByteBeamState.initial(lm, BeamParams(K=K, prune_threshold=threshold))
        ours = _ours(beam)
        await ours.loop(prompt, rest[:20])  # compile
        where = f"threshold {threshold:g}"

        read, cost, n = theirs.prefill
        same, _, _ = await ours.prefill(text[:n])
        _, mine, _ = await _best(sizes.repeats, lambda o=ours: o.prefill(text[: sizes.ngram_bytes]))
        out.append(_agreed("prefill", where, goal, mine, cost, same.logZ, read, n))

        read, cost, n = theirs.loop
        same, _, _ = await ours.loop(prompt, rest[:n])
        _, mine, _ = await _best(sizes.repeats, lambda o=ours: o.loop(prompt, rest))
        out.append(_agreed("loop", where, goal, mine, cost, same.logZ, read, n))

        decoded, cost = theirs.greedy
        spelled, mine = await _best(
            sizes.repeats, lambda o=ours: o.greedy(prompt, sizes.ngram_bytes)
        )
        record = Record("a", f"greedy, {where}", goal=goal, **_versus(mine, cost))
        record.work |= _agreeing(spelled, decoded)
        out.append(record)
    return out


@dataclass
class _PeerAlone:
    """What genlm-bytes took: log Z of what was read, cost of a byte and bytes; or what it decoded
    and cost of a byte."""

    prefill: tuple[float, Cost, int]
    loop: tuple[float, Cost, int]
    greedy: tuple[bytes, Cost]


async def _peer_alone(lm: NgramLM, threshold: float, sizes: Sizes) -> _PeerAlone:
    """Measure the peer's side of `engine_alone` at one threshold."""
    text = lm.held_out
    prompt, rest = text[:32], text[32 : 32 + sizes.ngram_bytes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors are "in beta"
        beam = await PeerBeam.initial(lm, PeerParams(K=K, prune_threshold=threshold))
        peer = Side(beam, lambda: None, lambda: lm.calls, lambda: lm.calls)
        await peer.prefill(prompt[:1])
        read, cost, n = await peer.prefill(text[: sizes.ngram_bytes], sizes.peer_seconds)
        prefill = float(read.logZ), cost, n
        read, cost, n = await peer.loop(prompt, rest, sizes.peer_seconds)
        loop = float(read.logZ), cost, n
        greedy = await peer.greedy_for(prompt, sizes.ngram_bytes, sizes.peer_seconds)
        await beam.cleanup()
    return _PeerAlone(prefill, loop, greedy)


def _agreed(
    what: str, where: str, goal: float, mine: Cost, cost: Cost, a: float, b: float, n: int
) -> Record:
    record = Record("a", f"{what}, {where}", goal=goal, **_versus(mine, cost))
    record.apart, record.log_z = abs(a - b), b
    record.work["peer_bytes"] = n
    check(record)
    return record


def _agreeing(ours: bytes, peer: bytes) -> dict[str, float]:
    """How many bytes the peer decoded, and how many of them ours are the same."""
    same = next((i for i, (x, y) in enumerate(zip(ours, peer, strict=False)) if x != y), len(peer))
    return {"peer_bytes": len(peer), "same_bytes": same}


# -- b: the trie ------------------------------------------------------------------------------


def trie_of(side: str, n_tokens: int | None) -> dict[str, float]:
    """Build one side's trie: seconds of wall and processor time, memory taken, in bytes.

    Memory is what the process grew by, so call it in a fresh process.
    """
    from genlm.backend.tokenization.token import Token
    from genlm.bytes.trie import TokenByteTrie

    tokens = [Token(i, t) for i, t in enumerate(gpt2_tokens()[:n_tokens])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # First uses of libraries, so that they are not counted.
        few = tokens[:300]
        if side == "ours":
            TokenTrie.build(Vocabulary.from_tokens(few))
        else:
            TokenByteTrie(few)
        gc.collect()
        before = _resident()
        with _Clock() as clock:
            if side == "ours":
                trie = TokenTrie.build(Vocabulary.from_tokens(tokens))
            else:
                trie = TokenByteTrie(tokens)
        gc.collect()
        grown = max(0, _resident() - before)
    out = {"wall": clock.wall, "cpu": clock.cpu, "bytes": grown}
    if side == "ours":
        vocab = trie.vocab
        out["array_bytes"] = trie.nbytes + vocab.buffer.nbytes + vocab.offsets.nbytes
    return out


def trie_records(ours: dict[str, float], peer: dict[str, float]) -> list[Record]:
    """Return records of what `trie_of` measured for each side."""
    # An allocator that reuses memory can make growth look smaller than what is held.
    held = max(ours["bytes"], ours["array_bytes"])
    return [
        Record(
            "b", "trie, time to build", "s", ours["wall"], peer["wall"],
            ratio=peer["wall"] / ours["wall"], goal=20.0, cpu_ratio=peer["cpu"] / ours["cpu"],
        ),
        Record(
            "b", "trie, memory", "MB", held / 1e6, peer["bytes"] / 1e6,
            ratio=peer["bytes"] / held, goal=10.0,
            work={"array_mb": round(ours["array_bytes"] / 1e6, 3)},
        ),
    ]  # fmt: skip


def _resident() -> int:
    """Memory of this process in bytes; the largest so far where the present is unknown."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# -- c: a model ---------------------------------------------------------------------


def heldout_text(n: int, model: str = "tiny") -> bytes:
    """Join at least `n` bytes of prose that the model was not trained on, in whole texts."""
    prose = held_out()["story"] if model == "tiny" else real_texts()["prose"]
    out = b""
    for one in prose:
        out += one + b"\n\n"
        if len(out) >= n:
            return out
    raise ValueError(f"the held-out texts have {len(out)} bytes, {n} are needed")


def licence(n: int) -> bytes:
    """`n` bytes unlike what the bundled model was trained on, often cut into other tokens than
    the tokenizer's."""
    return Path(__file__).parents[1].joinpath("LICENSE").read_bytes()[:n]


def _loaded(name: str, device: str = "cpu") -> TreeTransformer:
    """Load a model of its own, in float32."""
    engine = load_model(name, device=device, dtype=torch.float32)
    assert isinstance(engine, TreeTransformer)
    return engine


def _peer_model(name: str = "tiny", device: str = "cpu") -> tuple[Any, dict[str, int]]:
    """Give a model to genlm-backend's own transformer; also return counters of its work."""
    from genlm.backend.llm import AsyncTransformer

    loaded = _loaded(name, device)
    model = loaded.model
    llm = AsyncTransformer(model, loaded.tokenizer)
    counts = {"forwards": 0, "rows": 0}
    run = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts["forwards"] += 1
        counts["rows"] += int(args[0].shape[0])
        return run(*args, **kwargs)

    model.forward = counted
    return llm, counts


async def one_model(sizes: Sizes, name: str = "tiny") -> list[Record]:
    """Prefill and decoding of a model, against genlm-bytes over genlm-backend."""
    text = heldout_text(max(sizes.prompt, CONTEXT), name)
    prompt, context = text[: sizes.prompt], text[: min(CONTEXT, sizes.prompt)]
    goals = (50.0, 8.0) if name == "tiny" else (None, None)
    params = BeamParams(K=K, prune_threshold=TINY_THRESHOLD)
    ours = _ours(await ByteBeamState.initial(_loaded(name, sizes.device), params))
    llm, counts = _peer_model(name, sizes.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = Side(
            await PeerBeam.initial(llm, PeerParams(K=K, prune_threshold=TINY_THRESHOLD)),
            llm.clear_cache,
            lambda: counts["rows"],
            lambda: counts["forwards"],
        )
        await ours.greedy(context[:20], 5)
        await peer.prefill(context[:3])

        prefills = [
            await _prefilled(ours, peer, read, case, sizes, goals[0])
            for read, case in (
                (prompt, f"prefill of {sizes.prompt:,} bytes"),
                (licence(sizes.prompt), "the same, of a licence"),
            )
        ]

        theirs, dear = await peer.greedy_for(context, sizes.decoded, 2 * sizes.peer_seconds)
        mine, cheap = await _best(sizes.repeats, lambda: ours.greedy(context, sizes.decoded))
        decode = Record("c", "greedy decoding", goal=goals[1], **_versus(cheap, dear))
        decode.work |= _agreeing(mine, theirs)
        await peer.beam.cleanup()
    return [*prefills, decode, *_lm_work(prefills[0], decode)]


async def _prefilled(
    ours: Side, peer: Side, text: bytes, case: str, sizes: Sizes, goal: float | None
) -> Record:
    theirs, dear, _ = await peer.prefill(text)
    mine, cheap, _ = await _best(sizes.repeats, lambda: ours.prefill(text))
    record = Record("c", case, goal=goal, **_versus(cheap, dear))
    record.apart, record.log_z = abs(mine.logZ - theirs.logZ), theirs.logZ
    check(record)
    return record


def _lm_work(*records: Record) -> list[Record]:
    """Part e: what the records of part c asked of the model."""
    return [
        Record("e", f"{what}, {r.case}", "per byte", ours, peer, ratio=peer / ours)
        for r in records
        for what in ("forwards", "rows")
        if (ours := r.work[f"ours_{what}"]) and (peer := r.work[f"peer_{what}"])
    ]


# -- d: many lanes, and long contexts ---------------------------------------------------------


async def lanes_and_length(sizes: Sizes, name: str = "tiny") -> list[Record]:
    """Many lanes against one, and a byte late in a text against one early."""
    engine = _loaded(name, sizes.device)
    params = BeamParams(K=K, prune_threshold=TINY_THRESHOLD)
    start = await ByteBeamState.initial(engine, params)
    side = _ours(start)
    text = heldout_text(sizes.long, name)
    prompt = text[:CONTEXT]
    await _sampled(side, prompt, 2, 3, seed=0)

    one = [await _sampled(side, prompt, 1, sizes.steps, seed=s) for s in range(sizes.repeats)]
    many = [
        await _sampled(side, prompt, sizes.lanes, sizes.steps, seed=s) for s in range(sizes.repeats)
    ]
    early = [await _sampled(side, prompt, 1, 2 * sizes.steps, seed=s) for s in range(sizes.repeats)]
    late = [
        await _sampled(side, text[: sizes.long], 1, 2 * sizes.steps, seed=s)
        for s in range(sizes.repeats)
    ]
    many_work = _mid(many).work
    return [
        _dearer(f"{sizes.lanes} lanes, time of a step", "against 1 lane", many, one, 10.0),
        _dearer(f"a byte after {sizes.long:,}", f"against after {CONTEXT}", late, early, 3.0),
        Record(
            "e", f"forwards, {sizes.lanes} lanes", "per step", many_work["forwards"],
            work=many_work,
        ),
        Record("e", f"rows, {sizes.lanes} lanes", "per lane and byte", many_work["rows"]),
        Record("e", f"memory, {sizes.lanes} lanes", "kB per lane", many_work["lane_kb"]),
        Record(
            "e", f"keys and values, {sizes.lanes} lanes", "kB per lane", many_work["cache_kb"]
        ),
    ]  # fmt: skip


@dataclass
class _Steps:
    """Seconds a step, wall and processor, and what it asked of model and memory."""

    wall: float
    cpu: float
    work: dict[str, float]


def _mid(runs: list[_Steps]) -> _Steps:
    return sorted(runs, key=lambda r: r.wall)[len(runs) // 2]


def _dearer(case: str, against: str, hard: list[_Steps], easy: list[_Steps], goal: float) -> Record:
    a, b = _mid(hard), _mid(easy)
    return Record(
        "d", f"{case} ({against})", "ms", 1e3 * a.wall, 1e3 * b.wall,
        ratio=a.wall / b.wall, goal=goal, at_most=True, cpu_ratio=a.cpu / b.cpu, work=a.work,
    )  # fmt: skip


async def _sampled(side: Side, prompt: bytes, n: int, steps: int, seed: int) -> _Steps:
    """`n` lanes that each draw `steps` bytes of their own after one prompt."""
    side.clear()
    beam: ByteBeamState = await side.beam.prefill(prompt)
    lanes: ByteLanes = beam.lanes.gather(np.zeros(n, dtype=np.int64))
    engine = lanes.model.engine
    rng = np.random.default_rng(seed)
    rows, forwards = side.rows(), side.forwards()
    with _Clock() as clock:
        for _ in range(steps):
            p = np.exp((await lanes.logp_next()).numpy())
            edges = p.cumsum(axis=1)
            drawn = (edges < rng.random((n, 1)) * edges[:, -1:]).sum(axis=1)
            lanes = await lanes.step(np.minimum(drawn, 256))
    work = {
        "forwards": (side.forwards() - forwards) / steps,
        "rows": (side.rows() - rows) / (steps * n),
        "lane_kb": lanes.nbytes / n / 1e3,
        "cache_kb": engine.memory()["bytes"] / n / 1e3,
    }
    return _Steps(clock.wall / steps, clock.cpu / steps, work)
