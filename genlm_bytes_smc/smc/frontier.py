"""The distinct unfinished texts of a run: where language models and constraints do work.

Particles with equal texts share one lane, so a step costs what its distinct texts cost.
Lanes that no particle is on any more (they ended, died, or were not resampled) are left out
before anything is computed for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.lm.transfer import send
from genlm_bytes_smc.smc.factors import Combine, Factor, LanesFactor, start_factor, together
from genlm_bytes_smc.smc.particles import BoolArray, Particles, SaltArray, Uint8Array
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray


class Rows(NamedTuple):
    """Log weights of what may come next after each distinct text, nats.

    Attributes:
        blocks: one float64[D, 257] a factor.
        target: float64[D, 257], unnormalised.
        proposal: float64[D, 257] to draw from, unnormalised; None: the target itself.
    """

    blocks: Sequence[torch.Tensor]
    target: torch.Tensor
    proposal: torch.Tensor | None


class Read(NamedTuple):
    """What the particles read in one step: symbols int64[N] and log weights float64[N]."""

    symbols: IntArray
    log_weights: FloatArray


class Advance(NamedTuple):
    """One symbol more: the rows it was drawn from, what was read, the particles after it."""

    rows: Rows
    read: Read
    particles: Particles


class Frontier(NamedTuple):
    """D distinct unfinished texts and what each factor knows about them; a value.

    Attributes:
        factors: what each leaf of target and proposal knows.
        target, proposal: how their rows combine.
        lane_of: int64[N], the lane of each particle, -1 for one that reads no more.
        size: D.
    """

    factors: Sequence[Factor]
    target: Combine
    proposal: Combine | None
    lane_of: IntArray
    size: int

    @classmethod
    async def start(
        cls,
        leaves: Sequence[Any],
        target: Combine,
        proposal: Combine | None,
        particles: Particles,
        beam_seed: int | Sequence[int | None] | None,
    ) -> Frontier:
        """At the texts of `particles`, all active ones of which have read equally many bytes.

        Args:
            leaves, target, proposal: of the plan.
            particles: of one run, or those of R runs of equal size one after the other.
            beam_seed: of the run's random beams, or one a run. Runs of equal seeds share
                lanes, and so do all runs where no beam is random.
        """
        active = particles.active
        seeds = list(beam_seed) if isinstance(beam_seed, Sequence) else [beam_seed]
        distinct = list(dict.fromkeys(seeds)) if random_beams(leaves) else seeds[:1]
        number = np.array([distinct.index(s) if s in distinct else 0 for s in seeds])
        root = np.repeat(number, len(active) // len(seeds))[active]
        salt = None if particles.salt is None else particles.salt[active]
        roots, salts, at = _roots(root, salt, len(distinct))
        factors = [
            await _start(leaf, [distinct[i] for i in roots.tolist()], salts) for leaf in leaves
        ]
        frontier = cls(factors, target, proposal, np.zeros(len(active), dtype=np.int64), len(roots))
        moves, lane_of = _replay(particles.text[active], at, salt)
        for parents, symbols, salts in moves:
            frontier = await frontier._move(parents, symbols, frontier.lane_of, salts)
        lanes = np.full(len(active), -1, dtype=np.int64)
        lanes[active] = lane_of
        return frontier._replace(lane_of=lanes)

    async def rows(self) -> Rows:
        """Rows of all factors; language models that share a model share a forward.

        Where nobody reads on (of a rejuvenation's texts, all may be over), there are none.
        """
        if self.size == 0:
            return Rows((), torch.empty((0, N_SYMBOLS), dtype=torch.float64), None)
        await asyncio.sleep(0)  # a cancellation is heard here, also where every row is known
        slow = iter(await together([f.block() for f in self.factors if f.waits]))
        blocks = [next(slow) if f.waits else await f.block() for f in self.factors]
        return Rows(blocks, self.target(blocks), self.proposal and self.proposal(blocks))

    async def step(self, particles: Particles, lanes: IntArray, symbols: IntArray) -> Frontier:
        """Read on with the particles that are still active.

        Args:
            particles: after reading and resampling, and with salts for the beams' next draws
                if they have any.
            lanes: int64[N], the lane each was on.
            symbols: int64[N], the byte each read.
        """
        active = particles.active
        codes = lanes[active] * N_SYMBOLS + symbols[active]
        salt = None if particles.salt is None else particles.salt[active, -1]
        first, inverse = _distinct([codes] if salt is None else [codes, salt])
        lane_of = np.full(len(active), -1, dtype=np.int64)
        lane_of[active] = inverse
        codes, salt = codes[first], None if salt is None else salt[first]
        return await self._move(codes // N_SYMBOLS, codes % N_SYMBOLS, lane_of, salt)

    async def _move(
        self, parents: IntArray, symbols: IntArray, lane_of: IntArray, salt: SaltArray | None
    ) -> Frontier:
        if len(parents) == 0:
            return self._replace(factors=(), lane_of=lane_of, size=0)
        factors = [await _step(factor, parents, symbols, salt) for factor in self.factors]
        return self._replace(factors=factors, lane_of=lane_of, size=len(parents))

    def on(self, lane_of: IntArray) -> Frontier:
        """With particles on other lanes, int64[N] (-1: on none); unused lanes are left out."""
        used = np.unique(lane_of[lane_of >= 0])
        if len(used) == self.size:
            return self._replace(lane_of=lane_of)
        if len(used) == 0:
            return self._replace(factors=(), lane_of=lane_of, size=0)
        lanes = np.where(lane_of < 0, -1, np.searchsorted(used, lane_of))
        factors = [factor.take(used) for factor in self.factors]
        return self._replace(factors=factors, lane_of=lanes, size=len(used))

    def engines(self) -> list[Any]:
        """The distinct token-level engines behind the factors."""
        found = [f.lanes.model.engine for f in self.factors if isinstance(f, LanesFactor)]
        return list({id(engine): engine for engine in found}.values())


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
    symbols, log_weights = torch.stack([symbol.double(), log_weight]).cpu().numpy()
    return symbols.astype(np.int64), log_weights


def uncovered(rows: Rows) -> FloatArray | None:
    """The share of each target row on symbols that the proposal gives weight zero.

    Returns:
        float64[D]; None without a proposal: there is no such symbol.
    """
    if rows.proposal is None:
        return None
    hidden = rows.target.masked_fill(~torch.isneginf(rows.proposal), -torch.inf)
    share = torch.logsumexp(hidden, 1) - torch.logsumexp(rows.target, 1)
    out: FloatArray = torch.exp(share).nan_to_num(0.0).cpu().numpy()
    return out


def random_beams(leaves: Sequence[Any]) -> bool:
    """Whether the beams of any of the leaves are random (`prune="unbiased"`)."""
    return any(getattr(getattr(leaf, "params", None), "unbiased", False) for leaf in leaves)


async def _start(leaf: Any, seeds: Sequence[int | None], salt: SaltArray | None) -> Factor:
    """A factor at the empty text, once for each beam seed and salt uint64[D]."""
    factor = await start_factor(leaf, seeds[0] if len(seeds) == 1 else None)
    if len(seeds) > 1:
        factor = factor.take(np.zeros(len(seeds), dtype=np.int64))
        if isinstance(factor, LanesFactor):
            factor = factor.seeded(seeds)
    if salt is not None and isinstance(factor, LanesFactor):
        factor = factor.salted(salt)
    return factor


async def _step(
    factor: Factor, parents: IntArray, symbols: IntArray, salt: SaltArray | None
) -> Factor:
    if salt is None or not isinstance(factor, LanesFactor):
        return await factor.step(parents, symbols)
    await factor.lanes.extended()  # drawn by the salt before
    return await factor.take(parents).salted(salt).step(np.arange(len(parents)), symbols)


def _distinct(columns: Sequence[npt.NDArray[Any]]) -> tuple[IntArray, IntArray]:
    """Where each distinct row of some columns first is, and which one each row is."""
    if len(columns) == 1:
        _, first, inverse = np.unique(columns[0], return_index=True, return_inverse=True)
        return first, inverse
    order = np.lexsort(list(reversed(columns)))
    new = _changes([c[order] for c in columns])
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = np.cumsum(new) - 1
    return order[new], inverse


def _changes(columns: Sequence[npt.NDArray[Any]]) -> BoolArray:
    """Which rows of some sorted columns differ from the row before; the first does."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for c in columns:
        new[1:] |= c[1:] != c[:-1]
    return new


def _roots(
    root: IntArray, salt: SaltArray | None, n_roots: int
) -> tuple[IntArray, SaltArray | None, IntArray]:
    """The lanes of the empty text: their seed's number and salt, and which one each is on."""
    if salt is None:
        return np.arange(n_roots), None, root
    first, inverse = _distinct([root, salt[:, 0]])
    return root[first], salt[first, 0], inverse


class _Move(NamedTuple):
    """Bytes read by D lanes: the lanes before, int64[D], the bytes, and the salts after."""

    parents: IntArray
    symbols: IntArray
    salt: SaltArray | None


def _replay(
    text: Uint8Array, root: IntArray, salt: SaltArray | None
) -> tuple[list[_Move], IntArray]:
    """How to get from the empty text to `text` uint8[A, t], equal prefixes once.

    Args:
        text: what to read.
        root: int64[A], the lane of the empty text that each begins on.
        salt: uint64[A, t + 1], which keeps equal prefixes apart, or None.

    Returns:
        What is read byte by byte; and the last lanes of the A texts, int64[A].
    """
    n, length = text.shape
    steps: list[list[npt.NDArray[Any]]]
    steps = [[text[:, k]] if salt is None else [text[:, k], salt[:, k + 1]] for k in range(length)]
    keys: list[npt.NDArray[Any]] = [root, *(column for step in steps for column in step)]
    order = np.lexsort(keys[::-1])
    lane = root[order]
    new = _changes([lane])  # which prefixes differ from that of the text before
    moves = []
    for step in steps:
        columns = [column[order] for column in step]
        new = new | _changes(columns)
        first = np.flatnonzero(new)
        after: SaltArray | None = None if salt is None else columns[1][first]
        moves.append(_Move(lane[first], columns[0][first].astype(np.int64), after))
        lane = np.cumsum(new) - 1
    lane_of = np.empty(n, dtype=np.int64)
    lane_of[order] = lane
    return moves, lane_of
