"""Texts that are known, read with the rows at hand: compiled, N lanes, one text each."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.candidates_numba import advance, begin_read, end_read, extensions
from genlm_bytes_smc.beam.handles import opened
from genlm_bytes_smc.beam.packing_numba import add_logs, children, lacks, pack, unpack
from genlm_bytes_smc.beam.pruning_numba import (
    admit,
    keep_thinned,
    kept_of,
    keys_after,
    logsumexp_rows,
    mass_after,
    prune_lanes,
)
from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.lm.contexts import NO_ROOM

_ALL = np.int64(-1)
_BESIDE, _WITHIN = np.bool_(False), np.bool_(True)


@inner()
def _grown(array):
    """Return an array int64[a, b] with twice as many columns."""
    height, width = array.shape
    out = full((height, 2 * width), 0)
    for i in range(height):
        for j in range(width):
            out[i, j] = array[i, j]
    return out


@inner()
def _know(rows, known, at, lane, new, ext):
    """Note in `known` int64[N, L + 1] the heaviest of the contexts `new` that has its row."""
    best = full(len(known), -np.inf)
    for e in range(len(new)):
        n = lane[e]
        if ext[e] > best[n] and not lacks(rows, new[e]):
            best[n] = ext[e]
            known[n, at] = new[e]


@inner()
def _lend(rows, known, at, ctx, lane, cand, new, ext, least, guessed):
    """Point contexts without a row at a substitute row; return which go on, bool[E].

    Args:
        rows: their `slot_of` is written to.
        known: int64[N, L + 1], contexts that have read so many bytes, or -1.
        at: how many.
        ctx, lane, cand: the contexts before their last token are ctx[lane, cand], int64[E].
        new, ext: contexts int64[E], and their weights.
        least: float64[N], weight, nats, above which they may go on by a guess.
        guessed: int64[N], byte of the first guess in each lane; filled in.
    """
    goes = full(len(new), True)
    for e in range(len(new)):
        n = lane[e]
        if lacks(rows, new[e]):
            same = known[n, at]
            if same >= 0 and not lacks(rows, same):
                rows.slot_of[new[e]] = rows.slot_of[same]
            elif ext[e] > least[n]:
                rows.slot_of[new[e]] = rows.slot_of[ctx[n, cand[e]]]
                guessed[n] = min(guessed[n], at)
            else:
                goes[e] = False
    return goes


@inner()
def _sure(keys, width, ctx, lane, cand, token):
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


@entry()
def run_texts(
    handles, probs, packed, key, log_z, log_dropped, text, lengths, start, known, cut, k,
    log_threshold, random, by_steps, sure, width, guess, horizon, reach, heavy,
):  # fmt: skip
    """Read known texts with the rows at hand, and note those that are missing further on.

    A row that is missing is replaced as in `foresight`.

    Args:
        handles, probs: `Handles`, and the rows.
        packed, key, log_z, log_dropped: the lanes.
        text: uint8[N, L], a line a lane.
        lengths: int64[N], how long each text is.
        start: how many bytes have been read.
        known: int64[N, L + 1], for each number of bytes a context that has read so many, or -1;
            filled in.
        cut: positions that are no text.
        k, log_threshold, random: how to prune.
        by_steps: whether to extend and prune as `steps_numba.step` (after each byte, without
            knowing it when extending), or as `read` (before each, and not after the last).
        sure: int64[s], extensions that are not thinned (see `Held.keys`); empty: none.
        width: see there.
        guess: with `random`, log probability of a byte that an extension gives at least.
        horizon: bytes to go on after the first missing row.
        reach: bytes to go on after the first guess.
        heavy: share of the weight from which on a candidate goes on by a guess.

    Returns:
        The packed state before the first byte for which a row was missing (or that nothing
        could read); its keys; float64[2, N]: log_z, log mass dropped; how many bytes were read
        in all; the byte at which each context was missed (-1: too far after a guess to be worth a
        row), int64[m], and the contexts missed, int64[m], or [NO_ROOM].
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = unpack(packed)
    n_lanes = len(lengths)
    kept, kept_key = packed, key
    numbers = full((2, n_lanes), 0.0)
    dropped = log_dropped.copy()
    total = log_z.copy()
    for n in range(n_lanes):
        numbers[0, n], numbers[1, n] = total[n], dropped[n]
    missed = full((2, 64), 0)
    count, done = 0, start
    guessed = full(n_lanes, text.shape[1])
    least = full(n_lanes, 0.0)
    no_room = False
    byte = full(n_lanes, 0)
    for at in range(start, text.shape[1]):
        if count and _too_far(at, done, guessed, horizon, reach):
            break
        for n in range(n_lanes):
            byte[n] = text[n, at] if at < lengths[n] else -1
        if not by_steps:
            ctx, node, logu, logw, lost = prune_lanes(
                ctx, node, logu, logw, key, k, log_threshold, random
            )
            total = logsumexp_rows(logw)
            for n in range(n_lanes):
                dropped[n] = add_logs(dropped[n], lost[n])
        moved, able, lane, cand, token, ext, left = _admitted(
            trie, rows, ctx, node, logu, logw, key, total, byte, cut, log_threshold, random,
            by_steps, sure, width, guess,
        )  # fmt: skip
        for n in range(n_lanes):
            dropped[n] = add_logs(dropped[n], left[n])
            least[n] = np.log(heavy) + total[n]
        new, missing = children(tree, rows, ctx, lane, cand, token)
        no_room = len(missing) > 0 and missing[0] == NO_ROOM
        if no_room:
            break
        _know(rows, known, at, lane, new, ext)
        if len(missing):
            while count + len(missing) > missed.shape[1]:
                missed = _grown(missed)
            for e in range(len(new)):
                if lacks(rows, new[e]):
                    missed[0, count] = new[e]
                    missed[1, count] = at if at <= guessed[lane[e]] + reach else -1
                    count += 1
            goes = _lend(rows, known, at, ctx, lane, cand, new, ext, least, guessed)
            lane, _, new, ext = kept_of(goes, lane, cand, new, ext)
        ctx, node, logu, logw, total = end_read(
            trie, rows, ctx, moved, logu, able, lane, new, ext, byte, cut
        )
        key = keys_after(key, byte) if random else key
        if by_steps:
            ctx, node, logu, logw, lost = prune_lanes(
                ctx, node, logu, logw, key, k, log_threshold, random
            )
            total = logsumexp_rows(logw)
            for n in range(n_lanes):
                dropped[n] = add_logs(dropped[n], lost[n])
        if _none_left(total):
            break
        if count == 0:
            done = at + 1
            kept, kept_key = pack(ctx, node, logu, logw), key
            for n in range(n_lanes):
                numbers[0, n], numbers[1, n] = total[n], dropped[n]
    for i in range(count):
        rows.slot_of[missed[0, i]] = -1  # nothing stands in for it any more
    if no_room:
        return kept, kept_key, numbers, done, missed[1, :0], full(1, NO_ROOM)
    return kept, kept_key, numbers, done, missed[1, :count], missed[0, :count]


@inner()
def _admitted(
    trie, rows, ctx, node, logu, logw, key, total, byte, cut, log_threshold, random, by_steps,
    sure, width, guess,
):  # fmt: skip
    """Return what `begin_read` does.

    With `by_steps` the extensions are those that `steps_numba.step` admits. Otherwise, with
    `random`, they are thinned by their estimated share after the byte, those in `sure` excepted.
    """
    if not by_steps and not random:
        return begin_read(
            trie, rows, ctx, node, logu, logw, key, total, byte, cut, log_threshold, random
        )
    moved, able = advance(trie, rows, ctx, node, logu, logw, byte, cut)
    lane, cand, token, ext = extensions(trie, rows, ctx, node, logu, logw, cut)
    if by_steps or log_threshold == -np.inf:
        lane, cand, token, ext, left = admit(
            lane, cand, token, ext, total, key, log_threshold, random, _WITHIN
        )
        return moved, able, lane, cand, token, ext, left
    base = mass_after(lane, ext, logsumexp_rows(able), total, guess)
    certain = _sure(sure, width, ctx, lane, cand, token)
    keep, ext = keep_thinned(certain, lane, ext, base, key, log_threshold)
    lane, cand, token, ext = kept_of(keep, lane, cand, token, ext)
    return moved, able, lane, cand, token, ext, full(len(base), -np.inf)
