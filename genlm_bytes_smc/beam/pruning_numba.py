"""Which candidates and extensions of N lanes are kept, compiled: top-K, and at random.

Everything is float64, and loops are serial. Random numbers are functions of a lane's key, as in
`rng`, whose numbers these are.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam import rng
from genlm_bytes_smc.compiled import entry, full, inner

_GOLDEN, _R11 = rng.GOLDEN, np.uint64(11)
_THIN, _PRUNE = rng.salt(rng.THIN), rng.salt(rng.PRUNE)
_mix = inner()(rng.mix)


@inner()
def _uniforms(key, salt):
    """Return one number in [0, 1) a key uint64[N], float64[N]; `salt` is of the draw."""
    out = full(len(key), 0.0)
    for n in range(len(key)):
        out[n] = np.float64(_mix(key[n] ^ salt) >> _R11) * 2.0**-53
    return out


@inner()
def keys_after(key, symbols):
    """Return `rng.read_keys`."""
    out = key.copy()
    for n in range(len(key)):
        out[n] = _mix(key[n] + _GOLDEN * np.uint64(symbols[n] + 2))
    return out


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


@inner()
def thin_extensions(sure, lane, logw, log_z, log_threshold, uniform):
    """Unbiased thinning: keep w >= tau Z, draw the rest systematically at weight tau Z.

    `sure` bool[E] marks extensions that are kept in any case. `uniform` is float64[N], one
    number a lane. Returns (keep bool[E], new logw float64[E]).
    """
    keep = full(len(lane), False)
    out = logw.copy()
    point = uniform.copy()  # distance to the next systematic point, in units of tau Z
    for e in range(len(lane)):
        n = lane[e]
        floor = log_threshold + log_z[n]
        if sure[e] or logw[e] >= floor:
            keep[e] = True
            continue
        point[n] -= np.exp(logw[e] - floor)
        keep[e] = point[n] < 0.0
        if keep[e]:
            point[n] += 1.0
            out[e] = floor
    return keep, out


@inner()
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


@inner()
def select_topk(logw, k, log_threshold):
    """Keep the K best candidates above the threshold of their lane's total, best first.

    The best is kept in any case. k < 0 keeps all. Returns (pick int64[N, K'],
    logw float64[N, K'], dropped float64[N]) with K' the most that any lane keeps.
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


@inner()
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


@inner()
def add_logs(a, b):
    """log(exp(a) + exp(b))."""
    top = max(a, b)
    if top == -np.inf:
        return top
    return top + np.log(np.exp(a - top) + np.exp(b - top))


@inner()
def prune_lanes(ctx, node, logu, logw, key, k, log_threshold, random, dropped):
    """Keep `k` candidates a lane (k < 0: all), best first; with `random` by their keys.

    The log mass dropped is added to `dropped` float64[N]. Returns (ctx, node, logu, logw, log_z).
    """
    if random:
        pick, weight = select_unbiased(logw, k, _uniforms(key, _PRUNE))
    else:
        pick, weight, lost = select_topk(logw, k, log_threshold)
        for n in range(len(lost)):
            dropped[n] = add_logs(dropped[n], lost[n])
    ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    return ctx, node, logu, logw, logsumexp_rows(logw)


@inner()
def keep_thinned(sure, lane, ext, base, key, log_threshold):
    """Return `thin_extensions` with the numbers of the keys."""
    return thin_extensions(sure, lane, ext, base, log_threshold, _uniforms(key, _THIN))


@inner()
def admit(lane, cand, token, ext, base, key, log_threshold, random, within):
    """Return the extensions that are kept, and the log mass of the others, float64[N].

    `base` float64[N] is what they are held against: see `keep_extensions`; with `random` they
    are thinned by the keys, below the threshold's share of it.
    """
    if random:
        keep, ext = keep_thinned(full(len(lane), False), lane, ext, base, key, log_threshold)
        dropped = full(len(base), -np.inf)
    else:
        keep, dropped = keep_extensions(lane, ext, base, log_threshold, within)
    lane, cand, token, ext = kept_of(keep, lane, cand, token, ext)
    return lane, cand, token, ext, dropped


@inner()
def _log_add(a, b):
    """log(exp(a) + exp(b)), as numpy's `logaddexp`."""
    top, low = max(a, b), min(a, b)
    return top if low == -np.inf else top + np.log1p(np.exp(low - top))


@inner()
def mass_after(lane, ext, able, log_z, guess):
    """Return the mass of each lane after a byte, float64[N] nats, if extensions give it the
    probability that the tokens in flight gave it, and at least exp(`guess`).

    `able` float64[N] is the weight of the candidates that can read the byte, `log_z` that of all.
    """
    out = full(len(able), -np.inf)
    for e in range(len(lane)):
        out[lane[e]] = _log_add(out[lane[e]], ext[e])
    for n in range(len(able)):
        before = np.log(max(np.exp(log_z[n]) - np.exp(out[n]), 0.0))
        seen = able[n] - before if able[n] > -np.inf else -np.inf
        out[n] = _log_add(able[n] - max(seen, guess), out[n])
    return out
