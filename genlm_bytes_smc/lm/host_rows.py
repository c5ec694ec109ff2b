"""Linear rows on the host: taken in by compiled loops, kept in the order of token ids.

A row of log-probabilities is exponentiated as it comes in. Exponentials are written out (range
reduction by 2, then a Taylor polynomial in Horner's form; Cody & Waite 1980, chapter 6), so that
the compiler makes vector code of the loops that take them. Their relative error is below 1e-7 for
float32 rows, whose own rounding is larger, and below 1e-14 for float64 rows.

A float32 row is stored as `exp(logp + BIAS)`: single precision ends at exp(-87), and with
the bias tokens down to LOWEST nats keep their full relative precision.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.fast_path import warn_lost
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.trie import TokenTrie

FloatArray = npt.NDArray[np.float64]

ROUNDING = 1e-4  # how far from one a float32 row over a large vocabulary may sum
EXACT_WIDTH = 1 << 14  # tokens; rows up to this wide are always kept in float64
FAN = 257  # labels of a heavy node: one a byte, and one for tokens that end there
_HEAVY = 8  # a node is heavy if one in this many tokens is below it

_DOUBLINGS = 115
BIAS = _DOUBLINGS * 0.6931471805599453
_UNBIAS = float(np.exp(-BIAS))
LOWEST = -165.0  # nats; below it, float32 rows cannot hold a token and float64 ones are used
LEAST = -740.0  # nats; below it a token is impossible

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LN2_HIGH_32, _LN2_LOW_32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = 6755399441055744.0  # 1.5 * 2**52: added, the low bits hold the nearest integer
_ROUND_32 = np.float32(12582912.0)  # 1.5 * 2**23
_HIGHEST_32 = np.float32(9.01)  # rounds to 13 doublings: with _DOUBLINGS the exponent of inf
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
    exponent = _i32_of(t) - np.int32(0x4B400000 - _DOUBLINGS - 127)
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
        total[i] *= _UNBIAS
        scale[slots[i]], summed[slots[i]] = _UNBIAS, False
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


class HostRows:
    """Storage of a `RowStore` whose rows live on the host.

    A row is kept as it came, exponentiated: sums over the trie gather what they need. Rows of
    up to EXACT_WIDTH tokens are kept in float64. Wider ones that come in float32 are kept in
    float32 (each probability to 1e-7 of itself, less than the rounding of the row it came from;
    sums are taken in float64). The first row that comes in float64 turns the store to float64,
    and so does the first with a token below LOWEST, with a `FastPathWarning`.

    Args:
        trie: which tokens spell something, and where its nodes are.
        slots: number of rows to reserve; memory is taken as they are written.
        exact: begin in float64.
    """

    def __init__(self, trie: TokenTrie, slots: int, exact: bool) -> None:
        self.trie, self.width = trie, len(trie.vocab)
        self._probs = np.empty((slots, self.width), dtype=np.float64 if exact else np.float32)
        self._scale: FloatArray = np.ones(slots)
        self._summed = np.zeros(slots, dtype=bool)
        self._order = trie.order.astype(np.uint32)
        self._spelled = trie.position >= 0
        self._all_spelled = bool(self._spelled.all())
        self._heavy, self._nest, self._labels = _heavy_nodes(trie)
        self._roots: FloatArray = np.empty((slots, FAN * len(self._heavy)))
        self._arrays: RowArrays | None = None
        self.used = 0  # the last slot written to; those beyond it never were

    @property
    def exact(self) -> bool:
        """Return whether rows are kept in float64."""
        return self._probs.dtype == np.float64

    def arrays(self, slot_of: IntArray) -> RowArrays:
        """Return what the kernels take."""
        if self._arrays is None or self._arrays.slot_of is not slot_of:
            self._arrays = RowArrays(
                self._probs, self._scale, self._roots, self._summed, self._order,
                self._heavy, self._nest, self._labels, slot_of,
            )  # fmt: skip
        return self._arrays

    def take(self, slots: IntArray, rows: torch.Tensor) -> FloatArray:
        """Keep rows of log-probabilities float[B, >= V]; what each summed to, float64[B].

        A row over just the tokens that spell something is a distribution as it comes, and
        is left as it is unless its sum is off by more than rounding. A sum that is NaN,
        infinite or zero says that the row is no distribution.
        """
        logp = rows.detach().numpy() if rows.requires_grad else rows.numpy()
        if not self.exact and logp.dtype != np.float32:
            self._make_exact()
        self.used = max(self.used, *slots.tolist())
        take = take_64 if (exact := self.exact) else take_32
        total: FloatArray
        total, low, odd = take(logp, slots, self._probs, self._scale, self._summed, ROUNDING)
        # Not normalised (their sum in float32 ends early), or a token out of range.
        if not exact and (low or (odd and not np.isfinite(total).all())):
            if low or not np.isnan(total).all():
                self._make_exact()
                total = self.take(slots, rows)
                if np.isfinite(total).all():
                    warn_lost(
                        f"a row gives a token less than {LOWEST:g} nats, or is far from "
                        "normalised: rows are kept in float64 from here on, in twice the memory"
                    )
            return total
        if not self._all_spelled or logp.shape[1] > self.width:
            constant = self._scale[slots]
            total = constant * [masked_total(self._probs[s], self._spelled) for s in slots]
            self._scale[slots] = _quotient(constant, total)
        elif odd:
            off = np.abs(total - 1.0) > ROUNDING
            self._scale[slots[off]] = _quotient(self._scale[slots[off]], total[off])
        return total

    def put(self, slots: IntArray, linear: torch.Tensor) -> FloatArray:
        """Keep rows of probabilities float64[B, T] in trie order, in an exact store.

        Returns:
            Their sums, float64[B].
        """
        self.used = max(self.used, *slots.tolist())
        p = linear.numpy()
        self._probs[slots] = 0.0
        self._probs[np.ix_(slots, self.trie.order)] = p
        total: FloatArray = p.sum(axis=1)
        self._scale[slots] = _quotient(np.ones(len(slots)), total)
        self._summed[slots] = False
        return total

    def prob(self, slot: int, token: int) -> float:
        """Probability of one token."""
        return float(self._probs[slot, token] * self._scale[slot])

    def linear(self, slots: int) -> torch.Tensor:
        """Copy the first `slots` slots as probabilities float64[slots, T] in trie order."""
        rows = np.take(self._probs[:slots], self.trie.order, axis=1).astype(np.float64)
        return torch.from_numpy(rows * self._scale[:slots, None])

    def enlarge(self, slots: int) -> None:
        """Make room for `slots` slots, if there is less; the rows stay where they were."""
        if slots <= len(self._probs):
            return
        for name in ("_probs", "_scale", "_roots", "_summed"):
            old = getattr(self, name)
            new = np.zeros if name == "_summed" else np.empty
            grown = new((slots, *old.shape[1:]), dtype=old.dtype)
            grown[: len(old)] = old
            setattr(self, name, grown)
        self._arrays = None

    def row_bytes(self) -> int:
        """Memory of one slot, in bytes."""
        return self.width * self._probs.itemsize + 8 * FAN * len(self._heavy) + 1

    def _make_exact(self) -> None:
        exact = np.empty(self._probs.shape)
        exact[: self.used + 1] = self._probs[: self.used + 1]
        self._probs, self._arrays = exact, None


def _quotient(a: FloatArray, b: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return a / b


def _heavy_nodes(trie: TokenTrie) -> tuple[IntArray, IntArray, npt.NDArray[np.uint16]]:
    """Find the root and the nodes above an eighth of all tokens: `heavy`, `nest`, `labels`.

    What is above such a node is one too.
    """
    size = trie.hi - trie.lo
    big = (size * _HEAVY >= trie.n_tokens) & (size >= 512)
    big[0] = True
    found = np.flatnonzero(big)
    heavy = found[np.lexsort((found, trie.lo[found]))].astype(np.int64)  # depth first
    index = {node: i for i, node in enumerate(heavy.tolist())}
    nest = np.zeros((len(heavy), 3), dtype=np.int64)
    labels = np.full(len(trie.vocab), FAN * len(heavy), dtype=np.uint16)
    for i, node in enumerate(heavy.tolist()):
        below = (trie.lo[heavy] >= trie.lo[node]) & (trie.hi[heavy] <= trie.hi[node])
        nest[i] = index.get(int(trie.parent[node]), -1), trie.byte[node], i + below[i:].sum()
        labels[trie.order[trie.lo[node] : trie.lo[node] + trie.ends[node]]] = FAN * i + FAN - 1
        for child in range(int(trie.first_child[node]), int(trie.first_child[node + 1])):
            if child not in index:
                line = trie.order[trie.lo[child] : trie.hi[child]]
                labels[line] = FAN * i + int(trie.byte[child])
    return heavy, nest, labels
