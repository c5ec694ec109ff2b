"""The factors of a target: what each knows about D unfinished texts, and how they combine.

A target is a tree of genlm-control potentials. Each leaf gives `Lanes`, which propose and weigh:

- `rows` proposes: log weights of every next byte and of the end, from which bytes are drawn;
- `step` reads a byte and weighs it: by the entry of the row, or by a better number that is
  known only once the byte is read. Particles are weighed by what `step` says.

The inner nodes (products, powers, normalised potentials) are arithmetic on rows (`Tree`).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from genlm.control.potential.autobatch import AutoBatchedPotential
from genlm.control.potential.base import Potential
from genlm.control.potential.normalized import Normalized
from genlm.control.potential.product import Product
from genlm.control.potential.tempered import Tempered

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.beam.rng import KeyArray, mix, start_keys
from genlm_bytes_smc.constraints.base import ByteConstraint
from genlm_bytes_smc.lm.transfer import send
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

T = TypeVar("T")

_KEEP_EVERY = 64  # steps between two clearings of a constraint's memory
_TIMES, _NORMALISED = "times", "normalised"


class BadWeightError(ValueError):
    """A factor, proposal or critic gave NaN or +inf where a log weight is due."""


class Lanes(ABC):
    """One factor at D unfinished texts, a lane each; a value.

    Attributes:
        waits: whether `rows` may wait for something, so that factors should wait together.
    """

    waits = True

    @abstractmethod
    async def rows(self) -> torch.Tensor:
        """Return log weights of the next byte and of the end: float64[D, 257], nats."""

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
            symbols: int64[D], 0..255. The end of a text is not read: its row weighs it.

        Returns:
            The lanes after the bytes, and the log weight of each byte, float64[D], nats. None
            stands for the entries of `rows`. Where a row gives a byte -inf, so must the step.
        """

    @abstractmethod
    def gather(self, lanes: IntArray) -> Lanes:
        """Return the lanes `lanes` int64[D'], in that order, repeats allowed."""

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

    @property
    def engine(self) -> Any:
        """The token-level engine that computes its rows."""
        return self.lanes.model.engine

    async def rows(self) -> torch.Tensor:
        """See `Lanes`."""
        rows: torch.Tensor = await self.lanes.rows()
        return rows

    async def rows_within(self, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `Lanes`."""
        if self.lanes.params.prune != "deferred":
            return rows
        within = torch.where(torch.isneginf(target), -torch.inf, rows)
        share = torch.exp(torch.logsumexp(within, 1) - torch.logsumexp(rows, 1))
        sharper: torch.Tensor = await self.lanes.rows_within(share.nan_to_num(1.0).cpu().numpy())
        return sharper

    async def step(self, symbols: IntArray) -> tuple[BeamLanes, FloatArray | None]:
        """See `Lanes`; deferred beams know the weight of a byte once they have read it."""
        after = await self.lanes.step(symbols)
        if self.lanes.params.prune != "deferred":
            return BeamLanes(after), None
        with np.errstate(invalid="ignore"):
            gain = np.where(after.log_z > -np.inf, after.log_z - self.lanes.log_z, -np.inf)
        return BeamLanes(after), gain

    def gather(self, lanes: IntArray) -> BeamLanes:
        """See `Lanes`."""
        return BeamLanes(self.lanes.gather(lanes))

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


class StateLanes(Lanes):
    """A constraint as a vector of states; it waits for nothing.

    Args:
        constraint: one that nobody else uses, as its memory is cleared now and then.
        state: int64[D].
        age: steps since the empty text.
    """

    waits = False

    def __init__(self, constraint: ByteConstraint, state: torch.Tensor, age: int = 0) -> None:
        self.constraint = constraint
        self.state = state
        self.age = age

    async def rows(self) -> torch.Tensor:
        """See `Lanes`."""
        return self.constraint.block(self.state)

    async def step(self, symbols: IntArray) -> tuple[StateLanes, None]:
        """See `Lanes`."""
        state = self.constraint.step(self.state, send(symbols, self.state.device))
        if (self.age + 1) % _KEEP_EVERY == 0:
            self.constraint.keep([state])
        return StateLanes(self.constraint, state, self.age + 1), None

    def gather(self, lanes: IntArray) -> StateLanes:
        """See `Lanes`."""
        at = send(lanes, self.state.device)
        return StateLanes(self.constraint, self.state[at], self.age)


class ContextLanes(Lanes):
    """Any other potential over bytes, asked about whole texts by `batch_logw_next`."""

    def __init__(self, potential: Any, contexts: list[list[bytes]]) -> None:
        self.potential = potential
        self.contexts = contexts

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


async def lanes_of(potential: Any) -> Lanes:
    """Return one lane of a leaf at the empty text."""
    if isinstance(potential, ByteLLM):
        return BeamLanes(await potential.lanes(1))
    if isinstance(potential, ByteConstraint):
        own = potential.spawn()
        return StateLanes(own, own.initial(1))
    return ContextLanes(potential, [[]])


class Rows(NamedTuple):
    """Log weights of what may come next after each of D distinct texts, nats.

    Attributes:
        blocks: one float64[D, 257] a factor.
        target: float64[D, 257], unnormalised.
        proposal: float64[D, 257] to draw from, unnormalised; None: the target itself.
    """

    blocks: Sequence[torch.Tensor]
    target: torch.Tensor
    proposal: torch.Tensor | None


@dataclass(frozen=True)
class Tree:
    """The arithmetic that makes log weights of a tree of potentials from those of its leaves.

    Attributes:
        code: the tree in postfix order: the number of a leaf (int), a power of what is before
            it (float), the product of the two before it, or the one before it normalised.
    """

    code: tuple[int | float | str, ...]

    def __call__(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Combine the blocks of all leaves, float64[D, 257] each, to one."""
        stack: list[torch.Tensor] = []
        for op in self.code:
            if isinstance(op, int):
                stack.append(blocks[op])
            elif isinstance(op, float):
                stack[-1] = torch.where(torch.isneginf(stack[-1]), stack[-1], stack[-1] * op)
            elif op == _TIMES:
                other = stack.pop()
                same = stack[-1].device == other.device
                stack[-1] = stack[-1] + other if same else _sum(stack[-1], other)
            else:
                stack[-1] = normalised(stack[-1])
        return stack[-1]

    def exponents(self, n_leaves: int) -> FloatArray:
        """Return the power that the tree raises each leaf to, float64[n_leaves].

        A change of a leaf's log weight of one symbol changes that of the tree by as much times
        this, while the sum that a normalised potential divides by stays that of its row.
        """
        stack: list[FloatArray] = []
        for op in self.code:
            if isinstance(op, int):
                stack.append(np.eye(n_leaves)[op])
            elif isinstance(op, float):
                stack[-1] = stack[-1] * op
            elif op == _TIMES:
                other = stack.pop()
                stack[-1] = stack[-1] + other
        return stack[-1]


def compile_rows(potential: Any, leaves: list[Any]) -> Tree:
    """Find the leaves of a tree of potentials, and how their rows combine.

    Args:
        potential: the tree.
        leaves: its leaves are appended, each object once; the tree that is returned numbers
            them by their place in it.
    """
    return Tree(tuple(_code(potential, leaves)))


def _code(potential: Any, leaves: list[Any]) -> Iterator[int | float | str]:
    if isinstance(potential, AutoBatchedPotential):
        yield from _code(potential.potential, leaves)
    elif isinstance(potential, Product):
        yield from _code(potential.p1, leaves)
        yield from _code(potential.p2, leaves)
        yield _TIMES
    elif isinstance(potential, Tempered):
        yield from _code(potential.p, leaves)
        yield float(potential.beta)
    elif isinstance(potential, Normalized):
        yield from _code(potential.p, leaves)
        yield _NORMALISED
    else:
        check_alphabet(potential)
        at = next((i for i, leaf in enumerate(leaves) if leaf is potential), len(leaves))
        if at == len(leaves):
            leaves.append(potential)
        yield at


def check_alphabet(potential: Any) -> None:
    """Raise unless every token of a potential is one byte.

    Raises:
        TypeError: no potential. ValueError: other tokens.
    """
    if not isinstance(potential, Potential):
        raise TypeError(
            f"a genlm-control Potential over bytes is due, got {type(potential).__name__}"
        )
    if potential.vocab is BYTES:
        return
    odd = [t for t in potential.vocab if not (isinstance(t, bytes) and len(t) == 1)]
    if odd:
        raise ValueError(
            f"{name_of(potential)} is over other tokens than single bytes, such as {odd[0]!r}; "
            'coerce it: potential.coerce(byte_llm, f=b"".join)'
        )


def factors_of(target: Any) -> Iterator[Any]:
    """Yield the factors of a product, however nested."""
    if isinstance(target, AutoBatchedPotential):
        yield from factors_of(target.potential)
    elif isinstance(target, Product):
        yield from factors_of(target.p1)
        yield from factors_of(target.p2)
    else:
        yield target


def has_language_model(potential: Any) -> bool:
    """Return whether a byte language model is among a potential's parts, however deep.

    genlm-control's own `ByteLLM`, which this package does not import, counts by its name.
    """
    seen: list[Any] = []
    stack = [potential]
    while stack:
        part = stack.pop()
        if isinstance(part, ByteLLM) or type(part).__name__ == "ByteLLM":
            return True
        if isinstance(part, Potential) and not any(part is s for s in seen):
            seen.append(part)
            values = list(vars(part).values())
            stack.extend(v for v in values if isinstance(v, Potential))
            stack.extend(w for v in values if isinstance(v, list | tuple) for w in v[:64])
    return False


def name_of(potential: Any) -> str:
    """Return a short name for messages: its own `repr` where it has one, else its type."""
    kind = type(potential)
    if getattr(kind, "__repr__", None) is getattr(object, "__repr__", None):
        return kind.__name__
    text = repr(potential)
    return text if len(text) <= 60 else text[:59] + "…"


def names_of(leaves: Iterable[Any]) -> tuple[str, ...]:
    """Return names of leaves, numbered where they are equal."""
    names: list[str] = []
    for leaf in leaves:
        name, k = name_of(leaf), 2
        while name in names:
            name, k = f"{name_of(leaf)} #{k}", k + 1
        names.append(name)
    return tuple(names)


def random_beams(leaves: Iterable[Any]) -> bool:
    """Return whether the beams of any of the leaves are random (`prune="unbiased"`)."""
    return any(getattr(getattr(leaf, "params", None), "unbiased", False) for leaf in leaves)


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await concurrent calls; if one fails or we are cancelled, leave none running."""
    if not calls:
        return []
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    device = b.device if a.device.type == "cpu" else a.device
    return a.to(device) + b.to(device)


def normalised(rows: torch.Tensor) -> torch.Tensor:
    """Subtract the log of each row's sum; a row of -inf stays."""
    total = torch.logsumexp(rows, dim=1, keepdim=True)
    return torch.where(torch.isneginf(total), rows, rows - total)
