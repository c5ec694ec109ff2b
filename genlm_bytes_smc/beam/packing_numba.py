"""States of N lanes as one array, and what they need of rows and of the context tree; compiled.

A state is int64[4, N, C]: ctx, node, and the bits of the float64 logu and logw (each array costs
Python up to a microsecond on its way in or out of a compiled call).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

from genlm_bytes_smc.compiled import full, inner
from genlm_bytes_smc.lm.contexts import NO_ROOM, child_of


@intrinsic
def as_floats(typingctx, array):
    """View int64 as float64; numba's own `array.view` takes seconds to compile."""

    def code(context, builder, signature, args):
        given = context.make_array(signature.args[0])(context, builder, args[0])
        out = context.make_array(signature.return_type)(context, builder)
        for name in ("meminfo", "parent", "nitems", "itemsize", "shape", "strides"):
            setattr(out, name, getattr(given, name))
        out.data = builder.bitcast(given.data, out.data.type)
        return impl_ret_borrowed(context, builder, signature.return_type, out._getvalue())

    return array.copy(dtype=types.float64)(array), code


@inner()
def unpack(packed):
    """Return (ctx, node, logu, logw) of a state: views."""
    weights = as_floats(packed)
    return packed[0], packed[1], weights[2], weights[3]


@inner()
def pack(ctx, node, logu, logw):
    """Return int64[4, N, C]."""
    n_lanes, n_cands = ctx.shape
    out = full((4, n_lanes, n_cands), 0)
    weights = as_floats(out)
    for n in range(n_lanes):
        for c in range(n_cands):
            out[0, n, c] = ctx[n, c]
            out[1, n, c] = node[n, c]
            weights[2, n, c] = logu[n, c]
            weights[3, n, c] = logw[n, c]
    return out


@inner()
def nothing():
    """Return a state without lanes."""
    return full((4, 0, 0), 0)


@inner()
def add_logs(a, b):
    """log(exp(a) + exp(b))."""
    top = max(a, b)
    if top == -np.inf:
        return top
    return top + np.log(np.exp(a - top) + np.exp(b - top))


@inner()
def lacks(rows, context):
    """Return whether a context has no row."""
    return context >= len(rows.slot_of) - 1 or rows.slot_of[context] < 0


@inner()
def lacking(rows, ctx, logw):
    """Contexts of candidates whose rows are missing (evicted since), int64[m]."""
    count = 0
    for n in range(logw.shape[0]):
        for c in range(logw.shape[1]):
            count += logw[n, c] > -np.inf and lacks(rows, ctx[n, c])
    out = full(count, 0)
    count = 0
    for n in range(logw.shape[0]):
        for c in range(logw.shape[1]):
            if logw[n, c] > -np.inf and lacks(rows, ctx[n, c]):
                out[count] = ctx[n, c]
                count += 1
    return out


@inner()
def children(tree, rows, ctx, lane, cand, token):
    """Contexts of extensions, and those that lack a row; or [NO_ROOM] if the tree is full."""
    contexts = full(len(lane), 0)
    count = 0
    for e in range(len(lane)):
        contexts[e] = child_of(tree, ctx[lane[e], cand[e]], token[e])
        if contexts[e] == NO_ROOM:
            return contexts, full(1, NO_ROOM)
        count += lacks(rows, contexts[e])
    missing = full(count, 0)
    count = 0
    for context in contexts:
        if lacks(rows, context):
            missing[count] = context
            count += 1
    return contexts, missing
