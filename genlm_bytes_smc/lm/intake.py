"""From a model's log-probability rows to linear rows in trie order, on the CPU."""

from __future__ import annotations

import numba as nb


@nb.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def permute_into(row, root, linear, order, lo, hi, edge, children):
    """row[:] = linear[order], the sum below each child of the root, and the sum of all.

    row float64[T], root float64[256], linear float64[W], order int64[T]; lo, hi, edge: the
    trie's, of which the root's children are nodes 1 .. children.
    """
    root[:] = 0.0
    total = 0.0
    for child in range(1, children + 1):
        s = 0.0
        for j in range(lo[child], hi[child]):
            p = linear[order[j]]
            row[j] = p
            s += p
        root[edge[child]] = s
        total += s
    return total
