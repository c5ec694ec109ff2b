"""Symbols as beams read them, checked where a user gives them: a byte, the end, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genlm_bytes_smc.lm.contexts import IntArray

N_BYTES = 256
EOS_COLUMN = N_BYTES  # of a [N, 257] block; as a symbol to `step`, the end of the text


def check_byte(byte: object) -> int:
    """`byte` as an int in 0..255.

    Raises:
        TypeError: not an integer. ValueError: out of range.
    """
    if isinstance(byte, bool) or not hasattr(byte, "__index__"):
        raise TypeError(f"a byte must be an integer in 0..255, got {byte!r}")
    value: int = byte.__index__()
    if not 0 <= value < N_BYTES:
        raise ValueError(f"a byte must be an integer in 0..255, got {value}")
    return value


def check_symbols(symbols: Sequence[int] | IntArray, n: int) -> IntArray:
    """One symbol for each of `n` lanes, int64[n]: a byte, 256 for the end, -1 for nothing.

    Raises:
        ValueError: a symbol out of range, or not one a lane.
    """
    out = np.asarray(symbols)
    if out.shape != (n,) or out.dtype.kind not in "iu":
        raise ValueError(
            f"step needs one integer symbol for each of {n} lanes, got shape {out.shape} of "
            f"dtype {out.dtype}"
        )
    if n and (out.min() < -1 or out.max() > EOS_COLUMN):
        raise ValueError(f"symbols run from -1 to {EOS_COLUMN}, got {out.min()} to {out.max()}")
    return out.astype(np.int64)
