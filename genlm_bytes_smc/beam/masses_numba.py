"""The arrays that compiled steps read, and masses of trie nodes in them, compiled.

Rows come in the order of the token ids, so a sum gathers; and one pass sorts a whole row into
the bytes after each heavy node (see `rows_numba`). Loops are serial, so results do not depend
on the number of threads; all sums are float64.

Functions that are called for each child take arrays of one row and not the whole `RowArrays`: that
is seventy words, which a call would copy at more than the price of most sums.

Every array among the arguments of a compiled call costs Python about 0.2 microseconds, every
named tuple of them one more. A step reads twenty such arrays, which change seldom, and does
often little work. So `Handles` keeps their addresses and lengths in one int64 array, from which
the compiled side makes the named tuples again at no cost (`opened`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.compiled import array_at, entry, full, inner
from genlm_bytes_smc.lm.contexts_numba import IntArray, TreeArrays
from genlm_bytes_smc.lm.rows_numba import FAN, RowArrays

# No nnan/ninf: -inf is a legitimate weight here.
_SUM = {"reassoc", "nsz", "contract", "arcp"}

_SIZES = 8  # numbers in `Handles` before the addresses

ROOT = np.int64(0)  # not a literal, for which numba would compile `add_children` once more


class TrieArrays(NamedTuple):
    """Arrays of a `TokenTrie` that compiled code walks."""

    lo: npt.NDArray[np.int32]
    hi: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    first_child: npt.NDArray[np.int32]
    edge: npt.NDArray[np.uint8]


class Handles:
    """Where the arrays of one trie, the rows over it and the context tree lie.

    Args:
        trie: the trie's arrays, which stay the same.
    """

    def __init__(self, trie: TrieArrays) -> None:
        self.trie = trie
        # Held here, so that what the addresses point at stays alive.
        self._rows: RowArrays | None = None
        self._tree: TreeArrays | None = None
        self._found: IntArray = np.empty(0, dtype=np.int64)

    def of(self, rows: RowArrays, tree: TreeArrays) -> IntArray:
        """Return what `opened` takes."""
        if rows is not self._rows or tree is not self._tree:
            self._rows, self._tree = rows, tree
            sizes = [len(self.trie.lo), *rows.probs.shape, len(rows.order), len(rows.heavy)]
            sizes += [len(rows.slot_of), len(tree.parent), len(tree.table)]
            arrays: list[np.ndarray[Any, Any]] = [*self.trie, *rows[1:], *tree]
            assert all(a.flags.c_contiguous for a in arrays)
            addresses = [a.__array_interface__["data"][0] for a in arrays]
            self._found = np.array([*sizes, *addresses], dtype=np.int64)
        return self._found


@inner()
def opened(handles, probs):
    """Return the `TrieArrays`, `RowArrays` and `TreeArrays` that `Handles.of` was given.

    handles int64[h]; probs is the first of the RowArrays, whose dtype the others lack.
    """
    m, s, v, t, n_heavy = handles[0], handles[1], handles[2], handles[3], handles[4]
    slots, n, places = handles[5], handles[6], handles[7]
    at = handles[_SIZES:]
    trie = TrieArrays(
        array_at(at[0], (m,), np.int32),
        array_at(at[1], (m,), np.int32),
        array_at(at[2], (m,), np.int32),
        array_at(at[3], (m + 1,), np.int32),
        array_at(at[4], (m,), np.uint8),
    )
    rows = RowArrays(
        probs,
        array_at(at[5], (s,), np.float64),
        array_at(at[6], (s, FAN * n_heavy), np.float64),
        array_at(at[7], (s,), np.bool_),
        array_at(at[8], (t,), np.uint32),
        array_at(at[9], (n_heavy,), np.int64),
        array_at(at[10], (n_heavy, 3), np.int64),
        array_at(at[11], (v,), np.uint16),
        array_at(at[12], (slots,), np.int64),
    )
    tree = TreeArrays(
        array_at(at[13], (n,), np.int64),
        array_at(at[14], (n,), np.int64),
        array_at(at[15], (n,), np.int64),
        array_at(at[16], (n,), np.bool_),
        array_at(at[17], (places,), np.int64),
        array_at(at[18], (n,), np.int64),
        array_at(at[19], (2,), np.int64),
    )
    return trie, rows, tree


# -- sums over tokens ---------------------------------------------------------------------


@inner()
def child_of_node(trie, node, byte):
    """Return the child of a trie node along a byte, or -1."""
    edge = trie.edge
    a, b = trie.first_child[node], trie.first_child[node + 1]
    end = b
    while a < b:
        mid = (a + b) >> 1
        if edge[mid] < byte:
            a = mid + 1
        else:
            b = mid
    if a < end and edge[a] == byte:
        return a
    return -1


@inner(fastmath=_SUM)
def _sum(row, order, lo, hi):
    s = 0.0
    for i in range(lo, hi):
        s += np.float64(row[order[i]])
    return s


@inner(fastmath=_SUM)
def _sum_labelled(row, labels, first, count):
    """Sum of the tokens with a label in first .. first + count: for many, faster than
    fetching each."""
    s = 0.0
    for i in range(len(labels)):
        s += np.float64(row[i]) if np.uint16(labels[i] - first) < count else 0.0
    return s


@inner()
def _heavy_index(heavy, node):
    """Return which heavy node `node` is, or -1."""
    for h in range(len(heavy)):
        if heavy[h] == node:
            return h
    return -1


@inner()
def sum_range(row, order, lo, hi, cut):
    """Sum of a row (as it is stored) over positions lo..hi without those in the sorted `cut`."""
    s = 0.0
    first, end = np.int64(lo), np.int64(hi)
    for c in cut:
        if first <= c < end:
            s += _sum(row, order, first, c)
            first = c + 1
    return s + _sum(row, order, first, end)


@inner()
def touches(lo, hi, cut):
    """Return whether a position in lo..hi is in `cut`."""
    found = False
    for c in cut:
        found |= lo <= c < hi
    return found


@inner()
def child_mass(trie, rows, slot, node, child, cut):
    """Mass below an edge of `node`; those of heavy nodes may have been summed already."""
    lo, hi = trie.lo[child], trie.hi[child]
    many = 4 * (hi - lo) > len(rows.labels)
    if (many or rows.summed[slot]) and not touches(lo, hi, cut):
        h = _heavy_index(rows.heavy, node)
        if h >= 0 and rows.summed[slot]:
            return rows.roots[slot, FAN * h + trie.edge[child]]
        if h >= 0:
            g = _heavy_index(rows.heavy, child)
            first = FAN * g if g >= 0 else FAN * h + trie.edge[child]
            count = FAN * (rows.nest[g, 2] - g) if g >= 0 else 1
            row = rows.probs[slot]
            sum_ = _sum_labelled(row, rows.labels, np.uint16(first), np.uint16(count))
            return sum_ * rows.scale[slot]
    return sum_range(rows.probs[slot], rows.order, lo, hi, cut) * rows.scale[slot]


@inner()
def add_children(trie, rows, slot, node, factor, cut, out):
    """out[byte] += factor * mass below that edge of `node`, for every edge.

    Rows of candidates at heavy nodes must have been summed (`sum_root`). out float64[>= 256].
    """
    h = _heavy_index(rows.heavy, node)
    if h >= 0 and not touches(trie.lo[node], trie.hi[node], cut):
        line = rows.roots[slot, FAN * h : FAN * h + 256]
        for b in range(256):
            out[b] += factor * line[b]
        return
    row, scale = rows.probs[slot], rows.scale[slot]
    for child in range(trie.first_child[node], trie.first_child[node + 1]):
        lo, hi, b = trie.lo[child], trie.hi[child], trie.edge[child]
        if h >= 0 and not touches(lo, hi, cut):
            out[b] += factor * rows.roots[slot, FAN * h + b]
        else:
            out[b] += factor * (scale * sum_range(row, rows.order, lo, hi, cut))


@inner(fastmath=_SUM)
def _add_scaled(out, row, scale):
    for i in range(len(out)):
        out[i] += scale * row[i]


@inner()
def _sum_by_label(labels, values, bins):
    """bins[any, label] += value; four lines, as sums into one place wait for each other."""
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)  # no test for a negative index
    whole = len(labels) - len(labels) % 4
    for a in range(0, whole, 4):
        i = np.uint64(a)
        bins[0, labels[i]] += values[i]
        bins[1, labels[i + one]] += values[i + one]
        bins[2, labels[i + two]] += values[i + two]
        bins[3, labels[i + three]] += values[i + three]
    for a in range(whole, len(labels)):
        bins[0, labels[a]] += values[a]


@inner()
def _nested(rows, bins, scale):
    """Masses below each byte after each heavy node, float64[H * 257], from `bins` of labels."""
    n_heavy = len(rows.heavy)
    out = full(FAN * n_heavy, 0.0)
    for label in range(len(out)):
        out[label] = scale * (
            (bins[0, label] + bins[1, label]) + (bins[2, label] + bins[3, label])
        )  # fmt: skip
    for h in range(n_heavy - 1, 0, -1):  # what is below it is complete by now
        total = 0.0
        for label in range(FAN * h, FAN * (h + 1)):
            total += out[label]
        out[FAN * rows.nest[h, 0] + rows.nest[h, 1]] = total
    return out


@inner()
def sum_root(rows, slot):
    """Compute `roots` of a slot, unless it is there."""
    if not rows.summed[slot]:
        bins = full((4, FAN * len(rows.heavy) + 1), 0.0)
        _sum_by_label(rows.labels, rows.probs[slot, : len(rows.labels)], bins)
        mass = _nested(rows, bins, rows.scale[slot])
        for label in range(len(mass)):
            rows.roots[slot, label] = mass[label]
        rows.summed[slot] = True


@inner()
def longer_mass(trie, rows, slot, node, cut):
    """Mass of the tokens that go on after a trie node; 0 if `node` is -1."""
    if node < 0:
        return 0.0
    lo, hi = trie.lo[node] + trie.ends[node], trie.hi[node]
    h = _heavy_index(rows.heavy, node)
    if h < 0 or touches(lo, hi, cut):
        return sum_range(rows.probs[slot], rows.order, lo, hi, cut) * rows.scale[slot]
    sum_root(rows, slot)  # faster than fetching each, and the next byte may want it
    mass = 0.0
    for b in range(FAN * h, FAN * h + 256):
        mass += rows.roots[slot, b]
    return mass


_BLOCK = 1024  # tokens summed at a time, so that everything stays in the first cache


@inner()
def sum_roots(rows, slots, scales, cut):
    """Mass below each byte after each heavy node, summed over rows `slots` times `scales`.

    float64[H * 257], as `RowArrays.roots`; tokens at positions `cut` do not count.
    """
    labels = rows.labels
    bins = full((4, FAN * len(rows.heavy) + 1), 0.0)
    block = np.empty(_BLOCK, rows.probs.dtype)  # as exact as what is added up
    shared = rows.scale[slots[0]]  # a row's own is too small for single precision
    factors = np.empty(len(slots), rows.probs.dtype)
    for i in range(len(slots)):
        factors[i] = scales[i] * (rows.scale[slots[i]] / shared)
    for a in range(0, len(labels), _BLOCK):
        b = min(len(labels), a + _BLOCK)
        values = block[: b - a]
        for i in range(len(values)):
            values[i] = 0.0
        for i in range(len(slots)):
            _add_scaled(values, rows.probs[slots[i], a:b], factors[i])
        for c in cut:
            if a <= rows.order[c] < b:
                values[rows.order[c] - a] = 0.0
        _sum_by_label(labels[a:b], values, bins)
    return _nested(rows, bins, shared)


# -- blocks: the mass of every next byte ---------------------------------------------------

_TOGETHER = 3  # rows of one lane from which adding them up first is cheaper than sorting each


@inner()
def _add_heavy(rows, h, ctx, node, factor, cut, out):
    """Sort what candidates at heavy node `h` need, or add them to out[257] at once.

    A row that is sorted alone keeps its sums, as the next byte may want them too. Where many
    rows of one lane lack theirs, they are added up, the sum is sorted, and the candidates are
    marked as done (factor 0).
    """
    count = 0
    x = rows.heavy[h]
    slots = full(len(ctx), 0)
    scales = full(len(ctx), 0.0)
    for c in range(len(ctx)):
        if node[c] == x and factor[c] > 0.0 and not rows.summed[rows.slot_of[ctx[c]]]:
            slots[count], scales[count] = rows.slot_of[ctx[c]], factor[c]
            count += 1
    if count < _TOGETHER:
        for i in range(count):
            sum_root(rows, slots[i])
        return
    mass = sum_roots(rows, slots[:count], scales[:count], cut)
    for b in range(256):
        out[b] += mass[FAN * h + b]
    for c in range(len(ctx)):
        if node[c] == x and factor[c] > 0.0 and not rows.summed[rows.slot_of[ctx[c]]]:
            factor[c] = 0.0


@inner()
def add_masses(trie, rows, ctx, node, logu, logw, cut, alone, out):
    """Add the mass of each next byte after one lane's candidates, and of ending, to out[257].

    Returns the log, nats, of what `out` is in units of: the largest of `logw` float64[C].
    With `alone` other lanes may not want the same rows, so their sums need not be kept.
    """
    top = -np.inf
    for c in range(len(logw)):
        top = max(top, logw[c])
    if top == -np.inf:
        return top
    factor = full(len(logw), 0.0)
    for c in range(len(logw)):
        if logw[c] > -np.inf:
            factor[c] = np.exp(logu[c] - top)
            if node[c] == 0:
                slot = rows.slot_of[ctx[c]]
                for pos in cut:
                    p = rows.probs[slot, rows.order[pos]] * rows.scale[slot]
                    out[256] += factor[c] * p
                if not alone:
                    sum_root(rows, slot)
    for h in range(len(rows.heavy)):
        _add_heavy(rows, h, ctx, node, factor, cut, out)
    for c in range(len(logw)):
        if factor[c] > 0.0:
            add_children(trie, rows, rows.slot_of[ctx[c]], node[c], factor[c], cut, out)
    return top


@entry()
def next_block(trie, rows, ctx, node, logu, logw, cut):
    """Log mass of each next byte and of ending: float64[N, 257], not normalised."""
    out = full((len(logw), 257), 0.0)
    for n in range(len(logw)):
        alone = len(logw) == 1
        top = add_masses(trie, rows, ctx[n], node[n], logu[n], logw[n], cut, alone, out[n])
        for b in range(257):
            out[n, b] = top + np.log(out[n, b]) if out[n, b] > 0.0 else -np.inf
    return out
