"""The factors of a target, each seen as a row of log weights for D distinct texts.

A target is a tree of genlm-control potentials. Its leaves are looked at in one of three ways:

- a byte language model (it has `lanes`) as byte beams, one a text;
- a `ByteConstraint` as a vector of states;
- any other potential over bytes by its `batch_logw_next` on the texts.

The inner nodes (products, powers, normalised potentials) are arithmetic on rows.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from genlm.control.potential.autobatch import AutoBatchedPotential
from genlm.control.potential.base import Potential
from genlm.control.potential.normalized import Normalized
from genlm.control.potential.product import Product
from genlm.control.potential.tempered import Tempered

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.rng import start_keys
from genlm_bytes_smc.constraints.base import ByteConstraint
from genlm_bytes_smc.smc.resampling import IntArray

T = TypeVar("T")
Blocks = Sequence[torch.Tensor]
Combine = Callable[[Blocks], torch.Tensor]

_KEEP_EVERY = 64  # steps between two clearings of a constraint's memory


@runtime_checkable
class HasLanes(Protocol):
    """A potential that can be run as byte beams side by side (a `ByteLLM`)."""

    async def lanes(self, n: int) -> ByteLanes:
        """N lanes that have read the prompt and nothing else."""
        ...


@runtime_checkable
class StartsItself(Protocol):
    """A leaf that knows how to begin (a look-ahead)."""

    async def first_factor(self) -> Factor:
        """Its factor at the empty text."""
        ...


class Factor(ABC):
    """What one factor knows about D distinct unfinished texts; a value.

    Attributes:
        waits: whether `block` may wait for something, so that factors should wait together.
    """

    waits = True

    @abstractmethod
    async def block(self) -> torch.Tensor:
        """Log weights of the next byte and of the end: float64[D, 257], nats."""

    @abstractmethod
    async def step(self, parents: IntArray, symbols: IntArray) -> Factor:
        """For the texts `parents` int64[D'], each followed by a byte `symbols` int64[D']."""


class LanesFactor(Factor):
    """A language model, as byte beams."""

    def __init__(self, lanes: ByteLanes) -> None:
        self.lanes = lanes

    @classmethod
    async def start(cls, potential: HasLanes, beam_seed: int | None) -> LanesFactor:
        """At the empty text.

        Args:
            potential: the language model.
            beam_seed: with `prune="unbiased"`, makes the draws after the prompt those of
                this seed instead of the parameters' own.
        """
        lanes = await potential.lanes(1)
        if beam_seed is not None and lanes.params.unbiased:
            key = lanes.state.key ^ start_keys(np.array([beam_seed], dtype=np.uint64))
            lanes = lanes.replace(lanes.state._replace(key=key), log_z=lanes.log_z)
        return cls(lanes)

    async def block(self) -> torch.Tensor:
        """See `Factor`."""
        return await self.lanes.logp_next()

    async def step(self, parents: IntArray, symbols: IntArray) -> LanesFactor:
        """See `Factor`."""
        same = len(parents) == len(self.lanes) and bool((parents[1:] > parents[:-1]).all())
        lanes = self.lanes if same else self.lanes.gather(parents)
        return LanesFactor(await lanes.step(symbols))


class StatesFactor(Factor):
    """A constraint, as a vector of states; it waits for nothing.

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

    @classmethod
    def start(cls, potential: ByteConstraint) -> StatesFactor:
        """At the empty text."""
        own = potential.spawn()
        return cls(own, own.initial(1))

    async def block(self) -> torch.Tensor:
        """See `Factor`."""
        return self.constraint.block(self.state)

    async def step(self, parents: IntArray, symbols: IntArray) -> StatesFactor:
        """See `Factor`."""
        device = self.state.device
        before = self.state[torch.from_numpy(parents).to(device)]
        state = self.constraint.step(before, torch.from_numpy(symbols).to(device))
        if (self.age + 1) % _KEEP_EVERY == 0:
            self.constraint.keep([state])
        return StatesFactor(self.constraint, state, self.age + 1)


class ContextsFactor(Factor):
    """Any potential over bytes, asked about whole texts."""

    def __init__(self, potential: Any, contexts: list[list[bytes]]) -> None:
        self.potential = potential
        self.contexts = contexts

    async def block(self) -> torch.Tensor:
        """See `Factor`."""
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

    async def step(self, parents: IntArray, symbols: IntArray) -> ContextsFactor:
        """See `Factor`."""
        pairs = zip(parents.tolist(), symbols.tolist(), strict=True)
        return ContextsFactor(self.potential, [[*self.contexts[p], BYTES[b]] for p, b in pairs])


async def start_factor(potential: Any, beam_seed: int | None) -> Factor:
    """The factor of a leaf, at the empty text (D = 1)."""
    if isinstance(potential, StartsItself):
        return await potential.first_factor()
    if isinstance(potential, HasLanes):
        return await LanesFactor.start(potential, beam_seed)
    if isinstance(potential, ByteConstraint):
        return StatesFactor.start(potential)
    return ContextsFactor(potential, [[]])


def compile_rows(potential: Any, leaves: list[Any]) -> Combine:
    """How the rows of leaves make the rows of a tree of potentials.

    Args:
        potential: the tree.
        leaves: its leaves are appended, each object once; what is returned takes their
            blocks in this order.
    """
    if isinstance(potential, AutoBatchedPotential):
        return compile_rows(potential.potential, leaves)
    if isinstance(potential, Product):
        one, other = compile_rows(potential.p1, leaves), compile_rows(potential.p2, leaves)
        return lambda blocks: _sum(one(blocks), other(blocks))
    if isinstance(potential, Tempered):
        inner, beta = compile_rows(potential.p, leaves), potential.beta
        return lambda blocks: _scale(inner(blocks), beta)
    if isinstance(potential, Normalized):
        whole = compile_rows(potential.p, leaves)
        return lambda blocks: _normalise(whole(blocks))
    check_alphabet(potential)
    at = next((i for i, leaf in enumerate(leaves) if leaf is potential), len(leaves))
    if at == len(leaves):
        leaves.append(potential)
    return lambda blocks: blocks[at]


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
    """The factors of a product, however nested."""
    if isinstance(target, AutoBatchedPotential):
        yield from factors_of(target.potential)
    elif isinstance(target, Product):
        yield from factors_of(target.p1)
        yield from factors_of(target.p2)
    else:
        yield target


def has_language_model(potential: Any) -> bool:
    """Whether a byte language model is among a potential's parts, however deep."""
    seen: list[Any] = []
    stack = [potential]
    while stack:
        part = stack.pop()
        if isinstance(part, HasLanes) or type(part).__name__ == "ByteLLM":
            return True
        if isinstance(part, Potential) and not any(part is s for s in seen):
            seen.append(part)
            values = list(vars(part).values())
            stack.extend(v for v in values if isinstance(v, Potential))
            stack.extend(w for v in values if isinstance(v, list | tuple) for w in v[:64])
    return False


def name_of(potential: Any) -> str:
    """A short name for messages: its own `repr` where it has one, else its type."""
    kind = type(potential)
    if getattr(kind, "__repr__", None) is getattr(object, "__repr__", None):
        return kind.__name__
    text = repr(potential)
    return text if len(text) <= 60 else text[:59] + "…"


def names_of(leaves: Iterable[Any]) -> tuple[str, ...]:
    """Names of leaves, numbered where they are equal."""
    names: list[str] = []
    for leaf in leaves:
        name, k = name_of(leaf), 2
        while name in names:
            name, k = f"{name_of(leaf)} #{k}", k + 1
        names.append(name)
    return tuple(names)


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of concurrent calls; if one fails or we are cancelled, none is left running."""
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
    if a.device != b.device:
        device = b.device if a.device.type == "cpu" else a.device
        a, b = a.to(device), b.to(device)
    return a + b


def _scale(rows: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.where(torch.isneginf(rows), rows, rows * beta)


def _normalise(rows: torch.Tensor) -> torch.Tensor:
    total = torch.logsumexp(rows, dim=1, keepdim=True)
    return torch.where(torch.isneginf(total), rows, rows - total)
