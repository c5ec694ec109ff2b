"""The measurements of `benchmarks.gpu`, each a function of an engine and a size."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_forward import COMPILED, WAYS
from benchmarks.gpu_models import Mixed, wait_for
from benchmarks.gpu_stages import MIX, STAGES, Stages, Waits
from genlm_bytes_smc import BeamParams, ByteBeamState
from genlm_bytes_smc.beam.params import default_params
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import SMCState, smc_steps

PATTERN = r"[A-Za-z0-9 ,.;:'\"()=_*/<>\[\]\n-]+"
TOP, DEFAULT = "K=5, threshold 0.05", "default"
ON_HOST = f"{DEFAULT}, constraint on the CPU"
PARTS = ("agreement", "forward", "text", "particles", "prompts", "context")
APART = 1e-4  # nats by which two devices may differ in float32
_WARM_UPS = 4  # at most
_WATCHED_STEPS = 4  # steps or bytes in which waits are counted


@dataclass(frozen=True)
class Sizes:
    """How much to measure.

    Attributes:
        positions: of a forward.
        particles: the sizes with the constraint on the device, the most important first.
        on_host: the sizes with the constraint on the CPU.
        prompts: bytes read.
        contexts: bytes of prompt before a step of `context_particles` particles.
        text: bytes drawn.
        steps: of particles.
        seconds: a timed loop at most, roughly.
        before: bytes of the prompt elsewhere.
        repeats: of a forward.
        copied: bytes of the copy whose time says what memory's bandwidth is.
    """

    positions: Sequence[int] = (64, 1, 16, 256, 1024)
    particles: Sequence[int] = (64, 1024, 1, 16, 256)
    on_host: Sequence[int] = (64, 1024)
    prompts: Sequence[int] = (500, 2000, 8000)
    contexts: Sequence[int] = (100, 1000, 8000)
    context_particles: int = 64
    compiled: int = 64
    text: int = 300
    steps: int = 32
    seconds: float = 2.0
    before: int = 100
    repeats: int = 7
    copied: int = 1 << 30


QUICK_SIZES = Sizes(
    positions=(4, 1), particles=(8, 1), on_host=(8,), prompts=(40, 120), contexts=(30, 120),
    context_particles=8, compiled=4, text=16, steps=8, seconds=1.0, before=30, repeats=2,
    copied=1 << 24,
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One measurement, or why there is none.

    Attributes:
        part: of `PARTS`, or "copies".
        model: which shape.
        case: which pruning, or which way of a forward; "" where there is one only.
        size: positions, particles or bytes.
        values: what was measured, by name. Times (`ms`) are of a forward, byte or step; so are
            `rows`, `forwards`, `positions`, `waits`, `waits_inside` (the forward) and `mix_ms`.
            `rate` is bytes or particle-bytes a second; `inside` the share of a step's time
            inside the forward; `floor_ms` what reading all weights once takes; `peak_bytes`
            the most memory of the device, weights included and what the part's measurements
            before it have allotted.
        problem: "failed: ..." or "skipped: ..."; "" if it was measured.
    """

    part: str
    model: str
    case: str
    size: int
    values: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    def line(self) -> dict[str, Any]:
        """Return it as an object of JSON, times and rates with six digits."""
        values = {k: float(f"{v:.6g}") for k, v in self.values.items()}
        return asdict(replace(self, values=values))


def cases(part: str, sizes: Sizes, *, compiles: bool) -> list[tuple[str, int]]:
    """Return the cases of one part and their sizes, the most important first.

    Args:
        part: of `PARTS`.
        sizes: how much to measure.
        compiles: whether the forward is also measured as `torch.compile` makes it.
    """
    both = (TOP, DEFAULT)
    if part == "forward":
        out = [(way, n) for n in sizes.positions for way in WAYS]
        return [*out, (COMPILED, sizes.compiled)] if compiles else out
    if part == "particles":
        out = [(case, n) for n in sizes.particles[:2] for case in both]
        out += [(ON_HOST, n) for n in sizes.on_host]
        return out + [(case, n) for n in sizes.particles[2:] for case in both]
    if part == "prompts":
        return [(case, n) for n in sizes.prompts for case in both]
    if part == "context":
        return [(DEFAULT, n) for n in sizes.contexts]
    return [(case, sizes.text if part == "text" else 16) for case in both]


def params_of(case: str) -> BeamParams:
    """Return the parameters of a case's beams."""
    return BeamParams(K=5, prune_threshold=0.05) if case == TOP else default_params()


# -- agreement with the CPU ------------------------------------------------------------------


async def agreement(here: Mixed, there: Mixed, text: bytes, case: str) -> dict[str, float]:
    """Compare rows, a beam and a run of particles of one model on two devices.

    Args:
        here: the model in float32 on the device.
        there: the same on the CPU.
        text: what is read, of 90 bytes at least.
        case: of the pruning.

    Returns:
        `apart`, the largest difference of log probabilities and log weights, nats.

    Raises:
        AssertionError: it is more than `APART`, or texts differ.
    """
    (one, texts), (other, others) = [await _everything(e, text, case) for e in (here, there)]
    with np.errstate(invalid="ignore"):
        gaps = [np.where(a == b, 0.0, np.abs(a - b)) for a, b in zip(one, other, strict=True)]
    apart = max(float(np.max(gap)) for gap in gaps)
    if not apart <= APART or texts != others:
        raise AssertionError(
            f"{case}: {here.device} and the CPU differ by {apart:.2e} nats, and "
            f"{sum(a != b for a, b in zip(texts, others, strict=True))} of {len(texts)} texts"
        )
    return {"apart": apart}


async def _everything(
    engine: Mixed, text: bytes, case: str
) -> tuple[list[np.ndarray], list[bytes]]:
    """Return the numbers to compare (rows, the beam's, particles' weights), and texts."""
    contexts = [[*engine.start, *engine.tokenizer.encode(text[:n].decode())] for n in (0, 9, 90)]
    rows = engine.batch_next_token_logprobs_sync(contexts)[:, : len(engine.byte_vocab)]
    engine.forget()
    lanes = (await (await ByteBeamState.initial(engine, params_of(case))).prefill(text)).lanes
    following = await lanes.logp_next()
    state, _ = await _run(engine, text[:40], case, 16, 12, np.inf)
    numbers = [rows.cpu().numpy(), lanes.log_z, following.cpu().numpy()]
    return [*numbers, state.particles.log_weights], state.particles.texts()


# -- speed -----------------------------------------------------------------------------------


async def one_text(
    engine: Mixed, prompt: bytes, case: str, sizes: Sizes, floor: float
) -> dict[str, float]:
    """Draw one text byte by byte.

    Args:
        engine: the model.
        prompt: what the text comes after.
        case: of the pruning.
        sizes: how many bytes and seconds.
        floor: seconds that reading all weights takes.

    Returns:
        See `Record`; `over_floor` is the time of a byte over that of its forwards' floor.
    """
    await _warm(engine, lambda: _draw(engine, prompt, case, sizes, sizes.seconds))
    out = await _draw(engine, prompt, case, sizes, sizes.seconds)
    with Stages(engine.device) as stages:
        split = await _draw(engine, prompt, case, sizes, sizes.seconds / 2, watched=stages)
    with Waits(engine.device) as waits:
        await _draw(engine, prompt, case, replace(sizes, text=_WATCHED_STEPS), np.inf, waits)
    out["over_floor"] = out["ms"] / (1e3 * floor * out["forwards"]) if out["forwards"] else np.inf
    out |= _waits(waits, _WATCHED_STEPS, engine.device)
    mix = 1e3 * stages.seconds[MIX] / split["bytes"]
    return out | {"inside": stages.inside, "mix_ms": mix, "floor_ms": 1e3 * floor}


async def _draw(
    engine: Mixed,
    prompt: bytes,
    case: str,
    sizes: Sizes,
    seconds: float,
    watched: Stages | Waits | None = None,
) -> dict[str, float]:
    engine.forget()
    lanes = (await (await ByteBeamState.initial(engine, params_of(case))).prefill(prompt)).lanes
    rng = np.random.default_rng(1)
    _restart(watched)
    clock, made = Clock(engine), 0
    while made < sizes.text and clock.seconds < seconds:
        row = (await lanes.logp_next())[0].cpu().numpy()
        p = np.exp(row[:256])
        lanes = await lanes.step([int(rng.choice(256, p=p / p.sum()))])
        made += 1
    return clock.values(made, made) | {"bytes": made}


async def particles(
    engine: Mixed, prompt: bytes, case: str, n: int, sizes: Sizes, floor: float
) -> dict[str, float]:
    """Run n particles of text that a regular expression admits.

    The run is repeated with equal seeds: until no forward is recorded any more (four times at
    most), once for the clock, once with a wait for the device around each stage, and its first
    steps to count waits.
    """
    steps, seconds = sizes.steps, sizes.seconds
    await _warm(engine, lambda: _run(engine, prompt, case, n, steps, 2 * seconds))
    _, out = await _run(engine, prompt, case, n, steps, seconds)
    with Stages(engine.device) as stages:
        state, _ = await _run(engine, prompt, case, n, steps, seconds / 2, stages)
    out |= {f"{name}_ms": 1e3 * stages.seconds[name] / state.step for name in (*STAGES, MIX)}
    with Waits(engine.device) as waits:
        await _run(engine, prompt, case, n, _WATCHED_STEPS, np.inf, waits)
    out |= _waits(waits, _WATCHED_STEPS, engine.device)
    return out | {"inside": stages.inside, "floor_ms": 1e3 * floor}


async def context(
    engine: Mixed, prompt: bytes, case: str, n: int, sizes: Sizes
) -> dict[str, float]:
    """Run n particles after a prompt, half as many steps as elsewhere."""
    steps = sizes.steps // 2
    await _warm(engine, lambda: _run(engine, prompt, case, n, steps, sizes.seconds))
    _, out = await _run(engine, prompt, case, n, steps, sizes.seconds)
    return out


async def _run(
    engine: Mixed,
    prompt: bytes,
    case: str,
    n: int,
    steps: int,
    seconds: float,
    watched: Stages | Waits | None = None,
) -> tuple[SMCState, dict[str, float]]:
    """Return particles after some steps, and what was measured since they had read the prompt."""
    engine.forget()
    llm = ByteLLM(engine, params_of(case), prompt=prompt)
    await llm.prompt_weight()  # reads the prompt
    device = torch.device("cpu") if case == ON_HOST else engine.device
    # Texts end without a weight, at any length: it is steps that are measured.
    run = smc_steps(
        llm * ByteRegex(PATTERN, device=device),
        n, 0.5, 4 * steps, seed=1, terminate_when=lambda t: False,
    )  # fmt: skip
    _restart(watched)
    clock = Clock(engine)
    async for state in run:
        if state.step >= steps or (state.step and clock.seconds > seconds):
            break
    values = clock.values(int(state.particles.length.sum()), state.step)
    await run.aclose()
    lanes = float(np.mean([step.lanes for step in state.history]))
    return state, values | {"lanes": lanes, "steps": state.step}


async def prompt(engine: Mixed, text: bytes, case: str) -> dict[str, float]:
    """Read a text that is known."""

    async def read() -> dict[str, float]:
        engine.forget()
        clock = Clock(engine)
        await (await ByteBeamState.initial(engine, params_of(case))).prefill(text)
        return clock.values(len(text), len(text))

    await _warm(engine, read)
    return await read()


async def _warm(engine: Mixed, work: Callable[[], Awaitable[object]]) -> None:
    """Do some work until nothing is compiled, allotted or recorded for it any more.

    Forwards are recorded the second time that a number of positions occurs, and again after keys
    and values have moved; each recording takes as long as several forwards.
    """
    for _ in range(_WARM_UPS):
        before = engine.recorded
        await work()
        if engine.recorded == before:
            break


class Clock:
    """Time, counts and memory since it was made."""

    def __init__(self, engine: Mixed) -> None:
        self._engine = engine
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)
        wait_for(engine.device)
        engine.counts.reset()
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since, of the host."""
        return time.perf_counter() - self._start

    def values(self, made: int, steps: int) -> dict[str, float]:
        """Return what `Record` describes, for `made` bytes in `steps` steps."""
        device, counts = self._engine.device, self._engine.counts
        wait_for(device)
        seconds = self.seconds
        out: dict[str, float] = {
            "rate": made / seconds,
            "ms": 1e3 * seconds / steps,
            "rows": counts.rows / steps,
            "forwards": counts.forwards / steps,
            "positions": counts.positions / steps,
        }
        if device.type == "cuda":
            out["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        return out


def _restart(watched: Stages | Waits | None) -> None:
    """Have what is watched begin here."""
    if watched is not None:
        watched.restart()


def _waits(waits: Waits, steps: int, device: torch.device) -> dict[str, float]:
    """Return waits a step; nobody waits for a CPU."""
    if device.type == "cpu":
        return {}
    return {"waits": waits.outside / steps, "waits_inside": waits.inside / steps}
