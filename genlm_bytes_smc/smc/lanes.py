"""What each factor of a target knows about D unfinished texts: `Lanes`, which propose and weigh.

- `rows` proposes: log weights of every next byte and of the end, from which bytes are drawn;
- `step` reads a byte and weighs it: by the entry of the row, or by a better number that is
  known only once the byte is read. Particles are weighed by what `step` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.beam.pruning_numba import KeyArray, mix
from genlm_bytes_smc.beam.state import start_keys
from genlm_bytes_smc.calls import together
from genlm_bytes_smc.constraints.base import ByteConstraint
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.smc.factors import name_of
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

T = TypeVar("T")

_KEEP_EVERY = 64  # steps between two clearings of a constraint's memory


class BadWeightError(ValueError):
    """A factor, proposal or critic gave NaN or +inf where a log weight is due."""


class Lanes(ABC):
    """One factor at D unfinished texts, a lane each; a value.

    Attributes:
        waits: whether `rows` may wait for something, so that factors should wait together.
        forecasts: whether `ended` knows the weight of a whole text better than its row does.
    """

    waits = True
    forecasts = False

    @abstractmethod
    async def rows(self) -> torch.Tensor:
        """Return log weights of the next byte and of the end: float64[D, 257], nats.

        Those of language models are on the host, others where the factor has its tables.
        """

    async def rows_within(self, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return rows that may be more exact for the bytes that the whole target admits.

        Args:
            rows: what `rows` gave.
            target: float64[D, 257], log weights of the target; -inf where nothing is admitted.
        """
        return rows

    @abstractmethod
    async def step(self, symbols: IntArray) -> tuple[Lanes, FloatArray | None]:
        """Read a byte in every lane.

        Args:
            symbols: int64[D], 0..255. The end of a text is not read: `ended` weighs it.

        Returns:
            The lanes after the bytes, and the log weight of each byte, float64[D], nats. None
            stands for the entries of `rows`. Where a row gives a byte -inf, so must the step.
        """

    async def ended(self) -> FloatArray | None:
        """Return the log weight of ending each text here, float64[D], nats; None: as `rows`."""
        return None

    @abstractmethod
    def gather(self, lanes: IntArray) -> Lanes:
        """Return the lanes `lanes` int64[D'], in that order, repeats allowed."""

    def joined(self, others: Sequence[Self]) -> Lanes:
        """Return these lanes and then those of others of the same factor, of any lengths.

        Raises:
            NotImplementedError: texts of this factor cannot wait.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot wait")

    def remembering(self) -> Lanes:
        """Return lanes that forget nothing, as texts that wait will want it."""
        return self

    def seeded(self, seeds: Sequence[int | None]) -> Lanes:
        """Return lanes whose draws, if they make any, depend on a seed each from here on."""
        return self

    def salted(self, salt: KeyArray) -> Lanes:
        """Return lanes whose draws, if they make any, depend on `salt` uint64[D] from here on."""
        return self


class BeamLanes(Lanes):
    """A language model as byte beams, one a text."""

    def __init__(self, lanes: Any) -> None:
        self.lanes = lanes
        self.forecasts = lanes.params.prune == "deferred"

    async def rows(self) -> torch.Tensor:
        """See `Lanes`."""
        rows: torch.Tensor = await self.lanes.rows()
        return rows

    async def rows_within(self, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `Lanes`."""
        if not self.forecasts:
            return rows
        there = send(rows, target.device)
        within = torch.where(torch.isneginf(target), -torch.inf, there)
        share = torch.exp(torch.logsumexp(within, 1) - torch.logsumexp(there, 1))
        sharper: torch.Tensor = await self.lanes.rows_within(share.nan_to_num(1.0).cpu().numpy())
        return sharper

    async def step(self, symbols: IntArray) -> tuple[BeamLanes, FloatArray | None]:
        """See `Lanes`; deferred beams know the weight of a byte once they have read it."""
        after = await self.lanes.step(symbols)
        gain = gain_of(self.lanes.log_z, after.log_z) if self.forecasts else None
        return BeamLanes(after), gain

    async def ended(self) -> FloatArray | None:
        """See `Lanes`."""
        if not self.forecasts:
            return None
        whole = await self.lanes.step([EOS_COLUMN] * len(self.lanes))
        return gain_of(self.lanes.log_z, whole.log_z)

    def gather(self, lanes: IntArray) -> BeamLanes:
        """See `Lanes`."""
        return BeamLanes(self.lanes.gather(lanes))

    def joined(self, others: Sequence[BeamLanes]) -> BeamLanes:
        """See `Lanes`."""
        return BeamLanes(type(self.lanes).cat([self.lanes, *(other.lanes for other in others)]))

    def seeded(self, seeds: Sequence[int | None]) -> BeamLanes:
        """See `Lanes`; None leaves a lane's draws as they are."""
        if not self.lanes.params.unbiased or all(s is None for s in seeds):
            return self
        given = np.array([s is not None for s in seeds])
        keys = start_keys(np.array([s or 0 for s in seeds], dtype=np.uint64))
        return self._keyed(np.where(given, self.lanes.state.key ^ keys, self.lanes.state.key))

    def salted(self, salt: KeyArray) -> BeamLanes:
        """See `Lanes`."""
        if not self.lanes.params.unbiased:
            return self
        return self._keyed(mix(self.lanes.state.key ^ salt))

    def _keyed(self, key: KeyArray) -> BeamLanes:
        state = self.lanes.state._replace(key=key)
        return BeamLanes(self.lanes.replace(state, log_z=self.lanes.log_z))


@dataclass(eq=False)
class StateLanes(Lanes):
    """A constraint as a vector of states; it waits for nothing.

    Attributes:
        constraint: one that nobody else uses, as its memory is cleared now and then.
        state: int64[D].
        age: steps since the empty text; None: its memory is not cleared.
    """

    waits = False
    constraint: ByteConstraint
    state: torch.Tensor
    age: int | None = 0

    async def rows(self) -> torch.Tensor:
        """See `Lanes`."""
        return self.constraint.block(self.state)

    async def step(self, symbols: IntArray) -> tuple[StateLanes, None]:
        """See `Lanes`."""
        state = self.constraint.step(self.state, send(symbols, self.state.device))
        age = None if self.age is None else self.age + 1
        if age is not None and age % _KEEP_EVERY == 0:
            self.constraint.keep([state])
        return StateLanes(self.constraint, state, age), None

    def gather(self, lanes: IntArray) -> StateLanes:
        """See `Lanes`."""
        return replace(self, state=self.state[send(lanes, self.state.device)])

    def joined(self, others: Sequence[StateLanes]) -> StateLanes:
        """See `Lanes`."""
        return replace(self, state=torch.cat([self.state, *(other.state for other in others)]))

    def remembering(self) -> StateLanes:
        """See `Lanes`."""
        return replace(self, age=None)


@dataclass(eq=False)
class ContextLanes(Lanes):
    """Any other potential over bytes, asked about whole texts by `batch_logw_next`."""

    potential: Any
    contexts: list[list[bytes]]

    async def rows(self) -> torch.Tensor:
        """See `Lanes`."""
        lazy = await self.potential.batch_logw_next(self.contexts)
        block = torch.as_tensor(lazy.weights).double()
        wanted = (len(self.contexts), len(self.potential.vocab_eos))
        if tuple(block.shape) != wanted:
            raise ValueError(
                f"{name_of(self.potential)}.batch_logw_next returned weights of shape "
                f"{tuple(block.shape)}, expected {wanted}"
            )
        if self.potential.vocab is BYTES or self.potential.vocab == BYTES:
            return block
        out = block.new_full((len(block), N_SYMBOLS), -torch.inf)
        columns = [*(token[0] for token in self.potential.vocab), EOS_COLUMN]
        out[:, columns] = block
        return out

    async def step(self, symbols: IntArray) -> tuple[ContextLanes, None]:
        """See `Lanes`."""
        read = zip(self.contexts, symbols.tolist(), strict=True)
        return ContextLanes(self.potential, [[*text, BYTES[b]] for text, b in read]), None

    def gather(self, lanes: IntArray) -> ContextLanes:
        """See `Lanes`."""
        return ContextLanes(self.potential, [self.contexts[i] for i in lanes.tolist()])

    def joined(self, others: Sequence[ContextLanes]) -> ContextLanes:
        """See `Lanes`."""
        every = [*self.contexts, *(context for other in others for context in other.contexts)]
        return ContextLanes(self.potential, every)


class Rows(NamedTuple):
    """Log weights of what may come next after each of D distinct texts, nats.

    Attributes:
        blocks: one float64[D, 257] a factor, each on its own device.
        target: float64[D, 257], unnormalised.
        proposal: float64[D, 257] to draw from, unnormalised, on the target's device; None: the
            target itself.
    """

    blocks: Sequence[torch.Tensor]
    target: torch.Tensor
    proposal: torch.Tensor | None


async def rows_of(lanes: Sequence[Lanes]) -> list[torch.Tensor]:
    """Return the rows of several factors; language models of one engine share a forward."""
    slow = [factor for factor in lanes if factor.waits]
    if len(slow) < 2:
        return [await factor.rows() for factor in lanes]
    found = iter(await together([factor.rows() for factor in slow]))
    return [next(found) if f.waits else await f.rows() for f in lanes]


async def sharpened(
    lanes: Sequence[Lanes], blocks: Sequence[torch.Tensor], target: torch.Tensor
) -> list[torch.Tensor] | None:
    """Return rows of factors that are more exact where the target admits a byte (see
    `Lanes.rows_within`); None if none are."""
    within = [await f.rows_within(b, target) for f, b in zip(lanes, blocks, strict=True)]
    return within if any(a is not b for a, b in zip(within, blocks, strict=True)) else None


async def read_by(
    lanes: Sequence[Lanes], symbols: IntArray
) -> tuple[list[Lanes], list[FloatArray | None], bool]:
    """Read a byte in the lanes of several factors, one factor after the other; see `Lanes.step`.

    Returns:
        The lanes after it, the weights that the factors say, and whether any says one.
    """
    after, weights, revised = list[Lanes](), list[FloatArray | None](), False
    for factor in lanes:
        stepped, weight = await factor.step(symbols)
        after.append(stepped)
        weights.append(weight)
        revised |= weight is not None
    return after, weights, revised


def joined(parts: Sequence[Sequence[Lanes]]) -> list[Lanes]:
    """Return the lanes of each factor in all parts, one part after the other."""
    return [first.joined(others) for first, *others in zip(*parts, strict=True)]


def gain_of(before: FloatArray, after: FloatArray) -> FloatArray:
    """Return after - before, nats; -inf where either is."""
    lost = (after == -np.inf) | (before == -np.inf)
    return np.where(lost, -np.inf, after - np.where(lost, 0.0, before))


def revision(
    names: Sequence[str],
    exponents: FloatArray,
    blocks: Sequence[torch.Tensor],
    parents: IntArray,
    symbols: IntArray,
    weights: Sequence[FloatArray | None],
) -> FloatArray:
    """Return the log weight of bytes that were read over what the tree's row said, nats.

    Args:
        names: of the leaves.
        exponents: float64[leaves], see `Tree.exponents`.
        blocks: the leaves' rows, float64[D, 257] each.
        parents: int64[D'], the row that each byte was drawn from.
        symbols: int64[D'], the bytes.
        weights: what the steps of the leaves returned.

    Returns:
        float64[D']: -inf where a step says so, whatever the sign of its power.

    Raises:
        BadWeightError: NaN or +inf.
    """
    out = np.zeros(len(symbols))
    for i, weight in enumerate(weights):
        if weight is None or exponents[i] == 0:
            continue
        bad = np.flatnonzero(np.isnan(weight) | (weight == np.inf))
        if len(bad):
            read = int(symbols[bad[0]])
            symbol = "the end" if read == EOS_COLUMN else f"the byte {bytes([read])!r}"
            raise BadWeightError(f"{names[i]} gave {weight[bad[0]]} to {symbol} that it has read")
        said = blocks[i].cpu().numpy()[parents, symbols]
        dead = weight == -np.inf
        change = exponents[i] * np.where(dead, 0.0, weight - np.where(dead, 0.0, said))
        out += np.where(dead, -np.inf, change)
    return out
