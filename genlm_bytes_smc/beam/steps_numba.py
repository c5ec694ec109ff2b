"""Whole steps of N lanes, compiled: no return to Python until a row is missing.

What a step returns last is what kept it from being done: contexts that lack rows; [NO_ROOM] if the
tree of contexts is full; or [UNKNOWN] if bytes that healing could read are to be looked up. It
then had no effect but that those contexts exist, and is called again when that is mended.

States go in and out as one array (see `unpack`), and the arrays of trie, rows and tree come in as
`Handles` and the rows. `cut, k, log_threshold, random` are those of `model.Rules`; with
`random` (`prune="unbiased"`) draws are functions of the lanes' keys uint64[N].
"""

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.candidates_numba import (
    advance,
    begin_read,
    end_read,
    ending,
    grow,
    lacking,
    lend,
    pack,
    unpack,
)
from genlm_bytes_smc.beam.masses_numba import ROOT, add_children, add_masses, opened, sum_root
from genlm_bytes_smc.beam.pruning_numba import (
    Limits,
    add_logs,
    kept_of,
    keys_after,
    prune_lanes,
)
from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.lm.contexts_numba import NO_ROOM

UNKNOWN = -3

_NO, _NOWHERE = np.bool_(False), np.int64(0)  # not as literals, see `candidates_numba`


@entry()
def prune(packed, key, log_dropped, k, log_threshold, random):
    """Prune: (packed state, float64[2, N]: log_z, and all that was dropped so far)."""
    limits = Limits(full(0, 0), k, log_threshold, random)
    numbers = full((2, len(key)), 0.0)
    for n in range(len(key)):  # array assignments take seconds to compile, for their error
        numbers[1, n] = log_dropped[n]
    some, log_z = prune_lanes(unpack(packed), key, limits, numbers[1])
    for n in range(len(key)):
        numbers[0, n] = log_z[n]
    return pack(some), numbers


@entry()
def read(
    handles, probs, packed, key, log_z, log_dropped, byte, prunes, cut, k, log_threshold, random
):
    """Prune if told so, and read a known byte a lane (-1 empties it).

    With top-K pruning the threshold on extensions is taken against the candidates that can read
    the byte. Returns (packed state; keys; float64[2, N]: log_z, and all that was dropped so far;
    what is missing).
    """
    trie, rows, tree = opened(handles, probs)
    limits = Limits(cut, k, log_threshold, random)
    some, dropped = unpack(packed), log_dropped.copy()
    if prunes:
        some, _ = prune_lanes(some, key, limits, dropped)
    numbers = full((2, len(byte)), -np.inf)
    missing = lacking(rows, some)
    if len(missing):
        return full((4, 0, 0), 0), key, numbers, missing
    moved, ext, missing, left = begin_read(
        trie, rows, tree, some, key, log_z, byte, limits, _NO, _NO, full(0, 0), _NOWHERE
    )
    if len(missing):
        return full((4, 0, 0), 0), key, numbers, missing
    some, total = end_read(trie, rows, moved, ext, byte, cut)
    for n in range(len(byte)):
        numbers[0, n], numbers[1, n] = total[n], add_logs(dropped[n], left[n])
    after = keys_after(key, byte) if random else key
    return pack(some), after, numbers, missing


@entry()
def step(handles, probs, extended, key, symbols, cut, k, log_threshold, random):
    """Read one symbol a lane in extended candidates, prune, and extend what is kept.

    Args:
        handles, probs, cut, k, log_threshold, random: see the module.
        extended, key: the candidates with their extensions, and uint64[N].
        symbols: int64[N], a byte; 256 ends the text, -1 reads nothing: both empty the lane.

    Returns:
        The packed state; its candidates with their extensions, packed, whose rows may be missing;
        the keys; float64[3, N]: log_z (of a text that ends, the weight of the whole text), the
        log mass that pruning dropped and that of the extensions left out; what is missing.
    """
    trie, rows, tree = opened(handles, probs)
    limits, some = Limits(cut, k, log_threshold, random), unpack(extended)
    n_lanes = len(symbols)
    numbers = full((3, n_lanes), -np.inf)
    missing = lacking(rows, some)
    if len(missing):
        return full((4, 0, 0), 0), full((4, 0, 0), 0), key, numbers, missing
    byte = full(n_lanes, -1)
    for n in range(n_lanes):
        if symbols[n] < 256:
            byte[n] = symbols[n]
    after = keys_after(key, symbols) if random else key
    lost = full(n_lanes, -np.inf)
    moved = advance(trie, rows, some, byte, cut)
    kept, log_z = prune_lanes(moved, after, limits, lost)
    out, left, missing = grow(trie, rows, tree, kept, after, log_z, limits)
    for n in range(n_lanes):
        numbers[0, n], numbers[1, n], numbers[2, n] = log_z[n], lost[n], left[n]
        if symbols[n] == 256:
            ctx, node, logu, logw = some.ctx[n], some.node[n], some.logu[n], some.logw[n]
            numbers[0, n] = ending(rows, ctx, node, logu, logw, cut)
    if len(missing) == 0 or missing[0] != NO_ROOM:
        missing = full(0, 0)
    return pack(kept), out, after, numbers, missing


# -- rows ----------------------------------------------------------------------------------


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
def _rows(trie, rows, some, extended, log_z, lossy, cut, random, rescue_of, rescues, share):
    """Return next-byte rows float64[N, 257] of lanes whose candidates extend to `extended`.

    `lossy` bool[N] marks lanes of which `share` is set aside for healing; `rescue_of`
    int32[M] gives the line of `rescues` bool[R, 256] for a trie node, or -1. The second item
    tells whether every node needed had its line (rows of lanes where not lack their share).
    """
    known = True
    rescue = full(256, False)
    block = full((len(lossy), 257), 0.0)
    alone = len(lossy) == 1
    for n in range(len(lossy)):
        out = block[n]
        top = add_masses(
            trie, rows, extended.ctx[n], extended.node[n], extended.logu[n], extended.logw[n], cut,
            alone, out,
        )  # fmt: skip
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
        if lossy[n] and some.logw.shape[1] and some.logw[n, 0] > -np.inf:
            if _rescued(some.node[n], some.logw[n], rescue_of, rescues, rescue):
                _set_aside(trie, rows, some.ctx[n, 0], out, rescue, share, cut)
            else:
                known = False
        for b in range(257):
            out[b] = np.log(out[b]) if out[b] > 0.0 else -np.inf
    return block, known


@entry()
def look(
    handles, probs, packed, key, log_z, log_dropped, looked, extended, left_out, cut, k,
    log_threshold, random, rescue_of, rescues, share, wanted,
):  # fmt: skip
    """Extend the candidates, unless they are `looked` at already, and find their rows.

    Args:
        handles, probs, cut, k, log_threshold, random: see the module.
        packed, key, log_z, log_dropped: the lanes. One is lossy if anything was ever dropped;
            with share 0 none is.
        looked: whether `extended` and `left_out` float64[N] are what a step has found.
        extended, left_out: candidates with their extensions; log mass of those left out.
        rescue_of, rescues, share: see `_rows`.
        wanted: whether rows are asked for.

    Returns:
        The extended candidates, packed; the log mass left out [N]; the rows; what is missing.
    """
    trie, rows, tree = opened(handles, probs)
    some, out = unpack(packed), full((0, 257), 0.0)
    if looked:
        missing = lacking(rows, unpack(extended))
    else:
        missing = lacking(rows, some)
        if len(missing) == 0:
            limits = Limits(cut, k, log_threshold, random)
            extended, left_out, missing = grow(trie, rows, tree, some, key, log_z, limits)
    if len(missing) or not wanted:
        return extended, left_out, out, missing
    lossy = full(len(log_z), False)
    if share > 0.0:
        for n in range(len(log_z)):
            lossy[n] = max(log_dropped[n], left_out[n]) > -np.inf
    out, known = _rows(
        trie, rows, some, unpack(extended), log_z, lossy, cut, random, rescue_of, rescues, share
    )
    return extended, left_out, out, missing if known else full(1, UNKNOWN)


# -- texts ---------------------------------------------------------------------------------


@inner()
def _joined(a, b):
    """Return two arrays int64[2, m] beside each other."""
    out = full((2, a.shape[1] + b.shape[1]), 0)
    for i in range(2):
        for j in range(a.shape[1]):
            out[i, j] = a[i, j]
        for j in range(b.shape[1]):
            out[i, a.shape[1] + j] = b[i, j]
    return out


@inner()
def _none_left(log_z):
    """Return whether every lane is dead."""
    alive = False
    for n in range(len(log_z)):
        alive |= log_z[n] > -np.inf
    return not alive


@inner()
def _too_far(at, first, guessed, horizon, reach):
    """Return whether byte `at` is too far on to be foreseen, after a row missing at `first`."""
    everywhere = True
    for n in range(len(guessed)):
        everywhere &= at > guessed[n] + reach
    return at > first + horizon or everywhere


@inner(inline="always")
def _likeliest(trie, rows, tree, some, key, log_z, limits):
    """Return the likeliest symbol after one lane's candidates, and what is missing."""
    missing = lacking(rows, some)
    if len(missing):
        return -1, missing
    packed, _, missing = grow(trie, rows, tree, some, key, log_z, limits)
    if len(missing):
        return -1, missing
    ext, mass = unpack(packed), full(257, 0.0)
    ctx, node, logu, logw = ext.ctx[0], ext.node[0], ext.logu[0], ext.logw[0]
    add_masses(trie, rows, ctx, node, logu, logw, limits.cut, True, mass)
    return np.argmax(mass), missing


@entry()
def run_texts(
    handles, probs, packed, key, log_z, log_dropped, text, lengths, start, known, cut, k,
    log_threshold, random, by_steps, likeliest, sure, width, horizon, reach,
):  # fmt: skip
    """Read bytes with the rows at hand, and note those rows that are missing further on.

    Where a row is missing, the row of another context that spells the same bytes takes its place:
    what comes next hardly depends on how they were cut into tokens. So this dry run goes on nearly
    as the beam will, and what it notes can be fetched in one forward. What it did with rows that
    stood in counts for nothing. Where nothing spells the same bytes and has its row, a candidate
    that holds little is left out, and for another one the row before its last token stands in, a
    guess that is trusted for some bytes.

    Args:
        handles, probs, cut, k, log_threshold, random: see the module.
        packed, key, log_z, log_dropped: the lanes, whose rows are all there.
        text, lengths, known: see `known_text.Texts`.
        start: how many bytes have been read.
        by_steps: whether to extend and prune as `step` (after each byte, without
            knowing it when extending), or as `read` (before each, and not after the last).
        likeliest: with one lane, whether to read the likeliest bytes and fill them in. That stops
            before a byte for which a row is missing, before the end of the text, and before a
            byte that only healing can read: what healing adds to a row is never the likeliest.
        sure, width: see `begin_read`.
        horizon: bytes to go on after the first missing row.
        reach: bytes to go on after the first guess.

    Returns:
        The packed state before the first byte for which a row was missing (or that nothing
        could read); its keys; float64[2, N]: log_z, log mass dropped; how many bytes were read
        in all; whether the text ends next (`likeliest`); the byte at which each context was missed
        (see `lend`), int64[m]; what is missing, among it the contexts missed, int64[m].
    """
    trie, rows, tree = opened(handles, probs)
    limits, some = Limits(cut, k, log_threshold, random), unpack(packed)
    n_lanes = len(lengths)
    kept, kept_key = packed, key
    numbers = full((2, n_lanes), 0.0)
    dropped, total = log_dropped.copy(), log_z.copy()
    for n in range(n_lanes):
        numbers[0, n], numbers[1, n] = total[n], dropped[n]
    missed, done = full((2, 0), 0), start
    guessed = full(n_lanes, text.shape[1])
    no_room, ends = False, False
    foreseen = random and not by_steps and not likeliest
    byte, missing = full(n_lanes, 0), full(0, 0)
    for at in range(start, text.shape[1]):
        if missed.shape[1] and _too_far(at, done, guessed, horizon, reach):
            break
        if not by_steps:
            some, pruned = prune_lanes(some, key, limits, dropped)
            total = total if likeliest and random else pruned
        if likeliest:
            symbol, missing = _likeliest(trie, rows, tree, some, key, total, limits)
            ends = symbol == 256
            if len(missing) or ends:
                break
            text[0, at] = symbol
        for n in range(n_lanes):
            byte[n] = text[n, at] if at < lengths[n] else -1
        moved, ext, missing, left = begin_read(
            trie, rows, tree, some, key, total, byte, limits, by_steps, foreseen, sure, width
        )
        for n in range(n_lanes):
            dropped[n] = add_logs(dropped[n], left[n])
        no_room = len(missing) > 0 and missing[0] == NO_ROOM
        if no_room or (likeliest and len(missing)):
            break
        goes, lacked = lend(rows.slot_of, known, at, some, ext, total, reach, guessed)
        if lacked.shape[1]:
            missed = _joined(missed, lacked)
            ext = kept_of(goes, ext)
        some, total = end_read(trie, rows, moved, ext, byte, cut)
        key = keys_after(key, byte) if random else key
        if by_steps:
            some, total = prune_lanes(some, key, limits, dropped)
        if _none_left(total):
            break
        if missed.shape[1] == 0:
            done = at + 1
            kept, kept_key = pack(some), key
            for n in range(n_lanes):
                numbers[0, n], numbers[1, n] = total[n], dropped[n]
    for context in missed[0]:
        rows.slot_of[context] = -1  # nothing stands in for it any more
    if no_room or likeliest:
        missed = full((2, 0), 0)
    else:
        missing = missed[0]
    return kept, kept_key, numbers, done, ends, missed[1], missing
