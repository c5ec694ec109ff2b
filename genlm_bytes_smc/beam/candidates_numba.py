"""States of N lanes on the CPU, compiled: pack them, extend them, move them along a byte.

Loops over lanes and candidates are serial, and everything is float64. What candidates weigh in the
rows comes from `masses_numba`. A packed state is int64[4, N, C]: ctx, node, and the bits of the
float64 logu and logw (each array costs Python up to a microsecond on its way in or out of a
compiled call).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

from genlm_bytes_smc.beam.masses_numba import child_mass, child_of_node, sum_range
from genlm_bytes_smc.beam.pruning_numba import (
    admit,
    keep_thinned,
    kept_of,
    logsumexp_rows,
    mass_after,
    select_topk,
    take,
)
from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.lm.contexts_numba import NO_ROOM, child_of

# Not as literals, for which numba compiles what they are passed to once more.
_FIRST = np.int64(0)
_ALL = np.int64(-1)
_WITHIN = np.bool_(True)


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
def lacks(slot_of, context):
    """Return whether a context has no row."""
    return context >= len(slot_of) - 1 or slot_of[context] < 0


@inner()
def lacking(rows, ctx, logw):
    """Contexts of candidates whose rows are missing (evicted since), int64[m]."""
    count = 0
    for n in range(logw.shape[0]):
        for c in range(logw.shape[1]):
            count += logw[n, c] > -np.inf and lacks(rows.slot_of, ctx[n, c])
    out = full(count, 0)
    count = 0
    for n in range(logw.shape[0]):
        for c in range(logw.shape[1]):
            if logw[n, c] > -np.inf and lacks(rows.slot_of, ctx[n, c]):
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
        count += lacks(rows.slot_of, contexts[e])
    missing = full(count, 0)
    count = 0
    for context in contexts:
        if lacks(rows.slot_of, context):
            missing[count] = context
            count += 1
    return contexts, missing


# -- candidates and extensions ------------------------------------------------------------


@entry()
def extensions(trie, rows, ctx, node, logu, logw, cut):
    """Every token that ends at a candidate's node: (lane, cand, token, logw)."""
    count = 0
    n_lanes, n_cands = logw.shape
    for n in range(n_lanes):
        for c in range(n_cands):
            if logw[n, c] > -np.inf:
                count += trie.ends[node[n, c]]
    lane = full(count, 0)
    cand = full(count, 0)
    token = full(count, 0)
    out = full(count, 0.0)
    e = 0
    for n in range(n_lanes):
        for c in range(n_cands):
            if logw[n, c] == -np.inf:
                continue
            first = trie.lo[node[n, c]]
            last = first + trie.ends[node[n, c]]
            if first == last:
                continue
            slot = rows.slot_of[ctx[n, c]]
            row, scale = rows.probs[slot], rows.scale[slot]
            for pos in range(first, last):
                p = row[rows.order[pos]] * scale
                kept = p > 0.0
                for x in cut:
                    if x == pos:
                        kept = False
                if kept:
                    lane[e], cand[e], token[e] = n, c, rows.order[pos]
                    out[e] = logu[n, c] + np.log(p)
                    e += 1
    return lane[:e], cand[:e], token[:e], out[:e]


@entry()
def append_extensions(ctx, node, logu, logw, lane, new_ctx, ext_logw):
    """Append extended candidates, at the root, after the others: [N, C + E']."""
    n_lanes, n_cands = logw.shape
    count = full(n_lanes, 0)
    for n in lane:
        count[n] += 1
    width = n_cands
    for n in range(n_lanes):
        width = max(width, n_cands + count[n])
    out_ctx = full((n_lanes, width), -1)
    out_node = full((n_lanes, width), 0)
    out_logu = full((n_lanes, width), -np.inf)
    out_logw = full((n_lanes, width), -np.inf)
    for n in range(n_lanes):
        count[n] = n_cands
        for c in range(n_cands):
            out_ctx[n, c] = ctx[n, c]
            out_node[n, c] = node[n, c]
            out_logu[n, c] = logu[n, c]
            out_logw[n, c] = logw[n, c]
    for e in range(len(lane)):
        n = lane[e]
        c = count[n]
        out_ctx[n, c] = new_ctx[e]
        out_logu[n, c] = ext_logw[e]
        out_logw[n, c] = ext_logw[e]
        count[n] += 1
    return out_ctx, out_node, out_logu, out_logw


@inner()
def _move(trie, rows, ctx, node, logu, logw, first, byte, cut, out_node, out_logw):
    """`advance` of the candidates from place `first` on, into other arrays or the same."""
    for n in range(logw.shape[0]):
        for c in range(first, logw.shape[1]):
            child, weight = -1, -np.inf
            if logw[n, c] > -np.inf and byte[n] >= 0:
                child = child_of_node(trie, node[n, c], byte[n])
            if child >= 0:
                slot = rows.slot_of[ctx[n, c]]
                mass = child_mass(trie, rows, slot, node[n, c], child, cut)
                if mass > 0.0:
                    weight = logu[n, c] + np.log(mass)
            out_node[n, c] = child if weight > -np.inf else 0
            out_logw[n, c] = weight


@entry()
def advance(trie, rows, ctx, node, logu, logw, byte, cut):
    """Read one byte a lane: (node int64[N, C], logw float64[N, C]); lost ones at -inf.

    `byte` int64[N]; a byte of -1 leaves its lane empty.
    """
    out_node = full(node.shape, 0)
    out_logw = full(logw.shape, 0.0)
    _move(trie, rows, ctx, node, logu, logw, _FIRST, byte, cut, out_node, out_logw)
    return out_node, out_logw


@entry()
def node_logw(trie, rows, ctx, node, logu, logw, cut):
    """Weights of the same candidates when the positions in `cut` are left out: [N, C]."""
    out = full(logw.shape, -np.inf)
    for n in range(logw.shape[0]):
        for c in range(logw.shape[1]):
            if logw[n, c] == -np.inf:
                continue
            x = node[n, c]
            if x == 0:
                out[n, c] = logu[n, c]
                continue
            slot = rows.slot_of[ctx[n, c]]
            mass = sum_range(rows.probs[slot], rows.order, trie.lo[x], trie.hi[x], cut)
            mass *= rows.scale[slot]
            if mass > 0.0:
                out[n, c] = logu[n, c] + np.log(mass)
    return out


@inner(inline="always")
def extend_all(trie, rows, tree, ctx, node, logu, logw, key, log_z, cut, log_threshold, random):
    """Return the candidates and their admitted extensions, if all have rows.

    Returns (packed state, log mass left out [N], contexts without rows or [NO_ROOM]).
    """
    missing = lacking(rows, ctx, logw)
    dropped = full(len(log_z), -np.inf)
    if len(missing):
        return nothing(), dropped, missing
    out, dropped, missing = grow(
        trie, rows, tree, ctx, node, logu, logw, key, log_z, cut, log_threshold, random
    )
    if len(missing):
        return nothing(), dropped, missing
    return out, dropped, missing


@inner()
def grow(trie, rows, tree, ctx, node, logu, logw, key, log_z, cut, log_threshold, random):
    """As `extend_all`, where the rows of the extensions may be missing."""
    lane, cand, token, ext = extensions(trie, rows, ctx, node, logu, logw, cut)
    lane, cand, token, ext, dropped = admit(
        lane, cand, token, ext, log_z, key, log_threshold, random, _WITHIN
    )
    new, missing = children(tree, rows, ctx, lane, cand, token)
    if len(lane):
        ctx, node, logu, logw = append_extensions(ctx, node, logu, logw, lane, new, ext)
    return pack(ctx, node, logu, logw), dropped, missing


@inner()
def _among(keys, width, ctx, lane, cand, token):
    """Return which extensions are among the sorted `keys` int64[s] (see `Held`), bool[E]."""
    out = full(len(lane), False)
    for e in range(len(lane)):
        key = ctx[lane[e], cand[e]] * width + token[e]
        a, b = 0, len(keys)
        while a < b:
            middle = (a + b) >> 1
            if keys[middle] < key:
                a = middle + 1
            else:
                b = middle
        out[e] = a < len(keys) and keys[a] == key
    return out


@inner()
def begin_read(
    trie, rows, ctx, node, logu, logw, key, log_z, byte, cut, log_threshold, random, by_steps,
    foreseen, sure, width, guess,
):  # fmt: skip
    """Find the extensions to admit where the next byte is known.

    Args:
        trie, rows, ctx, node, logu, logw, key, log_z, byte, cut: as elsewhere here.
        log_threshold: extensions are held against it as `admit` does, with `random` or `by_steps`
            against `log_z`, else against the candidates that can read the byte.
        random: whether they are thinned at random.
        by_steps: whether to admit what `steps_numba.step` admits, which does not know the byte.
        foreseen: whether to thin by the estimated share after the byte (`mass_after`), and not
            at all what is in `sure`.
        sure: int64[s], extensions (see `Held.keys`); empty: none.
        width: see there.
        guess: log probability of a byte that an extension gives at least.

    Returns:
        Where the candidates come to by `byte` [N, C], what they weigh there [N, C], lane, cand,
        token and log weight of the extensions, log mass left out [N].
    """
    moved, able = advance(trie, rows, ctx, node, logu, logw, byte, cut)
    lane, cand, token, ext = extensions(trie, rows, ctx, node, logu, logw, cut)
    if foreseen and log_threshold > -np.inf:
        base = mass_after(lane, ext, logsumexp_rows(able), log_z, guess)
        certain = _among(sure, width, ctx, lane, cand, token)
        keep, ext = keep_thinned(certain, lane, ext, base, key, log_threshold)
        lane, cand, token, ext = kept_of(keep, lane, cand, token, ext)
        return moved, able, lane, cand, token, ext, full(len(base), -np.inf)
    base = log_z if random or by_steps else logsumexp_rows(able)
    lane, cand, token, ext, left = admit(
        lane, cand, token, ext, base, key, log_threshold, random, by_steps
    )
    return moved, able, lane, cand, token, ext, left


@inner(inline="always")
def end_read(trie, rows, ctx, moved, logu, able, lane, new_ctx, ext_logw, byte, cut):
    """Read `byte` in candidates that have come to `moved`, with weights `able`, and in extensions.

    Returns (ctx, node, logu, logw, log_z float64[N]), best first.
    """
    node, logw = moved, able
    if len(lane):
        old = logw.shape[1]
        ctx, node, logu, logw = append_extensions(ctx, node, logu, logw, lane, new_ctx, ext_logw)
        _move(trie, rows, ctx, node, logu, logw, old, byte, cut, node, logw)
    pick, weight, _ = select_topk(logw, _ALL, -np.inf)
    ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    return ctx, node, logu, logw, logsumexp_rows(logw)
