"""From a model's log-probability rows to linear rows in trie order, on the CPU."""

from __future__ import annotations

import numba as nb


@nb.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def permute_into(row, linear, order):  # type: ignore[no-untyped-def]
    """row[:] = linear[order], and the sum, in one pass.

    row float64[T], linear float64[W], order int64[T].
    """
    s = 0.0
    for j in range(len(order)):
        p = linear[order[j]]
        row[j] = p
        s += p
    return s
