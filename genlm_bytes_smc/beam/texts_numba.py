"""Bytes that are known, or the likeliest ones, read with the rows at hand: compiled, N lanes.

Where a row is missing, the row of another context that spells the same bytes takes its place: what
comes next hardly depends on how they were cut into tokens. So this dry run goes on nearly as the
beam will, and what it notes can be fetched in one forward. What it did with rows that stood in
counts for nothing. Where nothing spells the same bytes and has its row, a candidate that holds
little is left out, and for another one the row before its last token stands in, a guess that is
trusted for some bytes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.candidates_numba import (
    begin_read,
    children,
    end_read,
    extend_all,
    lacks,
    pack,
    unpack,
)
from genlm_bytes_smc.beam.masses_numba import add_masses, opened
from genlm_bytes_smc.beam.pruning_numba import add_logs, kept_of, keys_after, prune_lanes
from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.lm.contexts_numba import NO_ROOM

GUESS = 0.03  # probability of a byte that an extension is taken to give, at least
HEAVY = 0.1  # share of the beam from which on a candidate goes on with a row that is but a guess


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
def lend(slot_of, known, at, ctx, lane, cand, new, ext, log_z, reach, guessed):
    """Point extensions without a row at a substitute row.

    Args:
        slot_of: of the rows; written to.
        known: int64[N, L + 1], see `kernels.Texts`; the heaviest context that has its row is noted.
        at: bytes read by every lane.
        ctx: int64[N, C], contexts of the candidates.
        lane, cand, new, ext: of E extensions; `new` are their contexts.
        log_z: float64[N], weight of each lane, nats.
        reach: bytes to go on after a guess.
        guessed: int64[N], byte of the first guess in each lane; filled in.

    Returns:
        Which extensions go on, bool[E]; the m contexts that lacked a row, and `at` for each, or -1
        if it is too far after a guess to be worth a row: int64[2, m].
    """
    best = full(len(known), -np.inf)
    count = 0
    for e in range(len(new)):
        n = lane[e]
        if lacks(slot_of, new[e]):
            count += 1
        elif ext[e] > best[n]:
            best[n] = ext[e]
            known[n, at] = new[e]
    goes = full(len(new), True)
    missed = full((2, count), 0)
    count = 0
    for e in range(len(new)):
        n = lane[e]
        if lacks(slot_of, new[e]):
            missed[0, count] = new[e]
            missed[1, count] = at if at <= guessed[n] + reach else -1
            count += 1
    for e in range(len(new)):
        n = lane[e]
        if lacks(slot_of, new[e]):
            same = known[n, at]
            if same >= 0 and not lacks(slot_of, same):
                slot_of[new[e]] = slot_of[same]
            elif ext[e] > np.log(HEAVY) + log_z[n]:
                slot_of[new[e]] = slot_of[ctx[n, cand[e]]]
                guessed[n] = min(guessed[n], at)
            else:
                goes[e] = False
    return goes, missed


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
def _likeliest(trie, rows, tree, ctx, node, logu, logw, key, log_z, cut, log_threshold, random):
    """Return the likeliest symbol after one lane's candidates; contexts without rows."""
    ext, _, missing = extend_all(
        trie, rows, tree, ctx, node, logu, logw, key, log_z, cut, log_threshold, random
    )
    if len(missing):
        return -1, missing
    ectx, enode, elogu, elogw = unpack(ext)
    mass = full(257, 0.0)
    add_masses(trie, rows, ectx[0], enode[0], elogu[0], elogw[0], cut, True, mass)
    return np.argmax(mass), missing


@entry()
def run_texts(
    handles, probs, packed, key, log_z, log_dropped, text, lengths, start, known, cut, k,
    log_threshold, random, by_steps, likeliest, sure, width, guess, horizon, reach,
):  # fmt: skip
    """Read bytes with the rows at hand, and note those rows that are missing further on.

    Args:
        handles, probs: `Handles`, and the rows.
        packed, key, log_z, log_dropped: the lanes.
        text, lengths, known: see `kernels.Texts`.
        start: how many bytes have been read.
        cut, k, log_threshold, random: see `Rules`.
        by_steps: whether to extend and prune as `steps_numba.step` (after each byte, without
            knowing it when extending), or as `read` (before each, and not after the last).
        likeliest: with one lane, whether to read the likeliest bytes and fill them in. That stops
            before a byte for which a row is missing, before the end of the text, and before a
            byte that only healing can read: what healing adds to a row is never the likeliest.
        sure, width, guess: see `begin_read`.
        horizon: bytes to go on after the first missing row.
        reach: bytes to go on after the first guess.

    Returns:
        The packed state before the first byte for which a row was missing (or that nothing
        could read); its keys; float64[2, N]: log_z, log mass dropped; how many bytes were read
        in all; whether the text ends next (`likeliest`); the byte at which each context was missed
        (see `lend`), int64[m], and the contexts missed, int64[m], or [NO_ROOM].
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = unpack(packed)
    n_lanes = len(lengths)
    kept, kept_key = packed, key
    numbers = full((2, n_lanes), 0.0)
    dropped, total = log_dropped.copy(), log_z.copy()
    for n in range(n_lanes):
        numbers[0, n], numbers[1, n] = total[n], dropped[n]
    missed = full((2, 64), 0)
    count, done = 0, start
    guessed = full(n_lanes, text.shape[1])
    no_room, ends = False, False
    foreseen = random and not by_steps and not likeliest
    byte, missing = full(n_lanes, 0), full(0, 0)
    for at in range(start, text.shape[1]):
        if count and _too_far(at, done, guessed, horizon, reach):
            break
        if not by_steps:
            ctx, node, logu, logw, pruned = prune_lanes(
                ctx, node, logu, logw, key, k, log_threshold, random, dropped
            )
            total = total if likeliest and random else pruned
        if likeliest:
            symbol, missing = _likeliest(
                trie, rows, tree, ctx, node, logu, logw, key, total, cut, log_threshold, random
            )
            ends = symbol == 256
            if len(missing) or ends:
                break
            text[0, at] = symbol
        for n in range(n_lanes):
            byte[n] = text[n, at] if at < lengths[n] else -1
        moved, able, lane, cand, token, ext, left = begin_read(
            trie, rows, ctx, node, logu, logw, key, total, byte, cut, log_threshold, random,
            by_steps, foreseen, sure, width, guess,
        )  # fmt: skip
        for n in range(n_lanes):
            dropped[n] = add_logs(dropped[n], left[n])
        new, missing = children(tree, rows, ctx, lane, cand, token)
        no_room = len(missing) > 0 and missing[0] == NO_ROOM
        if no_room or (likeliest and len(missing)):
            break
        goes, lacked = lend(
            rows.slot_of, known, at, ctx, lane, cand, new, ext, total, reach, guessed
        )
        if lacked.shape[1]:
            while count + lacked.shape[1] > missed.shape[1]:
                missed = _grown(missed)
            for e in range(lacked.shape[1]):
                missed[0, count], missed[1, count] = lacked[0, e], lacked[1, e]
                count += 1
            lane, _, new, ext = kept_of(goes, lane, cand, new, ext)
        ctx, node, logu, logw, total = end_read(
            trie, rows, ctx, moved, logu, able, lane, new, ext, byte, cut
        )
        key = keys_after(key, byte) if random else key
        if by_steps:
            ctx, node, logu, logw, total = prune_lanes(
                ctx, node, logu, logw, key, k, log_threshold, random, dropped
            )
        if _none_left(total):
            break
        if count == 0:
            done = at + 1
            kept, kept_key = pack(ctx, node, logu, logw), key
            for n in range(n_lanes):
                numbers[0, n], numbers[1, n] = total[n], dropped[n]
    for i in range(count):
        rows.slot_of[missed[0, i]] = -1  # nothing stands in for it any more
    if no_room or likeliest:
        return kept, kept_key, numbers, done, ends, missed[1, :0], missing
    return kept, kept_key, numbers, done, ends, missed[1, :count], missed[0, :count]
