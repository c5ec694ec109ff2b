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

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.smc.ensembles import lanes_of
from genlm_bytes_smc.smc.factors import on_one_device, random_beams
from genlm_bytes_smc.smc.lanes import Lanes, Rows, joined, read_by, revision, rows_of, sharpened
from genlm_bytes_smc.smc.particles import BoolArray, Particles, SaltArray
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
        apart: frontiers of particles that wait; `lane_of` is -1 for them.
    """

    plan: Plan
    lanes: Sequence[Lanes]
    lane_of: IntArray
    size: int
    apart: tuple[Frontier, ...] = ()

    @classmethod
    async def start(
        cls, plan: Plan, particles: Particles, beam_seeds: Sequence[int | None]
    ) -> Frontier:
        """Go to the texts of particles, those of R runs of equal size one after the other.

        `beam_seeds` are those of the random beams of each run. Runs of equal seeds share lanes,
        and so do all runs where no beam is random.
        """
        active, salt = particles.active, particles.salt
        if not active.any():
            return cls(plan, (), np.full(len(active), -1, dtype=np.int64), 0)
        seeds = list(dict.fromkeys(beam_seeds if random_beams(plan.leaves) else beam_seeds[:1]))
        number = np.array([seeds.index(s) if s in seeds else 0 for s in beam_seeds])
        root = np.where(active, np.repeat(number, len(active) // len(beam_seeds)), -1)
        every = np.zeros(len(seeds), dtype=np.int64)
        lanes = [(await _first(plan, leaf)).gather(every).seeded(seeds) for leaf in plan.leaves]
        if plan.resample_at:
            lanes = [factor.remembering() for factor in lanes]
        frontier = cls(plan, lanes, root, len(seeds))
        frontier = frontier.on(root, None if salt is None else salt[:, 0])
        for k in range(int(particles.length[active].max())):
            frontier = frontier.parting(active & (particles.length == k))
            reads = active & (particles.length > k)
            frontier, _ = await frontier.step(None, particles.text[:, k].astype(np.int64), reads)
            if salt is not None:
                frontier = frontier.on(frontier.lane_of, salt[:, k + 1])
        return frontier.reunited()

    async def rows(self) -> Rows:
        """Compute the rows of all factors; language models of one engine share a forward.

        Where nobody reads on (of a rejuvenation's texts, all may be over), there are none.
        """
        if self.size == 0:
            return Rows((), torch.empty((0, N_SYMBOLS), dtype=torch.float64), None)
        await asyncio.sleep(0)  # a cancellation is heard here, also where every row is known
        blocks = await rows_of(self.lanes)
        target = self.plan.target(blocks)
        if len(self.lanes) > 1:
            within = await sharpened(self.lanes, blocks, target)
            if within is not None:
                blocks, target = within, self.plan.target(within)
        if self.plan.proposal is None:
            return Rows(blocks, target, None)
        return Rows(blocks, *on_one_device([target, self.plan.proposal(blocks)]))

    async def step(
        self, rows: Rows | None, symbols: IntArray, going: BoolArray
    ) -> tuple[Frontier, FloatArray | None]:
        """Read a byte with some of the particles, the others left out.

        Args:
            rows: of these lanes; None if nothing is to be weighed.
            symbols: int64[N], the byte each particle reads.
            going: bool[N], the particles that read one.

        Returns:
            The frontier after it, and by how much the target weighs what was read otherwise
            than its row, float64[N], nats (0 for the others); None if by nothing.
        """
        lane_of = np.full(len(going), -1, dtype=np.int64)
        at = np.flatnonzero(going)
        if not len(at):
            return self._replace(lanes=(), lane_of=lane_of, size=0), None
        codes, lane_of[at] = _distinct(self.lane_of[at] * N_SYMBOLS + symbols[at])
        parents, read = np.divmod(codes, N_SYMBOLS)
        before = self.lanes
        if len(parents) != self.size or (parents[1:] == parents[:-1]).any():
            before = [factor.gather(parents) for factor in before]
        lanes, weights, revised = await read_by(before, read)
        after = self._replace(lanes=lanes, lane_of=lane_of, size=len(parents))
        if rows is None or not revised:
            return after, None
        factors = self.plan.names, self.plan.exponents, rows.blocks
        change = revision(*factors, parents, read, weights)
        return after, np.where(going, change[lane_of], 0.0)

    async def ending(self, rows: Rows, going: BoolArray) -> FloatArray | None:
        """Return by how much the target weighs whole texts otherwise than their row.

        Args:
            rows: of these lanes.
            going: bool[N], the particles whose texts end.

        Returns:
            float64[N], nats, 0 for the others; None if by nothing.
        """
        at = np.flatnonzero(going)
        if not len(at) or not any(factor.forecasts for factor in self.lanes):
            return None
        used, place = _distinct(self.lane_of[at])
        weights = [await f.gather(used).ended() if f.forecasts else None for f in self.lanes]
        ends, change = np.full(len(used), EOS_COLUMN), np.zeros(len(going))
        factors = self.plan.names, self.plan.exponents, rows.blocks
        change[at] = revision(*factors, used, ends, weights)[place]
        return change

    def parting(self, which: BoolArray) -> Frontier:
        """Return the frontier of the others, and those of bool[N] apart; they wait."""
        if not which.any():
            return self
        waits = self.on(np.where(which, self.lane_of, -1))._replace(apart=())
        return self.on(np.where(which, -1, self.lane_of))._replace(apart=(*self.apart, waits))

    def reunited(self) -> Frontier:
        """Return one frontier of those that read and those that wait."""
        if not self.apart:
            return self
        parts = [part for part in (self, *self.apart) if part.size]
        lane_of, size = np.full(len(self.lane_of), -1, dtype=np.int64), 0
        for part in parts:
            lane_of = np.where(part.lane_of >= 0, part.lane_of + size, lane_of)
            size += part.size
        lanes = joined([part.lanes for part in parts])
        return self._replace(lanes=lanes, lane_of=lane_of, size=size, apart=())

    def on(self, lane_of: IntArray, salt: SaltArray | None = None) -> Frontier:
        """Move particles to other lanes; unused lanes are left out.

        Args:
            lane_of: int64[N], -1 for a particle that reads no more.
            salt: uint64[N], keys of the next draws of the beams, if each particle has its own.
        """
        at = np.flatnonzero(lane_of >= 0)
        after = np.full(len(lane_of), -1, dtype=np.int64)
        if salt is None:
            used, after[at] = _distinct(lane_of[at])
            if len(used) == self.size:
                return self._replace(lane_of=lane_of)
        else:
            values, number = _distinct(salt[at])
            pairs, after[at] = _distinct(lane_of[at] * len(values) + number)
            used, number = np.divmod(pairs, max(len(values), 1))
            salt = values[number]
        lanes: list[Lanes] = []
        if len(used):
            lanes = [factor.gather(used) for factor in self.lanes]
        if salt is not None:
            lanes = [factor.salted(salt) for factor in lanes]
        return self._replace(lanes=lanes, lane_of=after, size=len(used))


async def _first(plan: Plan, leaf: Any) -> Lanes:
    """Return one lane of a leaf at the empty text."""
    if isinstance(leaf, Ahead):
        about = plan.potential, plan.leaves[: plan.n_target], plan.max_bytes
        return await leaf.start(*about, terminated=plan.terminate_when is not None)
    return await lanes_of(leaf)


def _distinct(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], IntArray]:
    """Return the distinct values, ascending, and the place of each value among them.

    This is `np.unique`, at half its time for the few values of a step.
    """
    order = values.argsort()
    ascending = values[order]
    new = np.ones(len(values), dtype=bool)
    np.not_equal(ascending[1:], ascending[:-1], out=new[1:])
    inverse = np.empty(len(values), dtype=np.int64)
    inverse[order] = new.cumsum() - 1
    return ascending[new], inverse
