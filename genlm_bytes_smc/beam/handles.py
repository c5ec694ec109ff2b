"""The arrays that compiled steps read, handed over as one array of addresses.

Every array among the arguments of a compiled call costs Python about 0.2 microseconds, every
named tuple of them one more. A step reads twenty such arrays, which change seldom, and does
often little work; so their addresses and lengths stand in one int64 array, from which the
compiled side makes the named tuples again at no cost.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from genlm_bytes_smc.beam.masses_numba import TrieArrays
from genlm_bytes_smc.compiled import inner
from genlm_bytes_smc.lm.contexts import IntArray, TreeArrays
from genlm_bytes_smc.lm.host_rows import FAN, RowArrays

_SIZES = 8


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
        """Return what `opened` takes, for the arrays as they are now."""
        if rows is not self._rows or tree is not self._tree:
            self._rows, self._tree = rows, tree
            sizes = [len(self.trie.lo), *rows.probs.shape, len(rows.order), len(rows.heavy)]
            sizes += [len(rows.slot_of), len(tree.parent), len(tree.table)]
            arrays: list[np.ndarray[Any, Any]] = [*self.trie, *rows[1:], *tree]
            assert all(a.flags.c_contiguous for a in arrays)
            addresses = [a.__array_interface__["data"][0] for a in arrays]
            self._found = np.array([*sizes, *addresses], dtype=np.int64)
        return self._found


@intrinsic
def _array(typingctx, address, shape, dtype):
    """Return the array that lies at an address: `nb.carray`, without compiling it for each type."""
    array = types.Array(dtype.dtype, shape.count, "C")

    def code(context, builder, signature, args):
        data = builder.inttoptr(args[0], context.get_data_type(array.dtype).as_pointer())
        lengths = cgutils.unpack_tuple(builder, args[1])
        size = context.get_abi_sizeof(context.get_data_type(array.dtype))
        strides = [context.get_constant(types.intp, size)]
        for length in lengths[:0:-1]:
            strides.insert(0, builder.mul(strides[0], length))
        out = context.make_array(array)(context, builder)
        item = context.get_constant(types.intp, size)
        arrayobj.populate_array(out, data, lengths, strides, item, None)
        return out._getvalue()

    return array(address, shape, dtype), code


@inner()
def opened(handles, probs):
    """Return the `TrieArrays`, `RowArrays` and `TreeArrays` that `Handles.of` was given.

    handles int64[h]; probs is the first of the RowArrays, whose dtype the others lack.
    """
    m, s, v, t, n_heavy = handles[0], handles[1], handles[2], handles[3], handles[4]
    slots, n, places = handles[5], handles[6], handles[7]
    at = handles[_SIZES:]
    trie = TrieArrays(
        _array(at[0], (m,), np.int32),
        _array(at[1], (m,), np.int32),
        _array(at[2], (m,), np.int32),
        _array(at[3], (m + 1,), np.int32),
        _array(at[4], (m,), np.uint8),
    )
    rows = RowArrays(
        probs,
        _array(at[5], (s,), np.float64),
        _array(at[6], (s, FAN * n_heavy), np.float64),
        _array(at[7], (s,), np.bool_),
        _array(at[8], (t,), np.uint32),
        _array(at[9], (n_heavy,), np.int64),
        _array(at[10], (n_heavy, 3), np.int64),
        _array(at[11], (v,), np.uint16),
        _array(at[12], (slots,), np.int64),
    )
    tree = TreeArrays(
        _array(at[13], (n,), np.int64),
        _array(at[14], (n,), np.int64),
        _array(at[15], (n,), np.int64),
        _array(at[16], (n,), np.bool_),
        _array(at[17], (places,), np.int64),
        _array(at[18], (n,), np.int64),
        _array(at[19], (2,), np.int64),
    )
    return trie, rows, tree
