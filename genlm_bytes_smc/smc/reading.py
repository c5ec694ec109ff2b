"""Reading one symbol in every particle, and texts that are known in part once more.

`advance` is importance sampling of one symbol: draw it and weigh it. `replay` repeats it over
texts that are known in part. `rejuvenate` (`Suffix`) moves particles by it:

Resampling leaves copies; a move that keeps the current target invariant makes them differ
again (resample-move: Gilks & Berzuini 2001, JRSS-B 63:127). The move here is one of
Metropolis-Hastings that re-proposes the end of a text. For a particle that has read the symbols
x_1..x_T (T = t for an active one at step t; the end of an ended one counts as a symbol):

- draw a cut c among the last min(w, T) symbols, 0 <= c < T, all equally likely;
- draw x'_{c+1}.. from the proposal q until t symbols are read or the text ends; it has T' symbols;
- take x' with probability min(1, a), where

      a = W(x') / W(x) * min(w, T) / min(w, T')    and a = 0 if c < T' - w,

  and W(x) is the product of the incremental weights target / q over the symbols after c, times
  what critic and twist lend to x at step t.

W(x') / W(x) is gamma_t(x') q(x | c) / (gamma_t(x) q(x' | c)) for the target gamma_t of step t, and
the last factor is the ratio of the probabilities of the cut, so this is detailed balance for
gamma_t at each cut, and weights stay what they are.
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
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray, Suffix
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
        particles, frontier: N particles, of which the active ones have read `step` bytes, and
            where they are.
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
        particles: after resampling, with the salts of their next draws if they have any.
        ancestors: int64[N], the particle whose lane each takes (None: its own).
    """
    lane_of = frontier.lane_of if ancestors is None else frontier.lane_of[ancestors]
    if particles.salt is not None:
        return frontier.on(lane_of, particles.salt[:, -1])
    every = ancestors is None and not frontier.plan.weighers
    return frontier if every else frontier.on(lane_of)


async def rejuvenate(
    particles: Particles, frontier: Frontier, step: int, rng: np.random.Generator
) -> tuple[Particles, Frontier, int]:
    """Move every particle as often as `Plan.rejuvenate` says.

    The active ones have read `step` bytes, and the frontier is at their texts.

    Returns:
        Particles and frontier as they are then, and how many changed their text (once a
        sweep).
    """
    suffix, moved = frontier.plan.rejuvenate, 0
    if suffix is not None and step > 0 and not particles.dead.all():
        for _ in range(suffix.sweeps):
            particles, frontier, changed = await _sweep(particles, frontier, step, suffix, rng)
            moved += changed
    return particles, frontier, moved


async def _sweep(
    old: Particles, frontier: Frontier, step: int, suffix: Suffix, rng: np.random.Generator
) -> tuple[Particles, Frontier, int]:
    """Move every particle once."""
    plan, dead = frontier.plan, old.dead
    count = old.symbols_read(plan.terminate_when)
    window = np.minimum(count, suffix.longest or step + 1)
    cut = count - 1 - np.floor(rng.random(len(count)) * window).astype(np.int64)
    walk = await _walk(plan, old, cut, range(int(cut[~dead].min()), step), rng)
    log_ratio = _log_ratio(suffix, walk, cut)
    accept = ~dead & (np.log1p(-rng.random(len(count))) < log_ratio)
    both = np.where(accept, len(count), 0) + np.arange(len(count))
    new = walk.particles.gather(both, old.log_weights)
    salt = new.salt
    if salt is not None and old.salt is not None:
        salt = np.where(dead[:, None], old.salt, salt)
    particles = old._replace(
        text=np.where(dead[:, None], old.text, new.text),
        length=np.where(dead, old.length, new.length),
        ended=np.where(dead, old.ended, new.ended),
        twist=np.where(dead, old.twist, new.twist),
        salt=salt,
    )
    lanes = np.where(particles.active, walk.frontier.lane_of[both], -1)
    changed = (particles.text != old.text).any(axis=1) | (particles.length != old.length)
    return particles, walk.frontier.on(lanes), int((changed & accept).sum())


async def _walk(
    plan: Plan, own: Particles, cut: IntArray, steps: range, rng: np.random.Generator
) -> Replay:
    """Read the texts again beside proposals that leave them after `cut` int64[N] symbols.

    Args:
        own: the texts.
        steps: from the least cut on; everybody who is alive has read more symbols than that.
        plan, cut, rng: see above.

    Returns:
        2N particles, the texts and then the proposals.
    """
    n, first = len(cut), steps.start
    leaves = np.concatenate([np.full(n, steps.stop), cut])  # from which symbol on it draws
    twice = own.gather(np.tile(np.arange(n), 2), np.tile(np.where(own.dead, -np.inf, 0.0), 2))
    before = twice._replace(
        text=twice.text[:, :first],
        length=np.full(2 * n, first),
        ended=np.zeros(2 * n, dtype=bool),
        twist=np.zeros(2 * n),
        salt=None if twice.salt is None else twice.salt[:, : first + 1],
    )

    def symbol(step: int) -> IntArray:
        read = np.where(step < twice.length, twice.text[:, step].astype(np.int64), EOS_COLUMN)
        return np.where(step < leaves, read, NO_SYMBOL)

    def salt(count: int) -> SaltArray:
        fresh = rng.integers(0, 2**64, size=2 * n, dtype=np.uint64)
        assert twice.salt is not None
        return np.where(count <= leaves, twice.salt[:, count], fresh)

    walk = await replay(
        plan,
        before,
        [plan.beam_seed],
        steps,
        symbol,
        lambda step: rng.random(2 * n),
        None if own.salt is None else salt,
    )
    return walk._replace(symbols_read=walk.symbols_read + first)


def _log_ratio(suffix: Suffix, walk: Replay, cut: IntArray) -> FloatArray:
    """Return the log of the acceptance ratio of each particle, float64[N], nats."""
    n = len(cut)
    old, new = walk.particles.log_weights[:n], walk.particles.log_weights[n:]
    n_old, n_new = walk.symbols_read[:n], walk.symbols_read[n:]
    longest = suffix.longest or int(walk.symbols_read.max(initial=1))
    returns = cut >= n_new - longest
    old = np.where(np.isneginf(old), 0.0, old)  # dead: nothing of it is looked at
    ratio = new - old + np.log(np.minimum(n_old, longest)) - np.log(np.minimum(n_new, longest))
    return np.where(returns, ratio, -np.inf)


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
            (text,) = particles.texts(np.flatnonzero(frontier.lane_of == lane)[:1])
            what = "the end" if symbol == EOS_COLUMN else f"the byte {bytes([symbol])!r}"
            return BadWeightError(f"{name} gave {block[lane, symbol]} to {what} after {text!r}")
    return BadWeightError("the proposal gave NaN or +inf")
