"""The distinct unfinished texts of a run: where language models and constraints do work.

Particles with equal texts share one lane, so a step costs what its distinct texts cost.
Lanes that no particle is on any more (they ended, died, or were not resampled) are left out
before rows are computed for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.alphabet import N_SYMBOLS
from genlm_bytes_smc.smc.factors import (
    BadWeightError,
    BeamLanes,
    Lanes,
    Rows,
    lanes_of,
    random_beams,
    together,
)
from genlm_bytes_smc.smc.particles import BoolArray, Particles, SaltArray, Uint8Array
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.weighers import Ahead


class Frontier(NamedTuple):
    """D distinct unfinished texts and what each factor knows about them; a value.

    Attributes:
        plan: the settings of the run.
        lanes: of each leaf of target and proposal, at the D texts.
        lane_of: int64[N], the lane of each particle, -1 for one that reads no more.
        size: D.
        engines: the distinct token-level engines behind the lanes.
    """

    plan: Plan
    lanes: Sequence[Lanes]
    lane_of: IntArray
    size: int
    engines: tuple[Any, ...] = ()

    @classmethod
    async def start(
        cls, plan: Plan, particles: Particles, beam_seeds: Sequence[int | None]
    ) -> Frontier:
        """Go to the texts of `particles`, all active ones of which have read equally many bytes.

        Args:
            plan: of the run.
            particles: of one run, or those of R runs of equal size one after the other.
            beam_seeds: of the random beams of each run. Runs of equal seeds share lanes, and
                so do all runs where no beam is random.
        """
        active = particles.active
        nobody = np.full(len(active), -1, dtype=np.int64)
        if not active.any():
            return cls(plan, (), nobody, 0)
        distinct = list(dict.fromkeys(beam_seeds if random_beams(plan.leaves) else beam_seeds[:1]))
        number = np.array([distinct.index(s) if s in distinct else 0 for s in beam_seeds])
        root = np.repeat(number, len(active) // len(beam_seeds))[active]
        salt = None if particles.salt is None else particles.salt[active]
        roots, salts, at = _roots(root, salt, len(distinct))
        seeds = [distinct[i] for i in roots.tolist()]
        lanes = [(await _first(plan, leaf, len(seeds))).seeded(seeds) for leaf in plan.leaves]
        if salts is not None:
            lanes = [factor.salted(salts) for factor in lanes]
        moves, lane_of = _replay(particles.text[active], at, salt)
        for parents, symbols, salts in moves:
            lanes = [(await factor.gather(parents).step(symbols))[0] for factor in lanes]
            if salts is not None:
                lanes = [factor.salted(salts) for factor in lanes]
        nobody[active] = lane_of
        engines = {id(f.engine): f.engine for f in lanes if isinstance(f, BeamLanes)}
        size = len(moves[-1].parents) if moves else len(roots)
        return cls(plan, lanes, nobody, size, tuple(engines.values()))

    async def rows(self) -> Rows:
        """Compute the rows of all factors; language models of one engine share a forward.

        Where nobody reads on (of a rejuvenation's texts, all may be over), there are none.
        """
        if self.size == 0:
            return Rows((), torch.empty((0, N_SYMBOLS), dtype=torch.float64), None)
        await asyncio.sleep(0)  # a cancellation is heard here, also where every row is known
        slow = [factor for factor in self.lanes if factor.waits]
        if len(slow) > 1:
            found = iter(await together([factor.rows() for factor in slow]))
            blocks = [next(found) if f.waits else await f.rows() for f in self.lanes]
        else:
            blocks = [await factor.rows() for factor in self.lanes]
        proposal = self.plan.proposal
        return Rows(blocks, self.plan.target(blocks), proposal and proposal(blocks))

    async def step(
        self, rows: Rows, symbols: IntArray, going: BoolArray
    ) -> tuple[Frontier, FloatArray | None]:
        """Read a byte with some of the particles, the others left out.

        Args:
            rows: of these lanes.
            symbols: int64[N], the byte each particle reads.
            going: bool[N], the particles that read one.

        Returns:
            The frontier after it, and by how much the target weighs what was read otherwise
            than its row, float64[N], nats (0 for the others); None if by nothing.
        """
        lane_of = np.full(len(going), -1, dtype=np.int64)
        codes = self.lane_of[going] * N_SYMBOLS + symbols[going]
        codes, lane_of[going] = np.unique(codes, return_inverse=True)
        if not len(codes):
            return self._replace(lanes=(), lane_of=lane_of, size=0), None
        parents, read = codes // N_SYMBOLS, codes % N_SYMBOLS
        before = self.lanes
        if len(parents) != self.size or not bool((parents[1:] > parents[:-1]).all()):
            before = [factor.gather(parents) for factor in before]
        lanes, weights, revised = list[Lanes](), list[FloatArray | None](), False
        for factor in before:
            stepped, weight = await factor.step(read)
            lanes.append(stepped)
            weights.append(weight)
            revised |= weight is not None
        after = self._replace(lanes=lanes, lane_of=lane_of, size=len(parents))
        if not revised:
            return after, None
        revision = self._revision(rows, parents, read, weights)
        return after, np.where(going, revision[lane_of], 0.0)

    def _revision(
        self,
        rows: Rows,
        parents: IntArray,
        symbols: IntArray,
        weights: Sequence[FloatArray | None],
    ) -> FloatArray:
        """Return the log weight of D' bytes over what the target's row said, float64[D'], nats.

        Raises:
            BadWeightError: NaN or +inf.
        """
        out = np.zeros(len(parents))
        for i, weight in enumerate(weights):
            power = self.plan.exponents[i]
            if weight is None or power == 0:
                continue
            if np.isnan(weight).any() or weight.max() == np.inf:
                raise BadWeightError(f"{self.plan.names[i]} gave NaN or +inf for a byte it read")
            said = rows.blocks[i].cpu().numpy()[parents, symbols]
            out += power * (weight - said)
        return out

    def on(self, lane_of: IntArray, salt: SaltArray | None = None) -> Frontier:
        """Move particles to other lanes; unused lanes are left out.

        Args:
            lane_of: int64[N], -1 for a particle that reads no more.
            salt: uint64[N], keys of the next draws of the beams, if each particle has its own.
        """
        reads = lane_of >= 0
        if salt is None:
            used, inverse = np.unique(lane_of[reads], return_inverse=True)
            if len(used) == self.size:
                return self._replace(lane_of=lane_of)
        else:
            first, inverse = _distinct([lane_of[reads], salt[reads]])
            used, salt = lane_of[reads][first], salt[reads][first]
        after = np.full(len(reads), -1, dtype=np.int64)
        after[reads] = inverse
        lanes: list[Lanes] = []
        if len(used):
            lanes = [factor.gather(used) for factor in self.lanes]
        if salt is not None:
            lanes = [factor.salted(salt) for factor in lanes]
        return self._replace(lanes=lanes, lane_of=after, size=len(used))


async def _first(plan: Plan, leaf: Any, n: int) -> Lanes:
    """Return `n` lanes of a leaf at the empty text."""
    if isinstance(leaf, Ahead):
        one: Lanes = await leaf.start(plan.potential, plan.leaves[: plan.n_target], plan.max_bytes)
    else:
        one = await lanes_of(leaf)
    return one if n == 1 else one.gather(np.zeros(n, dtype=np.int64))


def _distinct(columns: Sequence[npt.NDArray[Any]]) -> tuple[IntArray, IntArray]:
    """Return the first place of each distinct row of some columns, and the number of each row."""
    if len(columns) == 1:
        _, first, inverse = np.unique(columns[0], return_index=True, return_inverse=True)
        return first, inverse
    order = np.lexsort(list(reversed(columns)))
    new = _changes([c[order] for c in columns])
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = np.cumsum(new) - 1
    return order[new], inverse


def _changes(columns: Sequence[npt.NDArray[Any]]) -> BoolArray:
    """Return which rows of some sorted columns differ from the row before; the first does."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for c in columns:
        new[1:] |= c[1:] != c[:-1]
    return new


def _roots(
    root: IntArray, salt: SaltArray | None, n_roots: int
) -> tuple[IntArray, SaltArray | None, IntArray]:
    """Return the lanes of the empty text (seed's number, salt), and the lane of each particle."""
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
    """Return the moves from the empty text to `text` uint8[A, t], equal prefixes once.

    Args:
        text: the bytes to read.
        root: int64[A], the lane of the empty text that each begins on.
        salt: uint64[A, t + 1], which keeps equal prefixes apart, or None.

    Returns:
        The moves byte by byte; and the last lanes of the A texts, int64[A].
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
