"""The factors of a target: the tree of potentials, its leaves and how they combine.

A target is a tree of genlm-control potentials. Its leaves give `lanes.Lanes`, which propose and
weigh; the inner nodes (products, powers, normalised potentials) are arithmetic on rows (`Tree`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from genlm.control.potential.autobatch import AutoBatchedPotential
from genlm.control.potential.base import Potential
from genlm.control.potential.normalized import Normalized
from genlm.control.potential.product import Product
from genlm.control.potential.tempered import Tempered

from genlm_bytes_smc.alphabet import BYTES
from genlm_bytes_smc.constraints.base import show
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc.resampling import FloatArray

_TIMES, _NORMALISED = "times", "normalised"


@dataclass(frozen=True)
class Tree:
    """The arithmetic that makes log weights of a tree of potentials from those of its leaves.

    Attributes:
        code: the tree in postfix order: the number of a leaf (int), a power of what is before
            it (float), the product of the two before it, or the one before it normalised.
    """

    code: tuple[int | float | str, ...]

    def __call__(self, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Combine the blocks of all leaves, float64[D, 257] each, to one.

        Rows of language models are on the host. A product is where a factor's block is that is
        not, or on the host if all are.
        """
        stack: list[torch.Tensor] = []
        for op in self.code:
            if isinstance(op, int):
                stack.append(blocks[op])
            elif isinstance(op, float):
                stack[-1] = torch.where(torch.isneginf(stack[-1]), stack[-1], stack[-1] * op)
            elif op == _TIMES:
                other = stack.pop()
                one, other = on_one_device([stack[-1], other])
                stack[-1] = one + other
            else:
                stack[-1] = normalised(stack[-1])
        return stack[-1]

    @property
    def local(self) -> bool:
        """Return whether the weight of a symbol needs the leaves' weights of that symbol alone."""
        return _NORMALISED not in self.code

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
        if not np.isfinite(potential.beta):
            raise ValueError(f"a power must be finite, got {potential.beta}")
        yield from _code(potential.p, leaves)
        yield float(potential.beta)
    elif isinstance(potential, Normalized):
        yield from _code(potential.p, leaves)
        yield _NORMALISED
    else:
        check_alphabet(potential)
        yield place_of(potential, leaves)


def place_of(leaf: Any, leaves: list[Any]) -> int:
    """Return the number of a leaf among the leaves, which it joins once."""
    at = next((i for i, other in enumerate(leaves) if other is leaf), len(leaves))
    if at == len(leaves):
        leaves.append(leaf)
    return at


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
    return any(isinstance(p, ByteLLM) or type(p).__name__ == "ByteLLM" for p in _parts(potential))


def engines_of(potentials: Iterable[Any]) -> tuple[Any, ...]:
    """Return the distinct token-level engines of all `ByteLLM`s in potentials, however deep."""
    models = [p for top in potentials for p in _parts(top) if isinstance(p, ByteLLM)]
    return tuple({id(m.model.engine): m.model.engine for m in models}.values())


def _parts(potential: Any) -> Iterator[Any]:
    """Yield a potential and every potential that it holds, each once."""
    seen: list[Any] = []
    stack = [potential]
    while stack:
        part = stack.pop()
        if any(part is s for s in seen):
            continue
        seen.append(part)
        yield part
        if isinstance(part, Potential):
            values = list(vars(part).values())
            stack.extend(v for v in values if isinstance(v, Potential))
            held = [w for v in values if isinstance(v, list | tuple) for w in v[:64]]
            stack.extend(w for w in held if isinstance(w, Potential))


def name_of(potential: Any) -> str:
    """Return a short name for messages: its own `repr` where it has one, else its type."""
    kind = type(potential)
    if getattr(kind, "__repr__", None) is getattr(object, "__repr__", None):
        return kind.__name__
    return show(potential)


def names_of(leaves: Iterable[Any]) -> tuple[str, ...]:
    """Return names of leaves, numbered where they are equal."""
    names: list[str] = []
    for leaf in leaves:
        name, k = name_of(leaf), 2
        while name in names:
            name, k = f"{name_of(leaf)} #{k}", k + 1
        names.append(name)
    return tuple(names)


def prunings(leaves: Iterable[Any]) -> set[str]:
    """Return the ways in which beams anywhere in the leaves are pruned."""
    params = [getattr(part, "params", None) for leaf in leaves for part in _parts(leaf)]
    return {p.prune for p in params if p is not None and hasattr(p, "prune")}


def random_beams(leaves: Iterable[Any]) -> bool:
    """Return whether beams anywhere in the leaves are random (`prune="unbiased"`)."""
    return "unbiased" in prunings(leaves)


def weights_are_sums(leaves: Sequence[Any]) -> bool:
    """Return whether a whole text weighs what the rows along it sum up to, without a critic."""
    models = [leaf for leaf in leaves if has_language_model(leaf)]
    return all(isinstance(m, ByteLLM) and m.params.prune == "topk" for m in models)


def on_one_device(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors on the device of the first that is not on the host, if there is one."""
    first = tensors[0].device
    if all(t.device == first for t in tensors):
        return list(tensors)
    device = next(t.device for t in tensors if t.device.type != "cpu")
    return [send(t, device) for t in tensors]


def normalised(rows: torch.Tensor) -> torch.Tensor:
    """Subtract the log of each row's sum; a row of -inf stays."""
    total = torch.logsumexp(rows, dim=1, keepdim=True)
    return torch.where(torch.isneginf(total), rows, rows - total)
