"""The beam's candidates on the CPU, compiled: extend, move, weigh and choose them.

Same functions and meaning as `kernels_torch`, which is the oracle in the tests. Loops over
lanes and candidates are serial, and everything is float64. What candidates weigh in the rows
comes from `masses_numba`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.masses_numba import child_mass, sum_range
from genlm_bytes_smc.compiled import entry, full, inner

# Not as literals, for which numba compiles what they are passed to once more.
_FIRST = np.int64(0)
_ALL = np.int64(-1)


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
def logsumexp_rows(logw):
    """float64[N] from float64[N, C]; -inf for an empty row."""
    out = full(logw.shape[0], 0.0)
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
def keep_extensions(lane, logw, base, log_threshold, within):
    """Return which extensions hold more than the threshold of base + all extensions of the lane.

    The share is genlm-bytes 0.2's. Where no extension holds it, the heaviest is kept if it
    outweighs what the lane has without them: base, or base less the extensions if they are
    `within` it. Returns (keep bool[E], dropped float64[N]).
    """
    n_lanes = len(base)
    top = base.copy()
    for e in range(len(lane)):
        top[lane[e]] = max(top[lane[e]], logw[e])
    total = full(n_lanes, 0.0)
    for n in range(n_lanes):
        if top[n] > -np.inf:
            total[n] = np.exp(base[n] - top[n])
    for e in range(len(lane)):
        total[lane[e]] += np.exp(logw[e] - top[lane[e]])
    keep = full(len(lane), False)
    heaviest = full(n_lanes, -1)
    for e in range(len(lane)):
        n = lane[e]
        keep[e] = logw[e] - (top[n] + np.log(total[n])) > log_threshold
        if heaviest[n] < 0 or logw[e] > logw[heaviest[n]]:
            heaviest[n] = e
    for n in range(n_lanes):
        e = heaviest[n]
        if e >= 0 and not keep[e]:
            own = np.exp(base[n] - top[n])
            left = own - (total[n] - own) if within else own
            keep[e] = np.exp(logw[e] - top[n]) > left * (1.0 + 1e-9)  # not by rounding alone
    lost = full(n_lanes, 0.0)
    for e in range(len(lane)):
        if not keep[e]:
            lost[lane[e]] += np.exp(logw[e] - top[lane[e]])
    dropped = full(n_lanes, -np.inf)
    for n in range(n_lanes):
        if lost[n] > 0.0:
            dropped[n] = top[n] + np.log(lost[n])
    return keep, dropped


@inner()
def kept_of(keep, lane, cand, token, ext):
    """Return the extensions that `keep` bool[E] marks."""
    out = full((3, len(keep)), 0)
    logw = full(len(keep), 0.0)
    count = 0
    for e in range(len(keep)):
        if keep[e]:
            out[0, count], out[1, count], out[2, count] = lane[e], cand[e], token[e]
            logw[count] = ext[e]
            count += 1
    return out[0, :count], out[1, :count], out[2, :count], logw[:count]


@entry()
def thin_extensions(lane, logw, log_z, log_threshold, uniform):
    """Unbiased thinning: keep w >= tau Z, draw the rest systematically at weight tau Z.

    `uniform` is float64[N], one number a lane. Returns (keep bool[E], new logw float64[E]).
    """
    keep = full(len(lane), False)
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


@entry()
def normalise(block, total):
    """Each row of float64[N, B] less its total float64[N]; -inf where the total is."""
    out = full(block.shape, 0.0)
    for n in range(block.shape[0]):
        for b in range(block.shape[1]):
            out[n, b] = block[n, b] - total[n] if total[n] > -np.inf else -np.inf
    return out


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


@entry()
def take(ctx, node, logu, logw, pick, new_logw):
    """Candidates `pick` int64[N, K] (-1: empty), with weights `new_logw` float64[N, K]."""
    shape = pick.shape
    out_ctx = full(shape, -1)
    out_node = full(shape, 0)
    out_logu = full(shape, -np.inf)
    out_logw = full(shape, -np.inf)
    for n in range(shape[0]):
        for k in range(shape[1]):
            c = pick[n, k]
            if c >= 0:
                out_ctx[n, k] = ctx[n, c]
                out_node[n, k] = node[n, c]
                out_logu[n, k] = logu[n, c] + (new_logw[n, k] - logw[n, c])
                out_logw[n, k] = new_logw[n, k]
    return out_ctx, out_node, out_logu, out_logw


@inner()
def _descending(weight):
    """Places of the numbers in `weight`, largest first, equal ones as they stand.

    A merge sort of our own (Knuth, The Art of Computer Programming, volume 3, section 5.2.4):
    numpy's, in numba's form, takes seconds to compile.
    """
    n = len(weight)
    order, merged = full(n, 0), full(n, 0)
    for i in range(n):
        order[i] = i
    width = 1
    while width < n:
        for start in range(0, n, 2 * width):
            middle, end = min(start + width, n), min(start + 2 * width, n)
            a, b = start, middle
            for at in range(start, end):
                if a < middle and (b == end or weight[order[a]] >= weight[order[b]]):
                    merged[at] = order[a]
                    a += 1
                else:
                    merged[at] = order[b]
                    b += 1
        order, merged = merged, order
        width *= 2
    return order


@inner()
def _narrowed(pick, weight, width):
    """Return the first `width` columns of both, as arrays of their own: one type for all."""
    out_pick = full((len(pick), width), 0)
    out_weight = full((len(pick), width), 0.0)
    for n in range(len(pick)):
        for k in range(width):
            out_pick[n, k] = pick[n, k]
            out_weight[n, k] = weight[n, k]
    return out_pick, out_weight


@entry()
def select_topk(logw, k, log_threshold):
    """Keep the K best candidates above the threshold of their lane's total, best first.

    The best is kept in any case. k < 0 keeps all. Returns (pick int64[N, K'], logw float64[N, K'], dropped float64[N])
    with K' the most that any lane keeps.
    """
    n_lanes, n_cands = logw.shape
    most = n_cands if k < 0 else min(k, n_cands)
    pick = full((n_lanes, most), -1)
    out = full((n_lanes, most), -np.inf)
    dropped = full(n_lanes, -np.inf)
    total = logsumexp_rows(logw)
    widest = 0
    for n in range(n_lanes):
        if total[n] == -np.inf:
            continue
        order = _descending(logw[n])
        kept = 0
        lost = 0.0
        for c in order:
            w = logw[n, c]
            if w == -np.inf:
                break
            if kept < most and (kept == 0 or w - total[n] > log_threshold):
                pick[n, kept] = c
                out[n, kept] = w
                kept += 1
            else:
                lost += np.exp(w - total[n])
        if lost > 0.0:
            dropped[n] = total[n] + np.log(lost)
        widest = max(widest, kept)
    pick, out = _narrowed(pick, out, widest)
    return pick, out, dropped


@entry()
def select_unbiased(logw, k, uniform):
    """K candidates by optimal resampling (Fearnhead & Clifford 2003, section 3).

    Find c with sum(min(w / c, 1)) = K; keep w >= c as they are; one systematic pass over the
    rest with probability w / c, survivors at weight c. k < 0 keeps all. `uniform` is
    float64[N]. Returns (pick, logw) as `select_topk`, best first; each weight's expectation
    is the old weight, and the total does not change.
    """
    n_lanes, n_cands = logw.shape
    most = n_cands if k < 0 else min(k, n_cands)
    pick = full((n_lanes, most), -1)
    out = full((n_lanes, most), -np.inf)
    widest = 0
    for n in range(n_lanes):
        order = _descending(logw[n])
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
        rest = full(count + 1, 0.0)
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
    return _narrowed(pick, out, widest)


@entry()
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


@entry()
def open_read(trie, rows, ctx, node, logu, logw, byte, cut, k, log_prune, log_threshold):
    """`select_topk`, then the extensions that `keep_extensions` admits for `byte`, fused.

    Returns (ctx, node, logu, logw, pruned float64[N], lane, cand, token, ext_logw,
    dropped float64[N]).
    """
    ctx, node, logu, logw, pruned, _, _, lane, cand, token, ext, dropped = begin_read(
        trie, rows, ctx, node, logu, logw, byte, cut, k, log_prune, log_threshold
    )
    return ctx, node, logu, logw, pruned, lane, cand, token, ext, dropped


@inner(inline="always")
def begin_read(trie, rows, ctx, node, logu, logw, byte, cut, k, log_prune, log_threshold):
    """`open_read` that also tells, before the extensions, where the candidates come to by
    `byte` and what they weigh there: for `end_read`, which need not sum that again."""
    pick, weight, pruned = select_topk(logw, k, log_prune)
    ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    moved, able = advance(trie, rows, ctx, node, logu, logw, byte, cut)
    lane, cand, token, ext = extensions(trie, rows, ctx, node, logu, logw, cut)
    dropped = full(len(byte), -np.inf)
    if len(lane):
        keep, dropped = keep_extensions(lane, ext, logsumexp_rows(able), log_threshold, False)
        lane, cand, token, ext = kept_of(keep, lane, cand, token, ext)
    return ctx, node, logu, logw, pruned, moved, able, lane, cand, token, ext, dropped


@entry()
def close_read(trie, rows, ctx, node, logu, logw, lane, new_ctx, ext_logw, byte, cut):
    """`append_extensions`, `advance` and a sort, best first, fused.

    Returns (ctx, node, logu, logw, log_z float64[N]).
    """
    moved, able = advance(trie, rows, ctx, node, logu, logw, byte, cut)
    return end_read(trie, rows, ctx, moved, logu, able, lane, new_ctx, ext_logw, byte, cut)


@inner(inline="always")
def end_read(trie, rows, ctx, moved, logu, able, lane, new_ctx, ext_logw, byte, cut):
    """`close_read` of candidates that have come to `moved`, with weights `able`, already."""
    node, logw = moved, able
    if len(lane):
        old = logw.shape[1]
        ctx, node, logu, logw = append_extensions(ctx, node, logu, logw, lane, new_ctx, ext_logw)
        _move(trie, rows, ctx, node, logu, logw, old, byte, cut, node, logw)
    pick, weight, _ = select_topk(logw, _ALL, -np.inf)
    ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    return ctx, node, logu, logw, logsumexp_rows(logw)
