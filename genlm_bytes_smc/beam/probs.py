"""One next-byte row as a user reads it, with the names of genlm-bytes' `LazyByteProbs`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.symbols import N_BYTES

if TYPE_CHECKING:
    from genlm.bytes import Chart

EOS = 257  # its place in a 258-vector, as genlm-bytes numbers them


class LazyByteProbs:
    """Log probabilities of the next byte.

    `row[b]` for a byte 0..255, `row[257]` for the end of the sequence, `row[None]` (or 256)
    for "end of token", which is no symbol here and always -inf; `.ps` is all 258 of them,
    float64; `.materialize()` a genlm-bytes `Chart` (a dictionary); `.pretty().top(5)` one with
    readable keys.

    Args:
        ps: the 258 numbers.
        log_space: whether they are logarithms, as those that a beam gives are.

    Raises:
        ValueError: another number of them.
    """

    _block: torch.Tensor
    log_space = True

    def __init__(self, ps: npt.ArrayLike, log_space: bool = True) -> None:
        if len(out := np.asarray(ps)) != EOS + 1:
            raise ValueError(f"a row has {EOS + 1} entries, got {len(out)}")
        self.ps, self.log_space = out, log_space

    @cached_property
    def ps(self) -> npt.NDArray[np.float64]:
        """All 258 log probabilities, float64, "end of token" and the end last."""
        ps = np.empty(N_BYTES + 2)
        ps[:-1] = self._block.detach().cpu().numpy()[0]
        ps[EOS], ps[N_BYTES] = ps[N_BYTES], -np.inf
        return ps

    @classmethod
    def of_lane(cls, block: torch.Tensor) -> LazyByteProbs:
        """From the float[1, 257] that a lone lane's `logp_next` gives; `ps` is made when used."""
        row = cls.__new__(cls)
        row._block = block
        return row

    @classmethod
    def from_row(cls, row: torch.Tensor) -> LazyByteProbs:
        """From float[257]: bytes and the end of the sequence, in nats."""
        return cls.of_lane(row[None])

    def __getitem__(self, b: int | None) -> float:
        """Log probability of a byte, of the end (257) or of "end of token" (None, 256).

        Raises:
            ValueError: another number. TypeError: not a number.
        """
        if b is not None:
            if isinstance(b, bool) or not hasattr(b, "__index__"):
                raise TypeError(f"a byte is an integer in 0..255, got {b!r}")
            if not 0 <= b.__index__() <= EOS:
                raise ValueError(f"a byte is in 0..255, 257 the end of the sequence; got {b}")
        return float(self.ps[N_BYTES if b is None else b])

    def materialize(self) -> Chart:
        """All of them by byte, None and 257."""
        from genlm.bytes import Chart  # takes seconds to import, and many programs never ask

        keys = [*range(N_BYTES), None, EOS]
        return Chart(-np.inf if self.log_space else 0, zip(keys, self.ps, strict=True))

    def pretty(self) -> Chart:
        """All of them by readable keys: one-byte `bytes`, "EOT" and "EOS"."""
        names = {None: "EOT", EOS: "EOS"}
        return self.materialize().map_keys(lambda key: names.get(key) or bytes([key]))

    def top(self, k: int) -> Chart:
        """Return the k likeliest, with readable keys."""
        return self.pretty().top(k)

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}: {value:.4f}" for key, value in self.top(5).items())
        return f"LazyByteProbs({shown}, …)"

    def _repr_html_(self) -> str:
        rows: Any = self.top(10)
        return str(rows._repr_html_())
