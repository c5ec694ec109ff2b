"""The candidates of N lanes on the CPU, compiled: extend them, move them along a byte, weigh them.

Same functions and meaning as `kernels_torch`. Loops over lanes and candidates are serial, and
everything is float64. What candidates weigh in the rows comes from `masses_numba`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.masses_numba import child_mass, sum_range
from genlm_bytes_smc.beam.pruning_numba import admit, logsumexp_rows, select_topk, take
from genlm_bytes_smc.compiled import entry, full, inner

# Not as literals, for which numba compiles what they are passed to once more.
_FIRST = np.int64(0)
_ALL = np.int64(-1)
_BESIDE = np.bool_(False)


@inner()
def _child(trie, node, byte):
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
                child = _child(trie, node[n, c], byte[n])
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
def begin_read(trie, rows, ctx, node, logu, logw, key, log_z, byte, cut, log_threshold, random):
    """Find the extensions to admit where the next byte is known.

    With `random` they are thinned against `log_z` float64[N], else held against the candidates
    that can read the byte. Returns (where the candidates come to by `byte` [N, C], what they
    weigh there [N, C], lane, cand, token, ext logw, log mass left out [N]).
    """
    moved, able = advance(trie, rows, ctx, node, logu, logw, byte, cut)
    lane, cand, token, ext = extensions(trie, rows, ctx, node, logu, logw, cut)
    base = log_z if random else logsumexp_rows(able)
    lane, cand, token, ext, dropped = admit(
        lane, cand, token, ext, base, key, log_threshold, random, _BESIDE
    )
    return moved, able, lane, cand, token, ext, dropped


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
