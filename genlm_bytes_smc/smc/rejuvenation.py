"""Rejuvenation: Metropolis-Hastings moves that re-propose the end of a text.

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

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.checks import check_count
from genlm_bytes_smc.smc.frontier import Advance, Frontier
from genlm_bytes_smc.smc.particles import BoolArray, Particles, SaltArray
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.state import NO_SYMBOL, SMCState

if TYPE_CHECKING:
    from genlm_bytes_smc.smc.plan import Plan

Reader = Callable[..., Coroutine[Any, Any, Advance]]


@dataclass(frozen=True)
class Suffix:
    """Re-propose the end of each text, and accept it by Metropolis-Hastings.

    A move reads the texts again from their beginning (equal texts once; rows of the language
    model that are still kept cost nothing) and draws at most `longest` bytes anew.

    Attributes:
        longest: most symbols that are proposed anew, w; None: the whole text may be.
        sweeps: moves after each resampling.

    Raises:
        TypeError: no integers. ValueError: integers below one.
    """

    longest: int | None = 16
    sweeps: int = 1

    def __post_init__(self) -> None:
        if self.longest is not None:
            check_count("longest of a Suffix", self.longest, 1)
        check_count("sweeps of a Suffix", self.sweeps, 1)

    async def move(
        self,
        plan: Plan,
        state: SMCState,
        frontier: Frontier,
        rng: np.random.Generator,
        read: Reader,
    ) -> tuple[SMCState, Frontier, int]:
        """Particles after `sweeps` moves.

        Args:
            plan: of the run.
            state: whose active particles have read `state.step` bytes.
            frontier: at their texts.
            rng: random numbers of the moves.
            read: how particles read a symbol (`loop.advance`).

        Returns:
            State and frontier of the particles as they are then, and how many changed their
            text (once a sweep).
        """
        moved = 0
        for _ in range(self.sweeps):
            state, frontier, changed = await self._sweep(plan, state, frontier, rng, read)
            moved += changed
        return state, frontier, moved

    async def _sweep(
        self,
        plan: Plan,
        state: SMCState,
        frontier: Frontier,
        rng: np.random.Generator,
        read: Reader,
    ) -> tuple[SMCState, Frontier, int]:
        old = state.particles
        alive = np.flatnonzero(~old.dead)
        count = _symbols_read(plan, old)
        if state.step == 0 or not len(alive):
            return state, frontier, 0
        window = np.minimum(count, self.longest or state.step + 1)
        cut = count - 1 - np.floor(rng.random(len(count)) * window).astype(np.int64)
        walk = await _walk(plan, state, cut, int(cut[alive].min()), rng, read)
        log_ratio = self._log_ratio(walk, cut)
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
        frontier = walk.frontier.on(lanes)
        return state._replace(particles=particles), frontier, int((changed & accept).sum())

    def _log_ratio(self, walk: _Walk, cut: IntArray) -> FloatArray:
        """Log of the acceptance ratio of each particle, float64[N], nats."""
        n = len(cut)
        old, new = walk.particles.log_weights[:n], walk.particles.log_weights[n:]
        n_old, n_new = walk.symbols_read[:n], walk.symbols_read[n:]
        longest = self.longest or int(walk.symbols_read.max(initial=1))
        returns = cut >= n_new - longest
        old = np.where(np.isneginf(old), 0.0, old)  # dead: nothing of it is looked at
        ratio = new - old + np.log(np.minimum(n_old, longest)) - np.log(np.minimum(n_new, longest))
        out: FloatArray = np.where(returns, ratio, -np.inf)
        return out


class _Walk(NamedTuple):
    """Texts and what is proposed in their place, N and N, read again from the first cut on.

    Attributes:
        particles: 2N of them; their weights are those of the symbols from there on.
        frontier: at their texts.
        symbols_read: int64[2N], how many each has read in all.
    """

    particles: Particles
    frontier: Frontier
    symbols_read: IntArray


async def _walk(
    plan: Plan,
    state: SMCState,
    cut: IntArray,
    first: int,
    rng: np.random.Generator,
    read: Reader,
) -> _Walk:
    """Read the texts again beside proposals that leave them after `cut` int64[N] symbols.

    Args:
        plan, state: of the run.
        cut: how many symbols a proposal keeps.
        first: the least cut; everybody who is alive has read more symbols than that.
        rng: for the proposals' draws.
        read: as for `Suffix.move`.
    """
    own = state.particles
    n = len(cut)
    particles = _both(own, first)
    leaves = np.concatenate([np.full(n, state.step), cut])  # from which symbol on it draws
    frontier = await Frontier.start(
        plan.leaves, plan.target, plan.proposal, particles, plan.beam_seed
    )
    count = np.full(2 * n, first)
    for k in range(first, state.step):
        here = state._replace(particles=particles, step=k)
        uniform = rng.random(2 * n)
        forced = np.where(k < leaves, np.tile(_symbol_at(own, k), 2), NO_SYMBOL)
        active = frontier.lane_of >= 0
        _, got, particles = await read(plan, here, frontier, uniform, forced)
        if own.salt is not None:
            particles = _salted(particles, own.salt[:, k + 1], k < leaves, rng)
        frontier = await frontier.step(particles, frontier.lane_of, got.symbols)
        count = count + active
    return _Walk(particles, frontier, count)


def _both(own: Particles, first: int) -> Particles:
    """Particles twice, as they were after `first` symbols, of weight one."""
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


def _salted(
    particles: Particles, own: Any, keeps: BoolArray, rng: np.random.Generator
) -> Particles:
    """With the salts that the texts had where they are followed, and fresh ones elsewhere."""
    out = particles.salted(rng)
    assert out.salt is not None
    out.salt[:, -1] = np.where(keeps, np.tile(own, 2), out.salt[:, -1])
    return out


def _mended(old: Particles, new: Particles, both: IntArray) -> SaltArray | None:
    """Salts of the texts that are kept."""
    if old.salt is None or new.salt is None:
        return None
    return np.where(old.dead[:, None], old.salt, new.salt[both])


def _symbol_at(own: Particles, k: int) -> IntArray:
    """The symbol that each particle read after k others; its end where the text is over."""
    out: IntArray = np.where(k < own.length, own.text[:, k].astype(np.int64), EOS_COLUMN)
    return out


def _symbols_read(plan: Plan, particles: Particles) -> IntArray:
    """How many symbols each particle has read, int64[N]: its end is one if it drew it."""
    drew = particles.ended.copy()
    if plan.terminate_when is not None:
        texts = particles.texts()
        stops = {t: bool(plan.terminate_when(t)) for t in {*texts} - {b""}}
        drew &= ~np.array([stops.get(t, False) for t in texts])
    out: IntArray = particles.length + drew
    return out
