"""The beam's arithmetic on the CPU, compiled: loops over lanes, candidates and tokens.

Same functions and meaning as `kernels_torch`, which is the oracle in the tests. Loops are
serial, so results do not depend on the number of threads. Everything is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.lm.host_rows import FAN

# No nnan/ninf: -inf is a legitimate weight here.
_SUM = {"reassoc", "nsz", "contract", "arcp"}


class TrieArrays(NamedTuple):
    """Arrays of a `TokenTrie` that the kernels walk."""

    lo: npt.NDArray[np.int32]
    hi: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    first_child: npt.NDArray[np.int32]
    edge: npt.NDArray[np.uint8]


@nb.njit(cache=True, nogil=True, fastmath=_SUM)
def _sum(row, order):
    s = 0.0
    for i in range(len(order)):
        s += np.float64(row[order[i]])
    return s


@nb.njit(cache=True, nogil=True, fastmath=_SUM)
def _sum_labelled(row, labels, first, count):
    """Sum of the tokens with a label in first .. first + count: for many, faster than
    fetching each."""
    s = 0.0
    for i in range(len(labels)):
        s += np.float64(row[i]) if np.uint16(labels[i] - first) < count else 0.0
    return s


@nb.njit(cache=True, nogil=True)
def _heavy_index(rows, node):
    """Which heavy node `node` is, or -1."""
    for h in range(len(rows.heavy)):
        if rows.heavy[h] == node:
            return h
    return -1


@nb.njit(cache=True, nogil=True)
def _mass(rows, slot, lo, hi, cut):
    """Mass of positions lo..hi without those in the sorted array `cut`."""
    row = rows.probs[slot]
    s = 0.0
    for c in cut:
        if lo <= c < hi:
            s += _sum(row, rows.order[lo:c])
            lo = c + 1
    return (s + _sum(row, rows.order[lo:hi])) * rows.scale[slot]


@nb.njit(cache=True, nogil=True)
def _touches(lo, hi, cut):
    found = False
    for c in cut:
        found |= lo <= c < hi
    return found


@nb.njit(cache=True, nogil=True)
def _child_mass(trie, rows, slot, node, child, cut):
    """Mass below an edge of `node`; those of heavy nodes may have been summed already."""
    lo, hi = trie.lo[child], trie.hi[child]
    if _touches(lo, hi, cut):
        return _mass(rows, slot, lo, hi, cut)
    many = 4 * (hi - lo) > len(rows.labels)
    if many or rows.summed[slot]:
        h = _heavy_index(rows, node)
        if h >= 0 and rows.summed[slot]:
            return rows.roots[slot, FAN * h + trie.edge[child]]
        if h >= 0:
            g = _heavy_index(rows, child)
            first = FAN * g if g >= 0 else FAN * h + trie.edge[child]
            count = FAN * (rows.nest[g, 2] - g) if g >= 0 else 1
            row = rows.probs[slot]
            sum_ = _sum_labelled(row, rows.labels, np.uint16(first), np.uint16(count))
            return sum_ * rows.scale[slot]
    return _mass(rows, slot, lo, hi, cut)


@nb.njit(cache=True, nogil=True, fastmath=_SUM)
def _add_scaled(out, row, scale):
    for i in range(len(out)):
        out[i] += scale * row[i]


@nb.njit(cache=True, nogil=True)
def _sum_by_label(labels, values, bins):
    """bins[label, any] += value; eight columns, as sums into one place wait for each other."""
    whole = len(labels) - len(labels) % 8
    for a in range(0, whole, 8):
        x, v = labels[a : a + 8], values[a : a + 8]
        bins[x[0], 0] += v[0]
        bins[x[1], 1] += v[1]
        bins[x[2], 2] += v[2]
        bins[x[3], 3] += v[3]
        bins[x[4], 4] += v[4]
        bins[x[5], 5] += v[5]
        bins[x[6], 6] += v[6]
        bins[x[7], 7] += v[7]
    for i in range(whole, len(labels)):
        bins[labels[i], 0] += values[i]


_BLOCK = 1024  # tokens summed at a time, so that everything stays in the first cache


@nb.njit(cache=True, nogil=True)
def _heavy_masses(rows, slots, scales, cut):
    """Mass below each byte after each heavy node, summed over rows `slots` times `scales`.

    float64[H * 257], as `RowArrays.roots`; tokens at positions `cut` do not count.
    """
    labels = rows.labels
    n_heavy = len(rows.heavy)
    bins = np.zeros((FAN * n_heavy + 1, 8))
    block = np.empty(_BLOCK, rows.probs.dtype)  # as exact as what is added up
    shared = rows.scale[slots[0]]  # a row's own is too small for single precision
    factors = np.empty(len(slots), rows.probs.dtype)
    for i in range(len(slots)):
        factors[i] = scales[i] * (rows.scale[slots[i]] / shared)
    for a in range(0, len(labels), _BLOCK):
        b = min(len(labels), a + _BLOCK)
        values = block[: b - a]
        values[:] = 0.0
        for i in range(len(slots)):
            _add_scaled(values, rows.probs[slots[i], a:b], factors[i])
        for c in cut:
            if a <= rows.order[c] < b:
                values[rows.order[c] - a] = 0.0
        _sum_by_label(labels[a:b], values, bins)
    out = np.zeros(FAN * n_heavy)
    for label in range(len(out)):
        for i in range(8):
            out[label] += bins[label, i]
        out[label] *= shared
    for h in range(n_heavy - 1, 0, -1):  # what is below it is complete by now
        out[FAN * rows.nest[h, 0] + rows.nest[h, 1]] = out[FAN * h : FAN * (h + 1)].sum()
    return out


@nb.njit(cache=True, nogil=True)
def _sum_root(rows, slot):
    """Have `roots` of a slot."""
    if not rows.summed[slot]:
        one = np.ones(1)
        rows.roots[slot] = _heavy_masses(rows, np.full(1, slot), one, np.empty(0, np.int64))
        rows.summed[slot] = True


@nb.njit(cache=True, nogil=True)
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
def extensions(trie, rows, ctx, node, logu, logw, cut):
    """Every token that ends at a candidate's node: (lane, cand, token, logw)."""
    count = 0
    n_lanes, n_cands = logw.shape
    for n in range(n_lanes):
        for c in range(n_cands):
            if logw[n, c] > -np.inf:
                count += trie.ends[node[n, c]]
    lane = np.empty(count, np.int64)
    cand = np.empty(count, np.int64)
    token = np.empty(count, np.int64)
    out = np.empty(count)
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
def _add_heavy(trie, rows, h, ctx, node, scale, cut, out):
    """Add to out[257] what candidates at heavy node `h` give, and mark them (scale 0).

    Two rows or more of one lane are added up first and sorted into bytes once. What a row
    alone comes to is kept, as other lanes and the next byte may want it too.
    """
    count = 0
    x = rows.heavy[h]
    slots = np.empty(len(ctx), np.int64)
    scales = np.empty(len(ctx))
    for c in range(len(ctx)):
        if node[c] == x and scale[c] > 0.0 and not rows.summed[rows.slot_of[ctx[c]]]:
            slots[count], scales[count] = rows.slot_of[ctx[c]], scale[c]
            count += 1
    if count == 1:
        _sum_root(rows, slots[0])
    if count < 2:
        return
    mass = _heavy_masses(rows, slots[:count], scales[:count], cut)
    out[:256] += mass[FAN * h : FAN * h + 256]
    for c in range(len(ctx)):
        if node[c] == x and scale[c] > 0.0 and not rows.summed[rows.slot_of[ctx[c]]]:
            scale[c] = 0.0


@nb.njit(cache=True, nogil=True)
def next_block(trie, rows, ctx, node, logu, logw, cut, n_bytes):
    """Log mass of each next byte and of ending: float64[N, n_bytes + 1], not normalised."""
    n_lanes, n_cands = logw.shape
    out = np.zeros((n_lanes, n_bytes + 1))
    scale = np.empty(n_cands)
    for n in range(n_lanes):
        top = logw[n].max() if n_cands else -np.inf
        if top > -np.inf:
            for c in range(n_cands):
                scale[c] = np.exp(logu[n, c] - top) if logw[n, c] > -np.inf else 0.0
                if node[n, c] == 0 and scale[c] > 0.0:
                    slot = rows.slot_of[ctx[n, c]]
                    for pos in cut:
                        p = rows.probs[slot, rows.order[pos]] * rows.scale[slot]
                        out[n, n_bytes] += scale[c] * p
                    if n_lanes > 1:
                        _sum_root(rows, slot)
            for h in range(len(rows.heavy)):
                _add_heavy(trie, rows, h, ctx[n], node[n], scale, cut, out[n])
            for c in range(n_cands):
                if scale[c] == 0.0:
                    continue
                slot = rows.slot_of[ctx[n, c]]
                x = node[n, c]
                for child in range(trie.first_child[x], trie.first_child[x + 1]):
                    mass = _child_mass(trie, rows, slot, x, child, cut)
                    out[n, trie.edge[child]] += scale[c] * mass
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
def _move(trie, rows, ctx, node, logu, logw, first, byte, cut, out_node, out_logw):
    """`advance` of the candidates from place `first` on, into other arrays or the same."""
    for n in range(logw.shape[0]):
        for c in range(first, logw.shape[1]):
            child, weight = -1, -np.inf
            if logw[n, c] > -np.inf and byte[n] >= 0:
                child = _child(trie, node[n, c], byte[n])
            if child >= 0:
                slot = rows.slot_of[ctx[n, c]]
                mass = _child_mass(trie, rows, slot, node[n, c], child, cut)
                if mass > 0.0:
                    weight = logu[n, c] + np.log(mass)
            out_node[n, c] = child if weight > -np.inf else 0
            out_logw[n, c] = weight


@nb.njit(cache=True, nogil=True)
def advance(trie, rows, ctx, node, logu, logw, byte, cut):
    """Read one byte a lane: (node int64[N, C], logw float64[N, C]); lost ones at -inf.

    `byte` int64[N]; a byte of -1 leaves its lane empty.
    """
    out_node = np.empty(node.shape, np.int64)
    out_logw = np.empty(logw.shape)
    _move(trie, rows, ctx, node, logu, logw, 0, byte, cut, out_node, out_logw)
    return out_node, out_logw


@nb.njit(cache=True, nogil=True)
def node_logw(trie, rows, ctx, node, logu, logw, cut):
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
            mass = _mass(rows, rows.slot_of[ctx[n, c]], trie.lo[x], trie.hi[x], cut)
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
def open_read(trie, rows, ctx, node, logu, logw, byte, cut, k, log_prune, log_threshold):
    """`select_topk`, then the extensions that `keep_extensions` admits for `byte`, fused.

    Returns (ctx, node, logu, logw, pruned float64[N], lane, cand, token, ext_logw,
    dropped float64[N]).
    """
    ctx, node, logu, logw, pruned, _, _, lane, cand, token, ext, dropped = begin_read(
        trie, rows, ctx, node, logu, logw, byte, cut, k, log_prune, log_threshold
    )
    return ctx, node, logu, logw, pruned, lane, cand, token, ext, dropped


@nb.njit(cache=True, nogil=True)
def begin_read(trie, rows, ctx, node, logu, logw, byte, cut, k, log_prune, log_threshold):
    """`open_read` that also tells, before the extensions, where the candidates come to by
    `byte` and what they weigh there: for `end_read`, which need not sum that again."""
    pick, weight, pruned = select_topk(logw, k, log_prune)
    ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    moved, able = advance(trie, rows, ctx, node, logu, logw, byte, cut)
    lane, cand, token, ext = extensions(trie, rows, ctx, node, logu, logw, cut)
    dropped = np.full(len(byte), -np.inf)
    if len(lane):
        keep, dropped = keep_extensions(lane, ext, logsumexp_rows(able), log_threshold)
        lane, cand, token, ext = lane[keep], cand[keep], token[keep], ext[keep]
    return ctx, node, logu, logw, pruned, moved, able, lane, cand, token, ext, dropped


@nb.njit(cache=True, nogil=True)
def close_read(trie, rows, ctx, node, logu, logw, lane, new_ctx, ext_logw, byte, cut):
    """`append_extensions`, `advance` and a sort, best first, fused.

    Returns (ctx, node, logu, logw, log_z float64[N]).
    """
    moved, able = advance(trie, rows, ctx, node, logu, logw, byte, cut)
    return end_read(trie, rows, ctx, moved, logu, able, lane, new_ctx, ext_logw, byte, cut)


@nb.njit(cache=True, nogil=True)
def end_read(trie, rows, ctx, moved, logu, able, lane, new_ctx, ext_logw, byte, cut):
    """`close_read` of candidates that have come to `moved`, with weights `able`, already."""
    node, logw = moved, able
    if len(lane):
        old = logw.shape[1]
        ctx, node, logu, logw = append_extensions(ctx, node, logu, logw, lane, new_ctx, ext_logw)
        _move(trie, rows, ctx, node, logu, logw, old, byte, cut, node, logw)
    pick, weight, _ = select_topk(logw, -1, -np.inf)
    ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    return ctx, node, logu, logw, logsumexp_rows(logw)
