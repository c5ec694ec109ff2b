"""Random numbers of lanes, and which of their candidates and extensions are kept: compiled.

Everything is float64, and loops are serial.

The randomness of an unbiased beam must be fresh at each (string, step) and come back the
same when the beam is computed again. So each lane carries a 64-bit key, a hash of the seed
and of the bytes read, and draws by hashing the key with the number of the draw. The mixer
is the finaliser of SplitMix64 (Steele, Lea & Flood 2014, OOPSLA).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.compiled import entry, full, inner

KeyArray = npt.NDArray[np.uint64]
Array = npt.NDArray[Any]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_R11, _R27, _R30, _R31 = (np.uint64(n) for n in (11, 27, 30, 31))


class Candidates(NamedTuple):
    """Candidates of N lanes, C places a lane: int64[N, C] and float64[N, C], see `BeamState`."""

    ctx: Array
    node: Array
    logu: Array
    logw: Array


class Extensions(NamedTuple):
    """Token-ending extensions of candidates, one entry each, in lane order.

    Attributes:
        lane, cand: int64[E], which candidate is extended.
        token: int64[E], the token that ends there; or the context after it.
        logw: float64[E], weight of the extended candidate, nats.
    """

    lane: Array
    cand: Array
    token: Array
    logw: Array

    def take(self, keep: Array) -> Extensions:
        """Return the extensions that `keep` bool[E] marks."""
        return Extensions(*(a[keep] for a in self))


class Limits(NamedTuple):
    """What prunes: see `model.Rules`, of which these are a part."""

    cut: Array
    k: int
    log_threshold: float
    random: bool


# -- random numbers ------------------------------------------------------------------------


def mix(x: KeyArray) -> KeyArray:
    """SplitMix64's bijective mixer, elementwise over uint64; it is compiled, too."""
    x = (x ^ (x >> _R30)) * _M1
    x = (x ^ (x >> _R27)) * _M2
    return x ^ (x >> _R31)


# What a key is combined with for a draw: when thinning extensions, and when pruning candidates.
_PRUNE, _THIN = mix(np.arange(1, 3, dtype=np.uint64) * GOLDEN)
_mix = inner()(mix)


@inner()
def _uniforms(key, salt):
    """Return one number in [0, 1) a key uint64[N], float64[N]; `salt` is of the draw."""
    out = full(len(key), 0.0)
    for n in range(len(key)):
        out[n] = np.float64(_mix(key[n] ^ salt) >> _R11) * 2.0**-53
    return out


@entry()
def keys_after(key, symbols):
    """Keys uint64[N] after one more symbol (0..256; int64[N]) a lane."""
    out = key.copy()
    for n in range(len(key)):
        out[n] = _mix(key[n] + GOLDEN * np.uint64(symbols[n] + 2))
    return out


# -- what is kept --------------------------------------------------------------------------


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
def kept_of(keep, ext):
    """Return the extensions that `keep` bool[E] marks."""
    out = full((3, len(keep)), 0)
    logw = full(len(keep), 0.0)
    count = 0
    for e in range(len(keep)):
        if keep[e]:
            out[0, count], out[1, count] = ext.lane[e], ext.cand[e]
            out[2, count], logw[count] = ext.token[e], ext.logw[e]
            count += 1
    return Extensions(out[0, :count], out[1, :count], out[2, :count], logw[:count])


@inner()
def thinned(sure, ext, base, key, log_threshold):
    """Thin extensions unbiasedly: keep w >= tau Z, draw the rest systematically at weight tau Z.

    `sure` bool[E] marks extensions that are kept in any case. Z is exp(`base`) float64[N], and
    the draws are those of the lanes' keys. Returns the extensions that are kept.
    """
    keep = full(len(ext.lane), False)
    logw = ext.logw.copy()
    point = _uniforms(key, _THIN)  # distance to the next systematic point, in units of tau Z
    for e in range(len(ext.lane)):
        n = ext.lane[e]
        floor = log_threshold + base[n]
        if sure[e] or logw[e] >= floor:
            keep[e] = True
            continue
        point[n] -= np.exp(logw[e] - floor)
        keep[e] = point[n] < 0.0
        if keep[e]:
            point[n] += 1.0
            logw[e] = floor
    return kept_of(keep, Extensions(ext.lane, ext.cand, ext.token, logw))


@inner()
def empty(shape):
    """Return candidates [N, C] that hold nothing."""
    return Candidates(full(shape, -1), full(shape, 0), full(shape, -np.inf), full(shape, -np.inf))


@inner()
def take(some, pick, new_logw, most):
    """Candidates `pick` int64[N, K] (-1: empty), with weights `new_logw` float64[N, K].

    Of the K columns only the first `most` are taken.
    """
    out = empty((len(pick), most))
    for n in range(len(pick)):
        for k in range(most):
            c = pick[n, k]
            if c >= 0:
                out.ctx[n, k] = some.ctx[n, c]
                out.node[n, k] = some.node[n, c]
                out.logu[n, k] = some.logu[n, c] + (new_logw[n, k] - some.logw[n, c])
                out.logw[n, k] = new_logw[n, k]
    return out


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
def select_topk(logw, k, log_threshold):
    """Keep the K best candidates above the threshold of their lane's total, best first.

    The best is kept in any case. k < 0 keeps all. Returns (pick int64[N, K], logw float64[N, K],
    the most that any lane keeps, dropped float64[N]).
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
    return pick, out, widest, dropped


@inner()
def select_unbiased(logw, k, uniform):
    """K candidates by optimal resampling (Fearnhead & Clifford 2003, section 3).

    Find c with sum(min(w / c, 1)) = K; keep w >= c as they are; one systematic pass over the
    rest with probability w / c, survivors at weight c. k < 0 keeps all. `uniform` is
    float64[N]. Returns (pick, logw, most) as `select_topk`, best first; each weight's expectation
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
    return pick, out, widest


@inner()
def add_logs(a, b):
    """log(exp(a) + exp(b))."""
    top = max(a, b)
    if top == -np.inf:
        return top
    return top + np.log(np.exp(a - top) + np.exp(b - top))


@inner()
def prune_lanes(some, key, limits, dropped):
    """Keep `limits.k` candidates a lane (below 0: all), best first; if random by the lane's key.

    The log mass dropped is added to `dropped` float64[N]. Returns (candidates, log_z float64[N]).
    """
    if limits.random:
        pick, weight, most = select_unbiased(some.logw, limits.k, _uniforms(key, _PRUNE))
    else:
        pick, weight, most, lost = select_topk(some.logw, limits.k, limits.log_threshold)
        for n in range(len(lost)):
            dropped[n] = add_logs(dropped[n], lost[n])
    some = take(some, pick, weight, most)
    return some, logsumexp_rows(some.logw)


@inner()
def admit(ext, base, key, limits, within):
    """Return the extensions that are kept, and the log mass of the others, float64[N].

    `base` float64[N] is what they are held against: see `keep_extensions`; if random they
    are thinned by the keys, below the threshold's share of it.
    """
    if limits.random:
        never = full(len(ext.lane), False)
        kept = thinned(never, ext, base, key, limits.log_threshold)
        return kept, full(len(base), -np.inf)
    keep, dropped = keep_extensions(ext.lane, ext.logw, base, limits.log_threshold, within)
    return kept_of(keep, ext), dropped
