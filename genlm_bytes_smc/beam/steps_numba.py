"""Whole steps of N lanes, compiled: no return to Python until a row is missing.

A step whose rows are not all there returns the contexts that lack one and has no effect but that
those contexts exist; it is called again with the rows there. States go in and out as one array
(`candidates_numba`). The arrays of trie, rows and tree come in as `Handles`. `random` means
`prune="unbiased"`: draws are functions of the lanes' keys uint64[N].
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.candidates_numba import (
    advance,
    begin_read,
    children,
    end_read,
    extend_all,
    grow,
    lacking,
    nothing,
    pack,
    unpack,
)
from genlm_bytes_smc.beam.masses_numba import ROOT, add_children, add_masses, opened, sum_root
from genlm_bytes_smc.beam.pruning_numba import add_logs, keys_after, prune_lanes
from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.lm.contexts_numba import NO_ROOM

_NO, _NOWHERE, _NOT_AT_ALL = np.bool_(False), np.int64(0), np.float64(0.0)


@entry()
def prune(packed, key, log_dropped, k, log_threshold, random):
    """Prune: (packed state, float64[2, N]: log_z, and all that was dropped so far)."""
    ctx, node, logu, logw = unpack(packed)
    numbers = full((2, len(key)), 0.0)
    for n in range(len(key)):  # array assignments take seconds to compile, for their error
        numbers[1, n] = log_dropped[n]
    ctx, node, logu, logw, log_z = prune_lanes(
        ctx, node, logu, logw, key, k, log_threshold, random, numbers[1]
    )
    for n in range(len(key)):
        numbers[0, n] = log_z[n]
    return pack(ctx, node, logu, logw), numbers


@entry()
def read(
    handles, probs, packed, key, log_z, log_dropped, byte, cut, k, log_prune, log_threshold, random
):
    """Prune (k < 0 and log_prune -inf: do not), and read a known byte a lane.

    Returns (packed state; keys; float64[2, N]: log_z, and all that was dropped so far; missing).
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = unpack(packed)
    dropped = log_dropped.copy()
    if k >= 0 or log_prune > -np.inf:
        ctx, node, logu, logw, _ = prune_lanes(
            ctx, node, logu, logw, key, k, log_prune, random, dropped
        )
    numbers = full((2, len(byte)), -np.inf)
    missing = lacking(rows, ctx, logw)
    if len(missing):
        return nothing(), key, numbers, missing
    moved, able, lane, cand, token, ext, left = begin_read(
        trie, rows, ctx, node, logu, logw, key, log_z, byte, cut, log_threshold, random, _NO,
        _NO, full(0, 0), _NOWHERE, _NOT_AT_ALL,
    )  # fmt: skip
    new, missing = children(tree, rows, ctx, lane, cand, token)
    if len(missing):
        return nothing(), key, numbers, missing
    ctx, node, logu, logw, total = end_read(
        trie, rows, ctx, moved, logu, able, lane, new, ext, byte, cut
    )
    for n in range(len(byte)):
        numbers[0, n], numbers[1, n] = total[n], add_logs(dropped[n], left[n])
    after = keys_after(key, byte) if random else key
    return pack(ctx, node, logu, logw), after, numbers, missing


@inner()
def _ending(rows, ctx, node, logu, logw, cut):
    """Log weight of ending the text after one lane's candidates, as `add_masses` sums it."""
    top = -np.inf
    for c in range(len(logw)):
        top = max(top, logw[c])
    out = 0.0
    for c in range(len(logw)):
        if logw[c] > -np.inf and node[c] == 0:
            slot = rows.slot_of[ctx[c]]
            for pos in cut:
                p = rows.probs[slot, rows.order[pos]] * rows.scale[slot]
                out += np.exp(logu[c] - top) * p
    return top + np.log(out) if out > 0.0 else -np.inf


@entry()
def step(handles, probs, extended, key, symbols, cut, k, log_threshold, random):
    """Read one symbol a lane in extended candidates, prune, and extend what is kept.

    Args:
        handles, probs: `Handles`, and the rows.
        extended, key: the candidates with their extensions, and uint64[N].
        symbols: int64[N], a byte; 256 ends the text, -1 reads nothing: both empty the lane.
        cut, k, log_threshold, random: see `Rules`.

    Returns:
        The packed state; its candidates with their extensions, packed; the keys; float64[3, N]:
        log_z (of a text that ends, the weight of the whole text), the log mass that pruning
        dropped and that of the extensions left out; contexts that kept the step from being done:
        those of `extended` that lack rows, or [NO_ROOM]. Rows of the new extensions may be
        missing.
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = unpack(extended)
    n_lanes = len(symbols)
    numbers = full((3, n_lanes), -np.inf)
    missing = lacking(rows, ctx, logw)
    if len(missing):
        return nothing(), nothing(), key, numbers, missing
    byte = full(n_lanes, -1)
    for n in range(n_lanes):
        if symbols[n] < 256:
            byte[n] = symbols[n]
    after = keys_after(key, symbols) if random else key
    moved, weight = advance(trie, rows, ctx, node, logu, logw, byte, cut)
    lost = full(n_lanes, -np.inf)
    kept_ctx, kept_node, kept_logu, kept_logw, log_z = prune_lanes(
        ctx, moved, logu, weight, after, k, log_threshold, random, lost
    )
    out, left, missing = grow(
        trie, rows, tree, kept_ctx, kept_node, kept_logu, kept_logw, after, log_z, cut,
        log_threshold, random,
    )  # fmt: skip
    for n in range(n_lanes):
        numbers[0, n], numbers[1, n], numbers[2, n] = log_z[n], lost[n], left[n]
        if symbols[n] == 256:
            numbers[0, n] = _ending(rows, ctx[n], node[n], logu[n], logw[n], cut)
    if len(missing) == 0 or missing[0] != NO_ROOM:
        missing = full(0, 0)
    return pack(kept_ctx, kept_node, kept_logu, kept_logw), out, after, numbers, missing


@inner()
def _set_aside(trie, rows, context, out, rescue, share, cut):
    """One lane's `reserve`, its shares by the root of the best candidate's row.

    out float64[257], probabilities (changed); rescue bool[256].
    """
    slot = rows.slot_of[context]
    sum_root(rows, slot)
    mass = full(256, 1e-9)  # none of them reads as impossible
    add_children(trie, rows, slot, ROOT, 1.0, cut, mass)
    total = 0.0
    for b in range(256):
        mass[b] = mass[b] if rescue[b] and out[b] == 0.0 else 0.0
        total += mass[b]
    if total > 0.0:
        for b in range(257):
            out[b] *= 1.0 - share
        for b in range(256):
            out[b] += share * mass[b] / total


@inner()
def _rescued(node, logw, rescue_of, rescues, out):
    """Union of what healing could read from a lane's nodes; False if some is not known."""
    out[:] = False
    for c in range(len(node)):
        if logw[c] > -np.inf and node[c] > 0:
            at = rescue_of[node[c]]
            if at < 0:
                return False
            for b in range(256):
                out[b] |= rescues[at, b]
    return True


@inner(inline="always")
def _rows(
    trie, rows, ctx, node, logw, extended, log_z, lossy, cut, random, rescue_of, rescues, share
):
    """Return next-byte rows float64[N, 257] of lanes whose candidates extend to `extended`.

    `lossy` bool[N] marks lanes of which `share` is set aside for healing; `rescue_of`
    int32[M] gives the line of `rescues` bool[R, 256] for a trie node, or -1. The second item
    tells whether every node needed had its line (rows of lanes where not lack their share).
    """
    ectx, enode, elogu, elogw = unpack(extended)
    known = True
    rescue = full(256, False)
    block = full((len(lossy), 257), 0.0)
    alone = len(lossy) == 1
    for n in range(len(lossy)):
        out = block[n]
        top = add_masses(trie, rows, ectx[n], enode[n], elogu[n], elogw[n], cut, alone, out)
        if random:
            for b in range(257):
                out[b] = top + np.log(out[b]) - log_z[n] if out[b] > 0.0 else -np.inf
            continue
        total = 0.0
        for b in range(257):
            total += out[b]
        if total > 0.0:
            for b in range(257):
                out[b] /= total
        if lossy[n] and logw.shape[1] and logw[n, 0] > -np.inf:
            if _rescued(node[n], logw[n], rescue_of, rescues, rescue):
                _set_aside(trie, rows, ctx[n, 0], out, rescue, share, cut)
            else:
                known = False
        for b in range(257):
            out[b] = np.log(out[b]) if out[b] > 0.0 else -np.inf
    return block, known


@entry()
def look(
    handles, probs, packed, key, log_z, log_dropped, looked, extended, left_out, cut,
    log_threshold, random, rescue_of, rescues, share, wanted,
):  # fmt: skip
    """Extend the candidates, unless they are `looked` at already, and find their rows.

    Args:
        handles, probs: `Handles`, and the rows.
        packed, key, log_z, log_dropped: the lanes. One is lossy if anything was ever dropped;
            with share 0 none is.
        looked: whether `extended` and `left_out` float64[N] are what a step has found.
        extended, left_out: candidates with their extensions; log mass of those left out.
        cut, log_threshold, random: see `Rules`.
        rescue_of, rescues, share: see `_rows`.
        wanted: whether rows are asked for.

    Returns:
        The extended candidates, packed; the log mass left out [N]; contexts without rows, or
        [NO_ROOM]; the rows; whether all is done.
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = unpack(packed)
    if looked:
        extended_ctx, _, _, extended_logw = unpack(extended)
        missing = lacking(rows, extended_ctx, extended_logw)
    else:
        extended, left_out, missing = extend_all(
            trie, rows, tree, ctx, node, logu, logw, key, log_z, cut, log_threshold, random
        )
    if len(missing) or not wanted:
        return extended, left_out, missing, full((0, 257), 0.0), len(missing) == 0
    lossy = full(len(log_z), False)
    if share > 0.0:
        for n in range(len(log_z)):
            lossy[n] = max(log_dropped[n], left_out[n]) > -np.inf
    out, done = _rows(
        trie, rows, ctx, node, logw, extended, log_z, lossy, cut, random, rescue_of, rescues, share
    )
    return extended, left_out, missing, out, done
