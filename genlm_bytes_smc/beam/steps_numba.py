"""Whole steps of top-K beams, compiled: no return to Python until a row is missing.

What `ByteLanes` and `prefill` do with the verbs of `kernels_numba` and `masses_numba`,
including the context tree (`context_index`). A step whose rows are not all there returns the
contexts that lack one and has no effect but that those contexts exist; it is called again with
the rows there.

States go out packed, int64[4, N, C]: ctx, node, and the bits of the float64 logu and logw
and come in so (each array costs Python up to a microsecond on its way in or out). The arrays
of trie, rows and tree come in as `Handles`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

from genlm_bytes_smc.beam.handles import opened
from genlm_bytes_smc.beam.kernels_numba import (
    advance,
    append_extensions,
    begin_read,
    end_read,
    extensions,
    keep_extensions,
    kept_of,
    logsumexp_rows,
    select_topk,
    take,
)
from genlm_bytes_smc.beam.masses_numba import ROOT, add_children, add_masses, sum_root
from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.lm.context_index import NO_ROOM, child_of

_NONE = np.empty(0, np.int64)


@intrinsic
def _as_floats(typingctx, array):
    """View int64 as float64; numba's own `array.view` takes seconds to compile."""

    def code(context, builder, signature, args):
        given = context.make_array(signature.args[0])(context, builder, args[0])
        out = context.make_array(signature.return_type)(context, builder)
        for name in ("meminfo", "parent", "nitems", "itemsize", "shape", "strides"):
            setattr(out, name, getattr(given, name))
        out.data = builder.bitcast(given.data, out.data.type)
        return impl_ret_borrowed(context, builder, signature.return_type, out._getvalue())

    return array.copy(dtype=types.float64)(array), code


@inner()
def _pack(ctx, node, logu, logw):
    n_lanes, n_cands = ctx.shape
    out = full((4, n_lanes, n_cands), 0)
    weights = _as_floats(out)
    for n in range(n_lanes):
        for c in range(n_cands):
            out[0, n, c] = ctx[n, c]
            out[1, n, c] = node[n, c]
            weights[2, n, c] = logu[n, c]
            weights[3, n, c] = logw[n, c]
    return out


@inner()
def _add_logs(a, b):
    top = max(a, b)
    if top == -np.inf:
        return top
    return top + np.log(np.exp(a - top) + np.exp(b - top))


@inner()
def _nothing():
    return full((4, 0, 0), 0)


@inner()
def _lacks(rows, context):
    return context >= len(rows.slot_of) - 1 or rows.slot_of[context] < 0


@inner()
def _lacking(rows, ctx, logw):
    """Contexts of candidates whose rows are missing (evicted since), int64[m]."""
    count = 0
    for n in range(logw.shape[0]):
        for c in range(logw.shape[1]):
            count += logw[n, c] > -np.inf and _lacks(rows, ctx[n, c])
    out = full(count, 0)
    count = 0
    for n in range(logw.shape[0]):
        for c in range(logw.shape[1]):
            if logw[n, c] > -np.inf and _lacks(rows, ctx[n, c]):
                out[count] = ctx[n, c]
                count += 1
    return out


@inner()
def _children(tree, rows, ctx, lane, cand, token):
    """Contexts of extensions, and those that lack a row; or [NO_ROOM] if the tree is full."""
    contexts = full(len(lane), 0)
    count = 0
    for e in range(len(lane)):
        contexts[e] = child_of(tree, ctx[lane[e], cand[e]], token[e])
        if contexts[e] == NO_ROOM:
            return contexts, full(1, NO_ROOM)
        count += _lacks(rows, contexts[e])
    missing = full(count, 0)
    count = 0
    for context in contexts:
        if _lacks(rows, context):
            missing[count] = context
            count += 1
    return contexts, missing


@inner()
def _unpack(packed):
    weights = _as_floats(packed)
    return packed[0], packed[1], weights[2], weights[3]


@entry()
def prune(packed, log_dropped, k, log_threshold):
    """`select_topk`: (packed state, float64[2, N]: log_z, and all that was dropped so far)."""
    ctx, node, logu, logw = _unpack(packed)
    pick, weight, dropped = select_topk(logw, k, log_threshold)
    ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    numbers = full((2, len(dropped)), 0.0)
    log_z = logsumexp_rows(logw)
    for n in range(len(dropped)):
        numbers[0, n] = log_z[n]
        numbers[1, n] = _add_logs(log_dropped[n], dropped[n])
    return _pack(ctx, node, logu, logw), numbers


@entry()
def read(handles, probs, packed, log_dropped, byte, cut, k, log_prune, log_threshold):
    """Prune (k < 0 and log_prune -inf: do not), and read a known byte a lane.

    Returns (packed state; float64[2, N]: log_z, and all that was dropped so far; missing).
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = _unpack(packed)
    if k >= 0 or log_prune > -np.inf:
        pick, weight, lost = select_topk(logw, k, log_prune)
        ctx, node, logu, logw = take(ctx, node, logu, logw, pick, weight)
    else:
        lost = full(len(byte), -np.inf)
    out, numbers, missing = _read(trie, rows, tree, ctx, node, logu, logw, byte, cut, log_threshold)
    for n in range(len(byte)):
        numbers[1, n] = _add_logs(_add_logs(log_dropped[n], lost[n]), numbers[1, n])
    return out, numbers, missing


@inner(inline="always")
def _read(trie, rows, tree, ctx, node, logu, logw, byte, cut, log_threshold):
    numbers = full((2, len(byte)), -np.inf)
    missing = _lacking(rows, ctx, logw)
    if len(missing):
        return _nothing(), numbers, missing
    ctx, node, logu, logw, _, moved, able, lane, cand, token, ext, dropped = begin_read(
        trie, rows, ctx, node, logu, logw, byte, cut, -1, -np.inf, log_threshold
    )
    new, missing = _children(tree, rows, ctx, lane, cand, token)
    if len(missing):
        return _nothing(), numbers, missing
    ctx, node, logu, logw, log_z = end_read(
        trie, rows, ctx, moved, logu, able, lane, new, ext, byte, cut
    )
    for n in range(len(byte)):  # array assignments take seconds to compile, for their error
        numbers[0, n], numbers[1, n] = log_z[n], dropped[n]
    return _pack(ctx, node, logu, logw), numbers, missing


@entry()
def extend(handles, probs, packed, log_z, cut, log_threshold):
    """Return the candidates and their admitted extensions: (packed state, dropped [N], missing)."""
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = _unpack(packed)
    return _extend(trie, rows, tree, ctx, node, logu, logw, log_z, cut, log_threshold)


@inner(inline="always")
def _extend(trie, rows, tree, ctx, node, logu, logw, log_z, cut, log_threshold):
    missing = _lacking(rows, ctx, logw)
    dropped = full(len(log_z), -np.inf)
    if len(missing):
        return _nothing(), dropped, missing
    out, dropped, missing = _look(
        trie, rows, tree, ctx, node, logu, logw, log_z, cut, log_threshold
    )  # fmt: skip
    if len(missing):
        return _nothing(), dropped, missing
    return out, dropped, missing


@inner()
def _look(trie, rows, tree, ctx, node, logu, logw, log_z, cut, log_threshold):
    """Return the candidates and their admitted extensions, whose own rows may be missing.

    Returns (packed state, log mass dropped [N], contexts without rows or [NO_ROOM]).
    """
    lane, cand, token, ext = extensions(trie, rows, ctx, node, logu, logw, cut)
    keep, dropped = keep_extensions(lane, ext, log_z, log_threshold, True)
    lane, cand, token, ext = kept_of(keep, lane, cand, token, ext)
    new, missing = _children(tree, rows, ctx, lane, cand, token)
    if len(lane):
        ctx, node, logu, logw = append_extensions(ctx, node, logu, logw, lane, new, ext)
    return _pack(ctx, node, logu, logw), dropped, missing


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
def step(handles, probs, extended, symbols, cut, k, log_threshold):
    """Read one symbol a lane in extended candidates, prune, and extend what is kept.

    Args:
        handles, probs: `Handles`, and the rows.
        extended: the candidates with their extensions.
        symbols: int64[N], a byte; 256 ends the text, -1 reads nothing: both empty the lane.
        cut: positions that are no text.
        k, log_threshold: how to prune, and which extensions are admitted.

    Returns:
        The packed state; its candidates with their extensions, packed; float64[3, N]: log_z
        (of a text that ends, the weight of the whole text), the log mass that pruning dropped
        and that of the extensions left out; contexts that kept the step from being done: those
        of `extended` that lack rows, or [NO_ROOM]. Rows of the new extensions may be missing.
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = _unpack(extended)
    n_lanes = len(symbols)
    numbers = full((3, n_lanes), -np.inf)
    missing = _lacking(rows, ctx, logw)
    if len(missing):
        return _nothing(), _nothing(), numbers, missing
    byte = full(n_lanes, -1)
    for n in range(n_lanes):
        if symbols[n] < 256:
            byte[n] = symbols[n]
    moved, weight = advance(trie, rows, ctx, node, logu, logw, byte, cut)
    pick, kept, lost = select_topk(weight, k, log_threshold)
    new_ctx, new_node, new_logu, new_logw = take(ctx, moved, logu, weight, pick, kept)
    log_z = logsumexp_rows(new_logw)
    out, left, missing = _look(
        trie, rows, tree, new_ctx, new_node, new_logu, new_logw, log_z, cut, log_threshold
    )
    for n in range(n_lanes):
        numbers[0, n], numbers[1, n], numbers[2, n] = log_z[n], lost[n], left[n]
        if symbols[n] == 256:
            numbers[0, n] = _ending(rows, ctx[n], node[n], logu[n], logw[n], cut)
    if len(missing) == 0 or missing[0] != NO_ROOM:
        missing = full(0, 0)
    return _pack(new_ctx, new_node, new_logu, new_logw), out, numbers, missing


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


@entry()
def next_rows(handles, probs, packed, extended, lossy, cut, rescue_of, rescues, share):
    """Next-byte rows of lanes whose candidates extend to `extended`.

    `lossy` bool[N] marks lanes of which `share` is set aside for healing; `rescue_of`
    int32[M] gives the line of `rescues` bool[R, 256] for a trie node, or -1. Returns
    float64[N, 257], and whether every node needed had its line (rows of lanes where not
    lack their share).
    """
    trie, rows, _ = opened(handles, probs)
    ctx, node, _, logw = _unpack(packed)
    return _rows(trie, rows, ctx, node, logw, extended, lossy, cut, rescue_of, rescues, share)


@inner(inline="always")
def _rows(trie, rows, ctx, node, logw, extended, lossy, cut, rescue_of, rescues, share):
    ectx, enode, elogu, elogw = _unpack(extended)
    known = True
    rescue = full(256, False)
    block = full((len(lossy), 257), 0.0)
    for n in range(len(lossy)):
        out = block[n]
        alone = len(lossy) == 1
        add_masses(trie, rows, ectx[n], enode[n], elogu[n], elogw[n], cut, alone, out)
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
def extend_rows(
    handles, probs, packed, log_z, log_dropped, cut, log_threshold, rescue_of, rescues, share
):
    """`extend` and `next_rows` in one call.

    A lane is lossy if anything was ever dropped; with share 0 none is. Returns (packed
    state, dropped [N], missing, the rows, whether the rows are complete).
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = _unpack(packed)
    extended, dropped, missing = _extend(
        trie, rows, tree, ctx, node, logu, logw, log_z, cut, log_threshold
    )
    if len(missing):
        return extended, dropped, missing, full((0, 257), 0.0), False
    lossy = full(len(dropped), False)
    if share > 0.0:
        for n in range(len(dropped)):
            lossy[n] = max(log_dropped[n], dropped[n]) > -np.inf
    out, known = _rows(trie, rows, ctx, node, logw, extended, lossy, cut, rescue_of, rescues, share)
    return extended, dropped, missing, out, known


@inner(inline="always")
def _likeliest(trie, rows, tree, ctx, node, logu, logw, cut, log_threshold):
    """Return the likeliest symbol after one lane's candidates; contexts without rows."""
    log_z = logsumexp_rows(logw)
    ext, _, missing = _extend(
        trie, rows, tree, ctx, node, logu, logw, log_z, cut, log_threshold
    )  # fmt: skip
    if len(missing):
        return -1, missing
    ectx, enode, elogu, elogw = _unpack(ext)
    mass = full(257, 0.0)
    add_masses(trie, rows, ectx[0], enode[0], elogu[0], elogw[0], cut, True, mass)
    return np.argmax(mass), missing


@entry()
def follow_likeliest(handles, probs, packed, log_dropped, cut, k, log_threshold, steps):
    """Prune, find the likeliest byte, read it: up to `steps` times, for one lane.

    Stops before a byte for which a row is missing, before the end of the text, and before a
    byte that only healing can read. What healing adds to a row is never the likeliest.

    Returns:
        The packed state after the last byte read, not pruned; float64[2, 1] its log_z and log
        mass dropped; the bytes int64[n]; contexts without rows; whether the text ends next.
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = _unpack(packed)
    read_ = full(steps, 0)
    numbers = full((2, 1), 0.0)
    numbers[0, 0], numbers[1, 0] = logsumexp_rows(logw)[0], log_dropped
    ends = False
    missing = _NONE
    done = 0
    while done < steps:
        missing = _lacking(rows, ctx, logw)
        if len(missing):
            break
        pick, weight, lost = select_topk(logw, k, log_threshold)
        c, x, u, w = take(ctx, node, logu, logw, pick, weight)
        symbol, missing = _likeliest(trie, rows, tree, c, x, u, w, cut, log_threshold)
        if len(missing):
            break
        ends = symbol == 256
        if ends:
            break
        state, out, missing = _read(
            trie, rows, tree, c, x, u, w, full(1, symbol), cut, log_threshold
        )
        if len(missing) or out[0, 0] == -np.inf:
            break
        numbers[0, 0] = out[0, 0]
        numbers[1, 0] = _add_logs(_add_logs(numbers[1, 0], lost[0]), out[1, 0])
        ctx, node, logu, logw = _unpack(state)
        read_[done] = symbol
        done += 1
    return _pack(ctx, node, logu, logw), numbers, read_[:done], missing, ends


@inner()
def _grown(array):
    height, width = array.shape
    out = full((height, 2 * width), 0)
    for i in range(height):
        for j in range(width):
            out[i, j] = array[i, j]
    return out


@inner()
def _heaviest(rows, contexts, ext):
    """Return the heaviest of `contexts` that has a row; -1 if none has."""
    best, out = -np.inf, -1
    for e in range(len(contexts)):
        if ext[e] > best and not _lacks(rows, contexts[e]):
            best, out = ext[e], contexts[e]
    return out


@inner()
def _lend(rows, known, ctx, cand, new, ext, least):
    """Point contexts without a row at a substitute row; return which go on, and if by a guess.

    Args:
        rows: their `slot_of` is written to.
        known: a context that has read the same bytes, or -1.
        ctx, cand: the contexts before their last token are ctx[cand], int64[E].
        new, ext: contexts int64[E], and their weights.
        least: weight, nats, above which they may go on by a guess.
    """
    goes = full(len(new), True)
    guess = False
    same = -1
    if known >= 0 and not _lacks(rows, known):
        same = rows.slot_of[known]
    for e in range(len(new)):
        if _lacks(rows, new[e]):
            if same >= 0:
                rows.slot_of[new[e]] = same
            elif ext[e] > least:
                rows.slot_of[new[e]] = rows.slot_of[ctx[cand[e]]]
                guess = True
            else:
                goes[e] = False
    return goes, guess


@entry()
def run_text(
    handles, probs, packed, log_dropped, text, known, cut, k, log_threshold, horizon, reach, heavy
):
    """Read a known text with the rows at hand, and note those that are missing further on.

    One lane. What stands in for a missing row, and how far such a run goes on, is as in
    `foresight.StandIns`.

    Args:
        handles, probs: `Handles`, and the rows.
        packed: the state.
        log_dropped: log mass dropped before.
        text: uint8[L].
        known: int64[L + 1], for each number of bytes a context that has read so many, or -1;
            filled in.
        cut: positions that are no text.
        k, log_threshold: how to prune.
        horizon: bytes to go on after the first missing row.
        reach: bytes to go on after the first guess.
        heavy: share of the weight from which on a candidate goes on by a guess.

    Returns:
        The packed state before the first byte for which a row was missing (or that nothing
        could read), and float64[2]: its log mass dropped, and how many bytes were read;
        the contexts missed, and the byte at which, int64[2, m].
    """
    trie, rows, tree = opened(handles, probs)
    ctx, node, logu, logw = _unpack(packed)
    kept = packed
    numbers = full(2, 0.0)
    numbers[0] = log_dropped
    missed = full((2, 64), 0)
    count, done, guessed = 0, 0, len(text)
    no_room = False
    byte = full(1, 0)
    for at in range(len(text)):
        if (count and at > done + horizon) or at > guessed + reach:
            break
        byte[0] = text[at]
        ctx, node, logu, logw, lost, moved, able, lane, cand, token, ext, dropped = begin_read(
            trie, rows, ctx, node, logu, logw, byte, cut, k, log_threshold, log_threshold
        )
        log_dropped = _add_logs(_add_logs(log_dropped, lost[0]), dropped[0])
        new, missing = _children(tree, rows, ctx, lane, cand, token)
        no_room = len(missing) > 0 and missing[0] == NO_ROOM
        if no_room:
            break
        heaviest = _heaviest(rows, new, ext)
        if heaviest >= 0:
            known[at] = heaviest
        if len(missing):
            while count + len(missing) > missed.shape[1]:
                missed = _grown(missed)
            for context in missing:
                missed[0, count], missed[1, count] = context, at
                count += 1
            least = np.log(heavy) + logsumexp_rows(logw)[0]
            goes, guess = _lend(rows, known[at], ctx[0], cand, new, ext, least)
            if guess:
                guessed = min(guessed, at)
            lane, _, new, ext = kept_of(goes, lane, cand, new, ext)
        ctx, node, logu, logw, log_z = end_read(
            trie, rows, ctx, moved, logu, able, lane, new, ext, byte, cut
        )
        if log_z[0] == -np.inf:
            break
        if count == 0:
            done = at + 1
            kept = _pack(ctx, node, logu, logw)
            numbers[0] = log_dropped
    for i in range(count):
        rows.slot_of[missed[0, i]] = -1  # nothing stands in for it any more
    numbers[1] = done
    if no_room:
        return kept, numbers, full((2, 1), NO_ROOM)
    return kept, numbers, missed[:, :count]
