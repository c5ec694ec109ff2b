"""Rejuvenation: Metropolis-Hastings moves that re-propose the end of a text (`Suffix`).

Resampling leaves copies; a move that keeps the current target invariant makes them differ
again (resample-move: Gilks & Berzuini 2001, JRSS-B 63:127). The move here, for a particle that
has read the symbols x_1..x_T (T = t for an active one at step t; the end of an ended one counts
as a symbol):

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

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.frontier import Frontier
from genlm_bytes_smc.smc.particles import NO_SYMBOL, Particles, SaltArray
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.reading import Replay, replay
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray, Suffix


async def rejuvenate(
    particles: Particles, frontier: Frontier, step: int, rng: np.random.Generator
) -> tuple[Particles, Frontier, int]:
    """Move every particle as often as `Plan.rejuvenate` says.

    Args:
        particles: the active ones have read `step` bytes.
        frontier: at their texts.
        step: how many bytes.
        rng: random numbers of the moves.

    Returns:
        Particles and frontier as they are then, and how many changed their text (once a
        sweep).
    """
    suffix, moved = frontier.plan.rejuvenate, 0
    for _ in range(0 if suffix is None else suffix.sweeps):
        particles, frontier, changed = await _sweep(particles, frontier, step, rng)
        moved += changed
    return particles, frontier, moved


async def _sweep(
    old: Particles, frontier: Frontier, step: int, rng: np.random.Generator
) -> tuple[Particles, Frontier, int]:
    """Move every particle once."""
    alive, plan, suffix = np.flatnonzero(~old.dead), frontier.plan, frontier.plan.rejuvenate
    if step == 0 or not len(alive) or suffix is None:
        return old, frontier, 0
    count = old.symbols_read(plan.terminate_when)
    window = np.minimum(count, suffix.longest or step + 1)
    cut = count - 1 - np.floor(rng.random(len(count)) * window).astype(np.int64)
    walk = await _propose(plan, old, cut, range(int(cut[alive].min()), step), rng)
    log_ratio = _log_ratio(suffix, walk, cut)
    accept = ~old.dead & (np.log1p(-rng.random(len(count))) < log_ratio)
    both = np.where(accept, len(count), 0) + np.arange(len(count))
    new = walk.particles
    particles = old._replace(
        text=np.where(old.dead[:, None], old.text, new.text[both]),
        length=np.where(old.dead, old.length, new.length[both]),
        ended=np.where(old.dead, old.ended, new.ended[both]),
        twist=np.where(old.dead, old.twist, new.twist[both]),
        salt=_mended(old, new, both),
    )
    lanes = np.where(particles.active, walk.frontier.lane_of[both], -1)
    changed = (particles.text != old.text).any(axis=1) | (particles.length != old.length)
    return particles, walk.frontier.on(lanes), int((changed & accept).sum())


async def _propose(
    plan: Plan, own: Particles, cut: IntArray, steps: range, rng: np.random.Generator
) -> Replay:
    """Read the texts again beside proposals that leave them after `cut` int64[N] symbols.

    Args:
        plan: of the run.
        own: the texts.
        cut: how many symbols a proposal keeps.
        steps: from the least cut on; everybody who is alive has read more symbols than that.
        rng: for the proposals' draws.

    Returns:
        2N particles, the texts and then the proposals.
    """
    n = len(cut)
    leaves = np.concatenate([np.full(n, steps.stop), cut])  # from which symbol on it draws

    def salt(count: int) -> SaltArray:
        fresh = rng.integers(0, 2**64, size=2 * n, dtype=np.uint64)
        assert own.salt is not None
        return np.where(count <= leaves, np.tile(own.salt[:, count], 2), fresh)

    walk = await replay(
        plan,
        _both(own, steps.start),
        [plan.beam_seed],
        steps,
        lambda step: np.where(step < leaves, np.tile(_symbol_at(own, step), 2), NO_SYMBOL),
        lambda step: rng.random(2 * n),
        None if own.salt is None else salt,
    )
    return walk._replace(symbols_read=walk.symbols_read + steps.start)


def _log_ratio(suffix: Suffix, walk: Replay, cut: IntArray) -> FloatArray:
    """Return the log of the acceptance ratio of each particle, float64[N], nats."""
    n = len(cut)
    old, new = walk.particles.log_weights[:n], walk.particles.log_weights[n:]
    n_old, n_new = walk.symbols_read[:n], walk.symbols_read[n:]
    longest = suffix.longest or int(walk.symbols_read.max(initial=1))
    returns = cut >= n_new - longest
    old = np.where(np.isneginf(old), 0.0, old)  # dead: nothing of it is looked at
    ratio = new - old + np.log(np.minimum(n_old, longest)) - np.log(np.minimum(n_new, longest))
    out: FloatArray = np.where(returns, ratio, -np.inf)
    return out


def _both(own: Particles, first: int) -> Particles:
    """Return particles twice, as they were after `first` symbols, of weight one."""
    twice = np.tile(np.arange(len(own.length)), 2)
    return Particles(
        text=own.text[twice, :first],
        length=np.full(len(twice), first),
        ended=np.zeros(len(twice), dtype=bool),
        log_weights=np.where(own.dead[twice], -np.inf, 0.0),
        twist=np.zeros(len(twice)),
        eve=own.eve[twice],
        salt=None if own.salt is None else own.salt[twice, : first + 1],
    )


def _mended(old: Particles, new: Particles, both: IntArray) -> SaltArray | None:
    """Return the salts of the texts that are kept."""
    if old.salt is None or new.salt is None:
        return None
    return np.where(old.dead[:, None], old.salt, new.salt[both])


def _symbol_at(own: Particles, k: int) -> IntArray:
    """Return the symbol that each particle read after k others; its end where the text is over."""
    out: IntArray = np.where(k < own.length, own.text[:, k].astype(np.int64), EOS_COLUMN)
    return out
