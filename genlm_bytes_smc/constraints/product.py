"""Products of byte potentials with genlm-control's potentials over bytes as integers."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from genlm.control.potential.base import Potential
from genlm.control.potential.built_in.wfsa import WFSA
from genlm.control.potential.product import Product
from genlm.control.typing import Atomic

from genlm_bytes_smc.alphabet import TABLES
from genlm_bytes_smc.constraints.relabelled import OverBytes, speaks_bytes


class ByteProduct(Product):  # type: ignore[misc]
    """genlm-control's `Product`, which can be multiplied by what its factors can."""

    def __mul__(self, other: Potential) -> ByteProduct:
        return times(self, other)


def times(own: Potential, other: Potential) -> ByteProduct:
    """The product of a potential over bytes and another.

    An automaton of genlm-control (`BoolFSA`, `WFSA`) is compiled to tables on the device of
    `own` first (`constraints.from_genlm`); another potential over integer bytes (its grammars)
    is taken over `bytes` tokens. They stand on the right: genlm-control's own `*` is asked
    where they stand on the left, and it refuses.
    """
    if isinstance(other, WFSA):
        from genlm_bytes_smc.constraints.base import ConstraintError  # which imports this module
        from genlm_bytes_smc.constraints.genlm_fsa import from_genlm

        with suppress(ConstraintError):  # what has no tables is taken as it is
            other = from_genlm(other, device=_device(own))
    if isinstance(other, Potential) and other.token_type == Atomic(int):
        if speaks_bytes(other):
            return ByteProduct(own, OverBytes(other))
        other = other.coerce(own, f=b"".join, prune=False, tables=TABLES)
    return ByteProduct(own, other)


def _device(potential: Any) -> Any:
    """Where a potential, or the first factor of a product that can say, has its tables."""
    if isinstance(potential, Product):
        first = _device(potential.p1)
        return _device(potential.p2) if first is None else first
    return getattr(potential, "device", None)
