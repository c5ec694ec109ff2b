"""Loops that take rows of log-probabilities in and make them linear, compiled; and their arrays.

Exponentials are written out (range reduction by 2, then a Taylor polynomial in Horner's form; Cody
& Waite 1980, chapter 6), so that the compiler makes vector code of the loops that take them. Their
relative error is below 1e-7 for float32 rows, whose own rounding is larger, and below 1e-14 for
float64 rows.

A float32 row is stored as `exp(logp + BIAS)`: single precision ends at exp(-87), and with
the bias tokens down to LOWEST nats keep their full relative precision.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.lm.contexts_numba import IntArray

FloatArray = npt.NDArray[np.float64]

FAN = 257  # labels of a heavy node: one a byte, and one for tokens that end there

DOUBLINGS = 115
BIAS = DOUBLINGS * 0.6931471805599453
UNBIAS = float(np.exp(-BIAS))
LOWEST = -165.0  # nats; below it, float32 rows cannot hold a token and float64 ones are used
LEAST = -740.0  # nats; below it a token is impossible

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LN2_HIGH_32, _LN2_LOW_32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = 6755399441055744.0  # 1.5 * 2**52: added, the low bits hold the nearest integer
_ROUND_32 = np.float32(12582912.0)  # 1.5 * 2**23
_HIGHEST_32 = np.float32(9.01)  # rounds to 13 doublings: with DOUBLINGS the exponent of inf
_ZERO_32 = np.float32(-167.7)  # to -242: the exponent of zero
_C = tuple(1.0 / float(np.prod(np.arange(1.0, k + 1))) for k in range(13))
_C32 = tuple(np.float32(c) for c in _C)
_LOG2E_32 = np.float32(_LOG2E)
_LOWEST_32, _LEAST_32 = np.float32(LOWEST), np.float32(LEAST)

# No reassociation here: `x + _ROUND - _ROUND` must stay what it is.
_EXACT = {"contract"}
_SUM = {"reassoc", "nsz", "contract", "arcp"}


def _bitcast(source: Any, target: Any, llvm: Any) -> Any:
    def cast(typingctx, x):
        def code(context, builder, signature, args):
            return builder.bitcast(args[0], llvm)

        return target(source), code

    return intrinsic(cast)


_f64_of = _bitcast(types.int64, types.float64, ir.DoubleType())
_i64_of = _bitcast(types.float64, types.int64, ir.IntType(64))
_f32_of = _bitcast(types.int32, types.float32, ir.FloatType())
_i32_of = _bitcast(types.float32, types.int32, ir.IntType(32))


@nb.njit(inline="always")
def _exp32(x):
    """exp(x + BIAS), float32; NaN stays NaN, above 9.1 comes inf, below -167.4 0."""
    y = _HIGHEST_32 if x > _HIGHEST_32 else x
    y = _ZERO_32 if y < _ZERO_32 else y
    t = y * _LOG2E_32 + _ROUND_32
    n = t - _ROUND_32
    r = (y - n * _LN2_HIGH_32) - n * _LN2_LOW_32
    p = _C32[7]
    p = p * r + _C32[6]
    p = p * r + _C32[5]
    p = p * r + _C32[4]
    p = p * r + _C32[3]
    p = p * r + _C32[2]
    p = p * r + _C32[1]
    p = p * r + _C32[0]
    exponent = _i32_of(t) - np.int32(0x4B400000 - DOUBLINGS - 127)
    return p * _f32_of(np.int32(exponent << np.int32(23)))


@nb.njit(inline="always")
def _exp64(x):
    """exp(x), float64; NaN stays NaN, above 709.8 comes inf, below -745 0."""
    y = 710.0 if x > 710.0 else x
    y = -746.0 if y < -746.0 else y
    t = y * _LOG2E + _ROUND
    n = t - _ROUND
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    p = _C[12]
    p = p * r + _C[11]
    p = p * r + _C[10]
    p = p * r + _C[9]
    p = p * r + _C[8]
    p = p * r + _C[7]
    p = p * r + _C[6]
    p = p * r + _C[5]
    p = p * r + _C[4]
    p = p * r + _C[3]
    p = p * r + _C[2]
    p = p * r + _C[1]
    p = p * r + _C[0]
    k = _i64_of(t) - np.int64(0x4338000000000000)
    half = k >> np.int64(1)
    a = _f64_of(np.int64((half + np.int64(1023)) << np.int64(52)))
    b = _f64_of(np.int64((k - half + np.int64(1023)) << np.int64(52)))
    return p * a * b


@inner(fastmath=_SUM)
def _count_low(row):
    """Return how many possible tokens are too unlikely for float32."""
    count = np.float32(0)
    for i in range(len(row)):
        low = (row[i] < _LOWEST_32) & (row[i] > _LEAST_32)
        count += np.float32(1) if low else np.float32(0)
    return count


@intrinsic
def _plus(typingctx, a, b):
    """Add in any order: sums over a loop become vector code, whatever its other flags."""

    def code(context, builder, signature, args):
        return builder.fadd(*args, flags=("reassoc", "nsz", "contract"))

    return a(a, b), code


@inner(fastmath=_EXACT)
def _fill32(row, out):
    """out[:] = exp(row + BIAS); its sum, and the largest pattern of bits in `row`.

    As integers without sign, the bits of the lowest of some negative numbers are the largest.
    """
    total = np.float32(0.0)
    bits = np.uint32(0)
    for i in range(len(out)):
        x = row[i]
        p = _exp32(x)
        out[i] = p
        total = _plus(total, p)
        bits = max(bits, np.uint32(_i32_of(x)))
    return total, bits


@inner(fastmath=_EXACT)
def _fill64(row, out):
    """out[:] = exp(row); its sum."""
    total = 0.0
    for i in range(len(out)):
        p = _exp64(np.float64(row[i]))
        out[i] = p
        total = _plus(total, p)
    return total


@entry()
def take_32(rows, slots, probs, scale, summed, rounding):
    """probs[slots] = exp(rows + BIAS), read and summed in one pass.

    rows float32[B, >= V], slots int64[B], probs float32[S, V]; scale float64[S] and summed
    bool[S], which are set to what rows begin with. Returns the sums over all V columns
    without the bias, float64[B]; whether a possible token is too unlikely to be held
    in float32; and whether some sum is further than `rounding` from one (or NaN). Blocks are
    summed in float32, which vector code does to 1e-7 of the sum, and added up in float64.
    """
    n, width = len(slots), probs.shape[1]
    total = full(n, 0.0)
    low, odd = False, False
    for i in range(n):
        lowest = np.uint32(0)
        for a in range(0, width, 4096):
            b = min(width, a + 4096)
            part, bits = _fill32(rows[i, a:b], probs[slots[i], a:b])
            total[i] += np.float64(part)
            lowest = max(lowest, bits)
        if lowest > np.uint32(_i32_of(_LOWEST_32)):  # or NaN, or impossible tokens: look again
            low |= _count_low(rows[i, :width]) > 0
        total[i] *= UNBIAS
        scale[slots[i]], summed[slots[i]] = UNBIAS, False
        odd |= not abs(total[i] - 1.0) <= rounding
    return total, low, odd


@entry()
def take_64(rows, slots, probs, scale, summed, rounding):
    """probs[slots] = exp(rows): as `take_32`, float64, for rows of either precision."""
    total = full(len(slots), 0.0)
    odd = False
    for i in range(len(slots)):
        total[i] = _fill64(rows[i], probs[slots[i]])
        scale[slots[i]], summed[slots[i]] = 1.0, False
        odd |= not abs(total[i] - 1.0) <= rounding
    return total, False, odd


@entry(fastmath=_SUM)
def masked_total(row, mask):
    """Sum of row[V] where mask bool[V] holds."""
    s = 0.0
    for i in range(len(mask)):
        s += np.float64(row[i]) if mask[i] else 0.0
    return s


class RowArrays(NamedTuple):
    """Arrays that the compiled kernels read (and `roots`, `summed`, which they fill).

    Attributes:
        probs: float32 or float64 [S, V], probabilities times a constant, by token id.
        scale: float64[S], what brings a slot's numbers to probabilities.
        roots: float64[S, H * 257], mass below each byte after each heavy node.
        summed: bool[S], whether `roots` holds a slot's masses.
        order: uint32[T], token id at each position of the trie.
        heavy: int64[H], nodes with much of the vocabulary below them, each before those below
            it, the root first.
        nest: int64[H, 3], for each: the index of the heavy node above it, the byte from there,
            and the index behind the last one below it.
        labels: uint16[V], for each token 257 h + b, where h is the index of the last heavy node
            on the way to it and b the byte after that (256: none); 257 H if it spells nothing.
        slot_of: int64[contexts + 1], slot of each context.
    """

    probs: npt.NDArray[Any]
    scale: FloatArray
    roots: FloatArray
    summed: npt.NDArray[np.bool_]
    order: npt.NDArray[np.uint32]
    heavy: IntArray
    nest: IntArray
    labels: npt.NDArray[np.uint16]
    slot_of: IntArray
