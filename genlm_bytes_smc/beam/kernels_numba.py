"""The beam's arithmetic on the CPU, compiled: loops over lanes, candidates and tokens.

Same functions and meaning as `kernels_torch`, which is the oracle in the tests. Loops are
serial, so results do not depend on the number of threads. Everything is float64.
"""

from __future__ import annotations

import numba as nb
import numpy as np

# No nnan/ninf: -inf is a legitimate weight here.
_SUM = {"reassoc", "nsz", "contract", "arcp"}


@nb.njit(cache=True, nogil=True, fastmath=_SUM)
def _sum(row, lo, hi):
    s = 0.0
    for i in range(lo, hi):
        s += row[i]
    return s


@nb.njit(cache=True, nogil=True)
def _mass(row, lo, hi, cut):
    """Mass of positions lo..hi without those in the sorted array `cut`."""
    s = 0.0
    for c in cut:
        if lo <= c < hi:
            s += _sum(row, lo, c)
            lo = c + 1
    return s + _sum(row, lo, hi)


@nb.njit(cache=True, nogil=True)
def _child_mass(row, root, lo, hi, byte, at_root, cut):
    """Mass below an edge; those of the root are summed once a row."""
    if at_root:
        for c in cut:
            if lo <= c < hi:
                return _mass(row, lo, hi, cut)
        return root[byte]
    return _mass(row, lo, hi, cut)


@nb.njit(cache=True, nogil=True)
def _child(first_child, edge, node, byte):
    a, b = first_child[node], first_child[node + 1]
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


@nb.njit(cache=True, nogil=True)
def logsumexp_rows(logw):
    """float64[N] from float64[N, C]; -inf for an empty row."""
    out = np.empty(logw.shape[0])
    for n in range(logw.shape[0]):
        top = -np.inf
        for c in range(logw.shape[1]):
            top = max(top, logw[n, c])
        if top == -np.inf:
            out[n] = top
            continue
        s = 0.0
        for c in range(logw.shape[1]):
            s += np.exp(logw[n, c] - top)
        out[n] = top + np.log(s)
    return out


@nb.njit(cache=True, nogil=True)
def extensions(order, lo, ends, probs, slot_of, ctx, node, logu, logw, cut):
    """Every token that ends at a candidate's node: (lane, cand, token, logw)."""
    count = 0
    n_lanes, n_cands = logw.shape
    for n in range(n_lanes):
        for c in range(n_cands):
            if logw[n, c] > -np.inf:
                count += ends[node[n, c]]
    lane = np.empty(count, np.int64)
    cand = np.empty(count, np.int64)
    token = np.empty(count, np.int64)
    out = np.empty(count)
    e = 0
    for n in range(n_lanes):
        for c in range(n_cands):
            if logw[n, c] == -np.inf:
                continue
            first = lo[node[n, c]]
            row = probs[slot_of[ctx[n, c]]]
            for pos in range(first, first + ends[node[n, c]]):
                kept = row[pos] > 0.0
                for x in cut:
                    if x == pos:
                        kept = False
                if kept:
                    lane[e], cand[e], token[e] = n, c, order[pos]
                    out[e] = logu[n, c] + np.log(row[pos])
                    e += 1
    return lane[:e], cand[:e], token[:e], out[:e]


@nb.njit(cache=True, nogil=True)
def keep_extensions(lane, logw, base, log_threshold):
    """Which extensions hold more than the threshold of base + all extensions of the lane.

    Returns (keep bool[E], dropped float64[N]); the share is genlm-bytes 0.2's.
    """
    n_lanes = len(base)
    top = base.copy()
    for e in range(len(lane)):
        top[lane[e]] = max(top[lane[e]], logw[e])
    total = np.zeros(n_lanes)
    for n in range(n_lanes):
        if top[n] > -np.inf:
            total[n] = np.exp(base[n] - top[n])
    for e in range(len(lane)):
        total[lane[e]] += np.exp(logw[e] - top[lane[e]])
    keep = np.empty(len(lane), np.bool_)
    lost = np.zeros(n_lanes)
    for e in range(len(lane)):
        n = lane[e]
        keep[e] = logw[e] - (top[n] + np.log(total[n])) > log_threshold
        if not keep[e]:
            lost[n] += np.exp(logw[e] - top[n])
    dropped = np.full(n_lanes, -np.inf)
    for n in range(n_lanes):
        if lost[n] > 0.0:
            dropped[n] = top[n] + np.log(lost[n])
    return keep, dropped


@nb.njit(cache=True, nogil=True)
def thin_extensions(lane, logw, log_z, log_threshold, uniform):
    """Unbiased thinning: keep w >= tau Z, draw the rest systematically at weight tau Z.

    `uniform` is float64[N], one number a lane. Returns (keep bool[E], new logw float64[E]).
    """
    keep = np.empty(len(lane), np.bool_)
    out = logw.copy()
    point = uniform.copy()  # distance to the next systematic point, in units of tau Z
    for e in range(len(lane)):
        n = lane[e]
        floor = log_threshold + log_z[n]
        if logw[e] >= floor:
            keep[e] = True
            continue
        point[n] -= np.exp(logw[e] - floor)
        keep[e] = point[n] < 0.0
        if keep[e]:
            point[n] += 1.0
            out[e] = floor
    return keep, out


@nb.njit(cache=True, nogil=True)
def append_extensions(ctx, node, logu, logw, lane, new_ctx, ext_logw):
    """The state with extended candidates, at the root, after the others: [N, C + E']."""
    n_lanes, n_cands = logw.shape
    count = np.zeros(n_lanes, np.int64)
    for n in lane:
        count[n] += 1
    width = n_cands + (count.max() if n_lanes else 0)
    out_ctx = np.full((n_lanes, width), -1, np.int64)
    out_node = np.zeros((n_lanes, width), np.int64)
    out_logu = np.full((n_lanes, width), -np.inf)
    out_logw = np.full((n_lanes, width), -np.inf)
    out_ctx[:, :n_cands] = ctx
    out_node[:, :n_cands] = node
    out_logu[:, :n_cands] = logu
    out_logw[:, :n_cands] = logw
    count[:] = n_cands
    for e in range(len(lane)):
        n = lane[e]
        c = count[n]
        out_ctx[n, c] = new_ctx[e]
        out_logu[n, c] = ext_logw[e]
        out_logw[n, c] = ext_logw[e]
        count[n] += 1
    return out_ctx, out_node, out_logu, out_logw


@nb.njit(cache=True, nogil=True)
def next_block(
    lo, hi, first_child, edge, probs, slot_of, roots, ctx, node, logu, logw, cut, n_bytes
):
    """Log mass of each next byte and of ending: float64[N, n_bytes + 1], not normalised."""
    n_lanes, n_cands = logw.shape
    out = np.zeros((n_lanes, n_bytes + 1))
    for n in range(n_lanes):
        top = logw[n].max() if n_cands else -np.inf
        if top > -np.inf:
            for c in range(n_cands):
                if logw[n, c] == -np.inf:
                    continue
                scale = np.exp(logu[n, c] - top)
                slot = slot_of[ctx[n, c]]
                row, root = probs[slot], roots[slot]
                x = node[n, c]
                for child in range(first_child[x], first_child[x + 1]):
                    out[n, edge[child]] += scale * _child_mass(
                        row, root, lo[child], hi[child], edge[child], x == 0, cut
                    )
                if x == 0:
                    for pos in cut:
                        out[n, n_bytes] += scale * row[pos]
        for b in range(n_bytes + 1):
            out[n, b] = top + np.log(out[n, b]) if out[n, b] > 0.0 else -np.inf
    return out


@nb.njit(cache=True, nogil=True)
def normalise(block, total):
    """Each row of float64[N, B] less its total float64[N]; -inf where the total is."""
    out = np.empty(block.shape)
    for n in range(block.shape[0]):
        for b in range(block.shape[1]):
            out[n, b] = block[n, b] - total[n] if total[n] > -np.inf else -np.inf
    return out


@nb.njit(cache=True, nogil=True)
def advance(lo, hi, first_child, edge, probs, slot_of, roots, ctx, node, logu, logw, byte, cut):
    """Read one byte a lane: (node int64[N, C], logw float64[N, C]); lost ones at -inf.

    `byte` int64[N]; a byte of -1 leaves its lane empty.
    """
    out_node = np.zeros(node.shape, np.int64)
    out_logw = np.full(logw.shape, -np.inf)
    for n in range(logw.shape[0]):
        if byte[n] < 0:
            continue
        for c in range(logw.shape[1]):
            if logw[n, c] == -np.inf:
                continue
            child = _child(first_child, edge, node[n, c], byte[n])
            if child >= 0:
                slot = slot_of[ctx[n, c]]
                mass = _child_mass(
                    probs[slot], roots[slot], lo[child], hi[child], byte[n], node[n, c] == 0, cut
                )
                if mass > 0.0:
                    out_node[n, c] = child
                    out_logw[n, c] = logu[n, c] + np.log(mass)
    return out_node, out_logw


@nb.njit(cache=True, nogil=True)
def node_logw(lo, hi, probs, slot_of, ctx, node, logu, logw, cut):
    """Weights of the same candidates when the positions in `cut` are left out: [N, C]."""
    out = np.full(logw.shape, -np.inf)
    for n in range(logw.shape[0]):
        for c in range(logw.shape[1]):
            if logw[n, c] == -np.inf:
                continue
            x = node[n, c]
            if x == 0:
                out[n, c] = logu[n, c]
                continue
            mass = _mass(probs[slot_of[ctx[n, c]]], lo[x], hi[x], cut)
            if mass > 0.0:
                out[n, c] = logu[n, c] + np.log(mass)
    return out


@nb.njit(cache=True, nogil=True)
def take(ctx, node, logu, logw, pick, new_logw):
    """Candidates `pick` int64[N, K] (-1: empty), with weights `new_logw` float64[N, K]."""
    shape = pick.shape
    out_ctx = np.full(shape, -1, np.int64)
    out_node = np.zeros(shape, np.int64)
    out_logu = np.full(shape, -np.inf)
    out_logw = np.full(shape, -np.inf)
    for n in range(shape[0]):
        for k in range(shape[1]):
            c = pick[n, k]
            if c >= 0:
                out_ctx[n, k] = ctx[n, c]
                out_node[n, k] = node[n, c]
                out_logu[n, k] = logu[n, c] + (new_logw[n, k] - logw[n, c])
                out_logw[n, k] = new_logw[n, k]
    return out_ctx, out_node, out_logu, out_logw


@nb.njit(cache=True, nogil=True)
def select_topk(logw, k, log_threshold):
    """The K best candidates above the threshold of their lane's total, best first.

    k < 0 keeps all. Returns (pick int64[N, K'], logw float64[N, K'], dropped float64[N])
    with K' the most that any lane keeps.
    """
    n_lanes, n_cands = logw.shape
    most = n_cands if k < 0 else min(k, n_cands)
    pick = np.full((n_lanes, most), -1, np.int64)
    out = np.full((n_lanes, most), -np.inf)
    dropped = np.full(n_lanes, -np.inf)
    total = logsumexp_rows(logw)
    widest = 0
    for n in range(n_lanes):
        if total[n] == -np.inf:
            continue
        order = np.argsort(-logw[n], kind="mergesort")
        kept = 0
        lost = 0.0
        for c in order:
            w = logw[n, c]
            if w == -np.inf:
                break
            if kept < most and w - total[n] > log_threshold:
                pick[n, kept] = c
                out[n, kept] = w
                kept += 1
            else:
                lost += np.exp(w - total[n])
        if lost > 0.0:
            dropped[n] = total[n] + np.log(lost)
        widest = max(widest, kept)
    return pick[:, :widest], out[:, :widest], dropped


@nb.njit(cache=True, nogil=True)
def select_unbiased(logw, k, uniform):
    """K candidates by optimal resampling (Fearnhead & Clifford 2003, section 3).

    Find c with sum(min(w / c, 1)) = K; keep w >= c as they are; one systematic pass over the
    rest with probability w / c, survivors at weight c. k < 0 keeps all. `uniform` is
    float64[N]. Returns (pick, logw) as `select_topk`, best first; each weight's expectation
    is the old weight, and the total does not change.
    """
    n_lanes, n_cands = logw.shape
    most = n_cands if k < 0 else min(k, n_cands)
    pick = np.full((n_lanes, most), -1, np.int64)
    out = np.full((n_lanes, most), -np.inf)
    widest = 0
    for n in range(n_lanes):
        order = np.argsort(-logw[n], kind="mergesort")
        count = 0
        while count < n_cands and logw[n, order[count]] > -np.inf:
            count += 1
        if count <= most:
            for i in range(count):
                pick[n, i] = order[i]
                out[n, i] = logw[n, order[i]]
            widest = max(widest, count)
            continue
        top = logw[n, order[0]]
        # With the `big` largest kept, c = (sum of the others) / (K - big); raise `big` until
        # the next one is below c.
        rest = np.zeros(count + 1)
        for i in range(count - 1, -1, -1):
            rest[i] = rest[i + 1] + np.exp(logw[n, order[i]] - top)
        big = 0
        while big < most - 1 and np.exp(logw[n, order[big]] - top) * (most - big) >= rest[big]:
            big += 1
        for i in range(big):
            pick[n, i] = order[i]
            out[n, i] = logw[n, order[i]]
        # The others relative to the best of them: beside `top` they may underflow.
        top = logw[n, order[big]]
        c = 0.0
        for i in range(big, count):
            c += np.exp(logw[n, order[i]] - top)
        c /= most - big
        level = top + np.log(c)
        if big:
            level = min(level, out[n, big - 1])  # equal but for rounding
        # Exactly K - big survivors: one in each unit of the running sum of w / c.
        kept = big
        point = uniform[n]
        run = 0.0
        for i in range(big, count):
            run += np.exp(logw[n, order[i]] - top) / c
            if run > point and kept < most:
                pick[n, kept] = order[i]
                out[n, kept] = level
                kept += 1
                point += 1.0
        while kept < most:  # rounding at the very end of the pass
            pick[n, kept] = order[count - 1]
            out[n, kept] = level
            kept += 1
        widest = max(widest, kept)
    return pick[:, :widest], out[:, :widest]


@nb.njit(cache=True, nogil=True)
def reserve(row, proxy, rescue, share):
    """Rows in which impossible but rescuable bytes hold `share` of the mass, by `proxy`.

    row, proxy float64[N, B + 1] (logs); rescue bool[N, B].
    """
    out = row.copy()
    n_bytes = rescue.shape[1]
    for n in range(row.shape[0]):
        total = 0.0
        for b in range(n_bytes):
            if rescue[n, b] and row[n, b] == -np.inf:
                total += np.exp(proxy[n, b]) + 1e-9  # none of them reads as impossible
        if total == 0.0:
            continue
        for b in range(n_bytes + 1):
            if b < n_bytes and rescue[n, b] and row[n, b] == -np.inf:
                out[n, b] = np.log(share * (np.exp(proxy[n, b]) + 1e-9) / total)
            else:
                out[n, b] = row[n, b] + np.log1p(-share)
    return out


@nb.njit(cache=True, nogil=True)
def open_read(order, lo, hi, ends, first_child, edge, probs, slot_of, roots, ctx, node, logu, logw, byte, cut, k, log_prune, log_threshold):  # fmt: skip
    """`select_topk`, then the extensions that `keep_extensions` admits for `byte`, fused.

    Returns (ctx, node, logu, logw, pruned float64[N], lane, cand, token, ext_logw,
    dropped float64[N]).
    """
    pick, weight, pruned = select_topk(logw, k, log_prune)
    ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    lane, cand, token, ext = extensions(order, lo, ends, probs, slot_of, ctx, node, logu, logw, cut)
    if len(lane) == 0:
        return ctx, node, logu, logw, pruned, lane, cand, token, ext, np.full(len(byte), -np.inf)
    _, able = advance(
        lo, hi, first_child, edge, probs, slot_of, roots, ctx, node, logu, logw, byte, cut
    )
    keep, dropped = keep_extensions(lane, ext, logsumexp_rows(able), log_threshold)
    return (
        ctx, node, logu, logw, pruned, lane[keep], cand[keep], token[keep], ext[keep], dropped,
    )  # fmt: skip


@nb.njit(cache=True, nogil=True)
def close_read(lo, hi, first_child, edge, probs, slot_of, roots, ctx, node, logu, logw, lane, new_ctx, ext_logw, byte, cut):  # fmt: skip
    """`append_extensions`, `advance` and a sort, best first, fused.

    Returns (ctx, node, logu, logw, log_z float64[N]).
    """
    if len(lane):
        ctx, node, logu, logw = append_extensions(ctx, node, logu, logw, lane, new_ctx, ext_logw)
    node, logw = advance(
        lo, hi, first_child, edge, probs, slot_of, roots, ctx, node, logu, logw, byte, cut
    )
    pick, weight, _ = select_topk(logw, -1, -np.inf)
    ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    return ctx, node, logu, logw, logsumexp_rows(logw)
