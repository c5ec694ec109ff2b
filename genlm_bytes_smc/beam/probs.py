"""One next-byte row as a user reads it: genlm-bytes' `LazyByteProbs`, checked and drawn."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from genlm.bytes.util import Chart
from genlm.bytes.util import LazyByteProbs as _LazyByteProbs

from genlm_bytes_smc.beam.kernels import N_BYTES

EOS = 257  # its place in a 258-vector, as genlm-bytes numbers them


class LazyByteProbs(_LazyByteProbs):  # type: ignore[misc]
    """Log probabilities of the next byte.

    `row[b]` for a byte 0..255, `row[257]` for the end of the sequence, `row[None]` (or 256)
    for "end of token", which is no symbol here and always -inf; `.ps` is all 258 of them,
    float64; `.materialize()` a dictionary; `.pretty().top(5)` one with readable keys.
    """

    _block: torch.Tensor
    log_space = True

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
        return float(super().__getitem__(b))

    def top(self, k: int) -> Chart:
        """The k likeliest, with readable keys."""
        return self.pretty().top(k)

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}: {value:.4f}" for key, value in self.top(5).items())
        return f"LazyByteProbs({shown}, …)"

    def _repr_html_(self) -> str:
        rows: Any = self.top(10)
        return str(rows._repr_html_())
