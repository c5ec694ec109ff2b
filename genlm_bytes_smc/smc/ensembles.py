"""Ensembles as one factor of a target: the lanes of their members side by side.

An ensemble weighs a text by a function of its members' weights of it, so its row needs their
weights of the text so far: each member carries them along. Members are trees of potentials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from genlm.control.potential.built_in.ensemble import Ensemble

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.beam.pruning_numba import KeyArray
from genlm_bytes_smc.calls import together
from genlm_bytes_smc.constraints.base import ByteConstraint
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.potential.power_mean import Mean, PowerMean, next_rows
from genlm_bytes_smc.smc.factors import Tree, compile_rows, names_of, on_one_device
from genlm_bytes_smc.smc.lanes import (
    BeamLanes,
    ContextLanes,
    Lanes,
    StateLanes,
    gain_of,
    joined,
    read_by,
    revision,
    rows_of,
    sharpened,
)
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray


async def lanes_of(potential: Any) -> Lanes:
    """Return one lane of a leaf at the empty text."""
    if isinstance(potential, ByteLLM):
        return BeamLanes(await potential.lanes(1))
    if isinstance(potential, ByteConstraint):
        own = potential.spawn()
        return StateLanes(own, own.initial(1))
    if isinstance(potential, PowerMean):
        return EnsembleLanes([await Member.first(m) for m in potential.members], potential.mean)
    if isinstance(potential, Ensemble):
        members = [await Member.first(m) for m in (potential.p1, potential.p2)]
        return EnsembleLanes(members, _mean_of(potential))
    return ContextLanes(potential, [[]])


def _mean_of(ensemble: Ensemble) -> Mean:
    """Return the operation of an ensemble of genlm-control."""

    def mean(logs: torch.Tensor) -> torch.Tensor:
        with np.errstate(divide="ignore", over="ignore"):
            return send(ensemble.op(*logs.cpu().numpy()), logs.device)

    return mean


@dataclass(frozen=True)
class Member:
    """A member of an ensemble at D texts; a value.

    Attributes:
        tree: how its leaves' rows make its own.
        names: of its leaves.
        lanes: of its leaves, at the texts that it gives weight to.
        place: int64[D], the lane of each text, -1 for a text of weight zero.
        log_weight: float64[D], its prefix weight of each text, nats.
        blocks: rows of `lanes` once they are known.
    """

    tree: Tree
    names: Sequence[str]
    lanes: Sequence[Lanes]
    place: IntArray
    log_weight: FloatArray
    blocks: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    async def first(cls, potential: Any) -> Member:
        """Return a member at the empty text (D = 1)."""
        leaves: list[Any] = []
        tree = compile_rows(potential, leaves)
        lanes = [await lanes_of(leaf) for leaf in leaves]
        weight = np.array([float(await potential.prefix([]))])
        return cls(tree, names_of(leaves), lanes, np.zeros(1, dtype=np.int64), weight)._living()

    async def rows(self) -> torch.Tensor:
        """Return its log weights of each text with one symbol more, float64[D, 257], nats."""
        alive = np.flatnonzero(self.place >= 0)
        if not len(alive):
            return torch.full((len(self.place), N_SYMBOLS), -torch.inf, dtype=torch.float64)
        await self._know()
        own = self.tree(self.blocks)
        own = own + send(self.log_weight[alive], own.device)[:, None]
        rows = own.new_full((len(self.place), N_SYMBOLS), -torch.inf)
        rows[send(alive, own.device)] = own
        return rows

    async def _know(self) -> None:
        if not self.blocks:
            self.blocks.extend(await rows_of(self.lanes))

    async def within(self, target: torch.Tensor) -> bool:
        """Sharpen its leaves' rows where the target admits a symbol; return whether any changed.

        Args:
            target: float64[D, 257], see `Lanes.rows_within`.
        """
        if not self.blocks:
            return False
        mine = target[send(np.flatnonzero(self.place >= 0), target.device)]
        sharper = await sharpened(self.lanes, self.blocks, mine)
        self.blocks[:] = sharper or self.blocks
        return sharper is not None

    async def step(self, symbols: IntArray) -> Member:
        """Return it after a byte more in every text, int64[D]."""
        alive = np.flatnonzero(self.place >= 0)
        if not len(alive):
            return self
        lanes, told, _ = await read_by(self.lanes, symbols[alive])
        log_weight = self.log_weight.copy()
        log_weight[alive] += await self._gain(symbols[alive], told)
        return replace(self, lanes=lanes, log_weight=log_weight, blocks=[])._living()

    async def ended(self) -> FloatArray:
        """Return its log weight of each text as a whole one, float64[D], nats."""
        out, alive = np.full(len(self.place), -np.inf), np.flatnonzero(self.place >= 0)
        if len(alive):
            told = [await leaf.ended() for leaf in self.lanes]
            ends = np.full(len(alive), EOS_COLUMN)
            out[alive] = self.log_weight[alive] + await self._gain(ends, told)
        return out

    async def _gain(self, read: IntArray, told: Sequence[FloatArray | None]) -> FloatArray:
        """Return the log weight of the symbols that its lanes have read, nats."""
        texts = np.arange(len(read))
        if any(weight is None for weight in told) or not self.tree.local:
            await self._know()
        if self.tree.local:  # so that a leaf whose row was -inf may weigh something after all
            columns = [
                (self.blocks[i].cpu()[texts, read] if weight is None else torch.from_numpy(weight))
                for i, weight in enumerate(told)
            ]
            return self.tree([column[:, None] for column in columns])[:, 0].numpy()
        said: FloatArray = self.tree(self.blocks).cpu().numpy()[texts, read]
        exponents = self.tree.exponents(len(self.lanes))
        with np.errstate(invalid="ignore"):
            change = revision(self.names, exponents, self.blocks, texts, read, told)
            return np.where(said == -np.inf, -np.inf, said + change)

    def gather(self, texts: IntArray) -> Member:
        """Return it at the texts `texts` int64[D']."""
        return self._at(self.place[texts], self.log_weight[texts])

    def _living(self) -> Member:
        """Return it without the lanes of texts that it now gives weight zero."""
        dead = (self.log_weight == -np.inf) & (self.place >= 0)
        return self._at(np.where(dead, -1, self.place), self.log_weight) if dead.any() else self

    def _at(self, place: IntArray, log_weight: FloatArray) -> Member:
        kept = place[place >= 0]
        after = np.where(place >= 0, np.cumsum(place >= 0) - 1, -1)
        lanes = [leaf.gather(kept) for leaf in self.lanes] if len(kept) else []
        blocks = [b[send(kept, b.device)] for b in self.blocks] if len(kept) else []
        return replace(self, lanes=lanes, place=after, log_weight=log_weight, blocks=blocks)

    def joined(self, others: Sequence[Member]) -> Member:
        """Return it at these texts and then at those of others."""
        every = [self, *others]
        lanes = joined([member.lanes for member in every if (member.place >= 0).any()])
        place = np.concatenate([member.place for member in every])
        place = np.where(place >= 0, np.cumsum(place >= 0) - 1, -1)
        log_weight = np.concatenate([member.log_weight for member in every])
        return replace(self, lanes=lanes, place=place, log_weight=log_weight, blocks=[])


class EnsembleLanes(Lanes):
    """An ensemble at D texts.

    Args:
        members: at these texts.
        mean: log f of the members' log weights, float64[k, ...] to float64[...], nats.
    """

    def __init__(self, members: Sequence[Member], mean: Mean) -> None:
        self.members = tuple(members)
        self.mean = mean
        self.waits = any(lanes.waits for member in members for lanes in member.lanes)
        self.forecasts = any(lanes.forecasts for member in members for lanes in member.lanes)

    def _now(self) -> torch.Tensor:
        """Return the members' weights of the texts, float64[k, D], nats."""
        return torch.from_numpy(np.stack([m.log_weight for m in self.members]))

    async def rows(self) -> torch.Tensor:
        """See `Lanes`."""
        rows = await together([member.rows() for member in self.members])
        after = torch.stack(on_one_device(rows))
        return next_rows(self.mean, send(self._now(), after.device), after)

    async def rows_within(self, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `Lanes`."""
        changed = [await member.within(target) for member in self.members]
        return await self.rows() if any(changed) else rows

    async def step(self, symbols: IntArray) -> tuple[EnsembleLanes, FloatArray]:
        """See `Lanes`; the weight is of what the members' steps say."""
        members = await together([member.step(symbols) for member in self.members])
        after = EnsembleLanes(members, self.mean)
        return after, self._gain(after._now())

    async def ended(self) -> FloatArray | None:
        """See `Lanes`; the weight is of what the members say once they have read the end."""
        if not self.forecasts:
            return None
        whole = await together([member.ended() for member in self.members])
        return self._gain(torch.from_numpy(np.stack(whole)))

    def _gain(self, after: torch.Tensor) -> FloatArray:
        """Return log f of the members' weights `after`, float64[k, D], over that of now, nats."""
        return gain_of(self.mean(self._now()).numpy(), self.mean(after).numpy())

    def gather(self, lanes: IntArray) -> EnsembleLanes:
        """See `Lanes`."""
        return EnsembleLanes([member.gather(lanes) for member in self.members], self.mean)

    def joined(self, others: Sequence[EnsembleLanes]) -> EnsembleLanes:
        """See `Lanes`."""
        each = zip(self.members, *(other.members for other in others), strict=True)
        return EnsembleLanes([first.joined(more) for first, *more in each], self.mean)

    def remembering(self) -> EnsembleLanes:
        """See `Lanes`."""
        return self._each(lambda leaf, alive: leaf.remembering())

    def seeded(self, seeds: Sequence[int | None]) -> EnsembleLanes:
        """See `Lanes`."""
        return self._each(lambda leaf, alive: leaf.seeded([seeds[i] for i in alive.tolist()]))

    def salted(self, salt: KeyArray) -> EnsembleLanes:
        """See `Lanes`."""
        return self._each(lambda leaf, alive: leaf.salted(salt[alive]))

    def _each(self, change: Any) -> EnsembleLanes:
        """Return it with leaves changed by a function of each and of the texts it is at."""
        members = []
        for member in self.members:
            alive = np.flatnonzero(member.place >= 0)
            lanes = [change(leaf, alive) for leaf in member.lanes]
            members.append(replace(member, lanes=lanes, blocks=[]))
        return EnsembleLanes(members, self.mean)
