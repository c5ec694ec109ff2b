"""Reading one symbol in every particle: draw it and weigh it.

`advance` is importance sampling of one symbol; `replay` repeats it over texts that are known in
part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.smc.frontier import Frontier
from genlm_bytes_smc.smc.lanes import BadWeightError, Rows
from genlm_bytes_smc.smc.particles import NO_SYMBOL, Particles, SaltArray
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.weighers import Reads


class Advance(NamedTuple):
    """One symbol more in every particle.

    Attributes:
        before, after: the frontier then, and at the texts of those that are still active (lanes
            of others that weighers ended or killed are there still).
        rows: what the symbols were drawn from.
        symbols: int64[N], -1 for a particle that read nothing.
        log_weights: float64[N], what target and proposal make of them, nats.
        particles: the particles that have read them, weighed.
    """

    before: Frontier
    after: Frontier
    rows: Rows
    symbols: IntArray
    log_weights: FloatArray
    particles: Particles


async def advance(
    particles: Particles,
    frontier: Frontier,
    step: int,
    uniform: FloatArray,
    forced: IntArray | None = None,
    *,
    score: bool = False,
    rows: Rows | None = None,
) -> Advance:
    """Read and weigh one symbol in every active particle.

    Args:
        particles: N of them; the active ones have read `step` bytes.
        frontier: at their texts.
        step: how many bytes.
        uniform: float64[N], in [0, 1), one a particle.
        forced: int64[N], what to read instead of drawing it, -1 where to draw.
        score: weigh what is forced by the target's rows alone, not by target / proposal.
        rows: of the frontier, where they are known.
    """
    rows, weighers = rows or await frontier.rows(), frontier.plan.weighers
    symbols, log_weights = _propose(particles, frontier, step, rows, uniform, forced, score)
    going = (symbols >= 0) & (log_weights > -np.inf)
    ended = await frontier.ending(rows, going & (symbols == EOS_COLUMN))
    if ended is not None:
        log_weights = log_weights + ended
    going &= symbols != EOS_COLUMN
    after, revision = await frontier.step(rows, symbols, going)
    if revision is not None:
        log_weights = log_weights + revision
        after = after.on(np.where(log_weights > -np.inf, after.lane_of, -1))
    particles = particles.untwisted(frontier.lane_of >= 0).read(symbols, log_weights)
    if weighers:
        reads = Reads(step + 1, frontier.lane_of, symbols, rows, frontier.lanes)
        for weigher in weighers:
            particles = await weigher.weigh(particles, reads)
        after = after._replace(lane_of=np.where(particles.active, after.lane_of, -1))
    return Advance(frontier, after, rows, symbols, log_weights, particles)


def _propose(
    particles: Particles,
    frontier: Frontier,
    step: int,
    rows: Rows,
    uniform: FloatArray,
    forced: IntArray | None,
    score: bool,
) -> tuple[IntArray, FloatArray]:
    """Return the next symbol of each active particle, the end at the length limit, and its
    weight as rows have it."""
    at = np.flatnonzero(frontier.lane_of >= 0)
    lanes = frontier.lane_of[at]
    symbols = np.full(len(frontier.lane_of), NO_SYMBOL, dtype=np.int64)
    log_weights = np.zeros(len(frontier.lane_of))
    full = particles.length[at] >= frontier.plan.max_bytes
    if full.all():
        pass
    elif score and forced is not None:
        symbols[at] = forced[at]
        log_weights[at] = rows.target.cpu().numpy()[lanes, forced[at]]
    else:
        given = () if forced is None else (forced[at],)
        symbols[at], log_weights[at] = draw(rows, lanes, uniform[at], *given)
    if full.any():
        symbols[at[full]] = EOS_COLUMN
        log_weights[at[full]] = rows.target[:, EOS_COLUMN].cpu().numpy()[lanes[full]]
    if not (log_weights < np.inf).all():  # nor is NaN
        raise _bad_rows(particles, frontier, rows)
    return symbols, log_weights


def draw(
    rows: Rows, lanes: IntArray, uniform: FloatArray, forced: IntArray | None = None
) -> tuple[IntArray, FloatArray]:
    """Draw the next symbol of A particles and weigh it.

    Without a proposal a symbol comes from the normalised target row and its weight is the
    row's total; with one, from the normalised proposal row q, weighted target / q.

    Args:
        rows: of D lanes.
        lanes: int64[A], each particle's lane.
        uniform: float64[A], in [0, 1).
        forced: int64[A], symbols to read instead of drawing one, -1 where to draw. They get
            the weight that they would have if drawn.

    Returns:
        symbols int64[A] (0..256) and log weights float64[A], nats: -inf where a row holds
        nothing.
    """
    q = rows.target if rows.proposal is None else rows.proposal
    top = q.amax(dim=1).clamp_(min=torch.finfo(q.dtype).min)  # finite for an empty row
    run = torch.exp(q - top[:, None]).cumsum(1)
    total = top + torch.log(run[:, -1])
    at = send(lanes, q.device)
    run = run[at]
    point = send(uniform, q.device) * run[:, -1]
    symbol = torch.searchsorted(run, point[:, None], right=True)[:, 0].clamp_(max=EOS_COLUMN)
    log_weight = total[at]
    if forced is not None:
        given = torch.from_numpy(forced).to(q.device)
        symbol = torch.where(given >= 0, given, symbol)
        impossible = torch.isneginf(rows.target[at, symbol])
        log_weight = torch.where(impossible, -torch.inf, log_weight)
    if rows.proposal is not None:
        ratio = rows.target[at, symbol] - (q[at, symbol] - log_weight)
        log_weight = torch.where(torch.isneginf(log_weight), log_weight, ratio)
    if symbol.device.type == "cpu":
        return symbol.numpy(), log_weight.numpy()
    symbols, log_weights = torch.stack([symbol.double(), log_weight]).cpu().numpy()  # waits once
    return symbols.astype(np.int64), log_weights


class Replay(NamedTuple):
    """Particles that have read on as they were told.

    Attributes:
        particles: their weights are those of the symbols read here.
        frontier: at their texts.
        symbols_read: int64[N], how many symbols each has read here.
    """

    particles: Particles
    frontier: Frontier
    symbols_read: IntArray


async def replay(
    plan: Plan,
    particles: Particles,
    beam_seeds: Sequence[int | None],
    steps: Iterable[int],
    forced: Callable[[int], IntArray],
    uniform: Callable[[int], FloatArray] | None = None,
    salt: Callable[[int], SaltArray] | None = None,
    *,
    score: bool = False,
) -> Replay:
    """Read on with particles whose next symbols are known, or are drawn where they are not.

    Args:
        plan: of the run.
        particles: the active ones have read as many bytes as the first of `steps` says.
        beam_seeds: see `Frontier.start`.
        steps: how many bytes active particles have read before each symbol. Where nothing is
            drawn, it ends once no particle reads on.
        forced: gives for a step the symbols to read, int64[N], -1 where to draw.
        uniform: gives for a step numbers in [0, 1), float64[N]; None: nothing is drawn.
        salt: gives for a number of bytes the keys of the beams' next draws, uint64[N].
        score: see `advance`.
    """
    frontier = await Frontier.start(plan, particles, beam_seeds)
    count = np.zeros(len(particles.length), dtype=np.int64)
    none = np.zeros(len(count))
    for step in steps:
        if uniform is None and not particles.active.any():
            break
        numbers = none if uniform is None else uniform(step)
        read = await advance(particles, frontier, step, numbers, forced(step), score=score)
        count += frontier.lane_of >= 0
        particles = read.particles if salt is None else read.particles.salted(salt(step + 1))
        frontier = moved(read.after, particles)
    return Replay(particles, frontier, count)


def settled(frontier: Frontier, particles: Particles) -> tuple[Frontier, bool]:
    """Let particles wait that have come to an end in a string of `resample_at`, until all have.

    Args:
        frontier: after reading.
        particles: after reading.

    Returns:
        The frontier, with those apart that wait; and whether any particle is still on its way.
    """
    strings = frontier.plan.resample_at
    if not strings:
        return frontier, False
    there = particles.end_in(strings)
    if (particles.active & ~there).any():
        waits = there & particles.active & (frontier.lane_of >= 0)
        return frontier.parting(waits), True
    return frontier.reunited(), False


def moved(frontier: Frontier, particles: Particles, ancestors: IntArray | None = None) -> Frontier:
    """Return the frontier after reading at the particles that go on.

    Args:
        frontier: after reading.
        particles: after resampling, with salts for the beams' next draws if they have any.
        ancestors: int64[N], the particle whose lane each takes (None: its own).
    """
    lane_of = frontier.lane_of if ancestors is None else frontier.lane_of[ancestors]
    if particles.salt is not None:
        return frontier.on(lane_of, particles.salt[:, -1])
    every = ancestors is None and not frontier.plan.weighers
    return frontier if every else frontier.on(lane_of)


def _bad_rows(particles: Particles, frontier: Frontier, rows: Rows) -> BadWeightError:
    """Return the error for rows with NaN or +inf; it names the first factor that has one."""
    named = [
        *zip(frontier.plan.names, rows.blocks, strict=True),
        ("the target as a whole", rows.target),
    ]
    for name, block in named:
        bad = (block.isnan() | block.isposinf()).cpu().numpy()
        if bad.any():
            lane, symbol = np.argwhere(bad)[0].tolist()
            text = particles.texts()[np.flatnonzero(frontier.lane_of == lane)[0]]
            what = "the end" if symbol == EOS_COLUMN else f"the byte {bytes([symbol])!r}"
            return BadWeightError(f"{name} gave {block[lane, symbol]} to {what} after {text!r}")
    return BadWeightError("the proposal gave NaN or +inf")
