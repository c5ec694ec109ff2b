"""States of N lanes on the CPU, compiled: pack them, extend them, move them along a byte.

Loops are serial, and everything is float64. A packed state is int64[4, N, C]: ctx, node, and the
bits of the float64 logu and logw (each array costs Python up to a microsecond on its way in or
out of a compiled call).
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

from genlm_bytes_smc.beam.masses_numba import child_mass, child_of_node, sum_range
from genlm_bytes_smc.beam.pruning_numba import (
    Candidates,
    Extensions,
    admit,
    empty,
    logsumexp_rows,
    select_topk,
    take,
    thinned,
)
from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.lm.contexts_numba import NO_ROOM, child_of, place_of

# Not as literals, for which numba compiles what they are passed to once more.
_FIRST = np.int64(0)
_ALL = np.int64(-1)
_WITHIN = np.bool_(True)

_LOG_GUESS = float(np.log(0.03))  # of a byte that an extension is taken to give, at least
_LOG_HEAVY = float(np.log(0.1))  # share of the beam from which on a guessed row is good enough


@intrinsic
def as_floats(typingctx, array):
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
def unpack(packed):
    """Return the `Candidates` of a state: views."""
    weights = as_floats(packed)
    return Candidates(packed[0], packed[1], weights[2], weights[3])


@inner()
def pack(some):
    """Return candidates as int64[4, N, C]."""
    n_lanes, n_cands = some.ctx.shape
    packed = full((4, n_lanes, n_cands), 0)
    out = unpack(packed)
    for n in range(n_lanes):
        for c in range(n_cands):
            out.ctx[n, c] = some.ctx[n, c]
            out.node[n, c] = some.node[n, c]
            out.logu[n, c] = some.logu[n, c]
            out.logw[n, c] = some.logw[n, c]
    return packed


@inner()
def lacks(slot_of, context):
    """Return whether a context has no row."""
    return context >= len(slot_of) - 1 or slot_of[context] < 0


@inner()
def lacking(rows, some):
    """Contexts of candidates whose rows are missing (evicted since), int64[m]."""
    count = 0
    out = full(some.ctx.size, 0)
    for n in range(some.ctx.shape[0]):
        for c in range(some.ctx.shape[1]):
            if some.logw[n, c] > -np.inf and lacks(rows.slot_of, some.ctx[n, c]):
                out[count] = some.ctx[n, c]
                count += 1
    return out[:count]


@inner()
def followed(tree, rows, some, ext):
    """Return extensions with the contexts after them as `token`, made if they are new.

    The second item is the contexts that lack a row, int64[m]; or [NO_ROOM] if the tree is full.
    """
    contexts, missing = full(len(ext.lane), 0), full(len(ext.lane), 0)
    count = 0
    for e in range(len(ext.lane)):
        contexts[e] = child_of(tree, some.ctx[ext.lane[e], ext.cand[e]], ext.token[e])
        if contexts[e] == NO_ROOM:
            missing[0], count = NO_ROOM, 1
            break
        if lacks(rows.slot_of, contexts[e]):
            missing[count] = contexts[e]
            count += 1
    return Extensions(ext.lane, ext.cand, contexts, ext.logw), missing[:count]


# -- candidates and extensions ------------------------------------------------------------


@entry()
def extensions(trie, rows, some, cut):
    """Return every token that ends at a candidate's node, as `Extensions`."""
    count = 0
    n_lanes, n_cands = some.logw.shape
    for n in range(n_lanes):
        for c in range(n_cands):
            if some.logw[n, c] > -np.inf:
                count += trie.ends[some.node[n, c]]
    lane = full(count, 0)
    cand = full(count, 0)
    token = full(count, 0)
    out = full(count, 0.0)
    e = 0
    for n in range(n_lanes):
        for c in range(n_cands):
            if some.logw[n, c] == -np.inf:
                continue
            first = trie.lo[some.node[n, c]]
            last = first + trie.ends[some.node[n, c]]
            if first == last:
                continue
            slot = rows.slot_of[some.ctx[n, c]]
            row, scale = rows.probs[slot], rows.scale[slot]
            for pos in range(first, last):
                p = row[rows.order[pos]] * scale
                kept = p > 0.0
                for x in cut:
                    if x == pos:
                        kept = False
                if kept:
                    lane[e], cand[e], token[e] = n, c, rows.order[pos]
                    out[e] = some.logu[n, c] + np.log(p)
                    e += 1
    return Extensions(lane[:e], cand[:e], token[:e], out[:e])


@entry()
def append_extensions(some, ext):
    """Append extended candidates, at the root, after the others: [N, C + E'].

    `ext.token` are the contexts after the extensions.
    """
    n_lanes, n_cands = some.logw.shape
    count = full(n_lanes, n_cands)
    for n in ext.lane:
        count[n] += 1
    width = n_cands
    for n in range(n_lanes):
        width = max(width, count[n])
        count[n] = n_cands
    out = empty((n_lanes, width))
    for n in range(n_lanes):
        for c in range(n_cands):
            out.ctx[n, c] = some.ctx[n, c]
            out.node[n, c] = some.node[n, c]
            out.logu[n, c] = some.logu[n, c]
            out.logw[n, c] = some.logw[n, c]
    for e in range(len(ext.lane)):
        n = ext.lane[e]
        c = count[n]
        out.ctx[n, c] = ext.token[e]
        out.logu[n, c] = out.logw[n, c] = ext.logw[e]
        count[n] += 1
    return out


@inner()
def _move(trie, rows, some, first, byte, cut, node, logw):
    """`advance` of the candidates from place `first` on, into other arrays or the same."""
    for n in range(some.logw.shape[0]):
        for c in range(first, some.logw.shape[1]):
            child, weight = -1, -np.inf
            if some.logw[n, c] > -np.inf and byte[n] >= 0:
                child = child_of_node(trie, some.node[n, c], byte[n])
            if child >= 0:
                slot = rows.slot_of[some.ctx[n, c]]
                mass = child_mass(trie, rows, slot, some.node[n, c], child, cut)
                if mass > 0.0:
                    weight = some.logu[n, c] + np.log(mass)
            node[n, c] = child if weight > -np.inf else 0
            logw[n, c] = weight


@entry()
def advance(trie, rows, some, byte, cut):
    """Return the candidates after one byte a lane, lost ones at -inf.

    `byte` int64[N]; a byte of -1 leaves its lane empty. Only node and logw are copies.
    """
    node = full(some.node.shape, 0)
    logw = full(some.logw.shape, 0.0)
    _move(trie, rows, some, _FIRST, byte, cut, node, logw)
    return Candidates(some.ctx, node, some.logu, logw)


@entry()
def node_logw(trie, rows, some, cut):
    """Weights of the same candidates when the positions in `cut` are left out: [N, C]."""
    out = full(some.logw.shape, -np.inf)
    for n in range(out.shape[0]):
        for c in range(out.shape[1]):
            if some.logw[n, c] == -np.inf:
                continue
            x = some.node[n, c]
            if x == 0:
                out[n, c] = some.logu[n, c]
                continue
            slot = rows.slot_of[some.ctx[n, c]]
            mass = sum_range(rows.probs[slot], rows.order, trie.lo[x], trie.hi[x], cut)
            mass *= rows.scale[slot]
            if mass > 0.0:
                out[n, c] = some.logu[n, c] + np.log(mass)
    return out


@inner()
def ending(rows, ctx, node, logu, logw, cut):
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


# -- before and after a byte ---------------------------------------------------------------


@inner()
def grow(trie, rows, tree, some, key, log_z, limits):
    """Extend candidates, all of which have rows, by what is admitted before the byte is known.

    Returns:
        The packed state; the log mass left out [N]; new contexts without rows, or [NO_ROOM].
    """
    ext = extensions(trie, rows, some, limits.cut)
    ext, dropped = admit(ext, log_z, key, limits, _WITHIN)
    ext, missing = followed(tree, rows, some, ext)
    if len(ext.lane):
        some = append_extensions(some, ext)
    return pack(some), dropped, missing


@inner()
def _log_add(a, b):
    """log(exp(a) + exp(b)), as numpy's `logaddexp`."""
    top, low = max(a, b), min(a, b)
    return top if low == -np.inf else top + np.log1p(np.exp(low - top))


@inner()
def _mass_after(ext, able, log_z):
    """Return the mass of each lane after a byte, float64[N] nats, if extensions give it the
    probability that the tokens in flight gave it, and at least exp(`_LOG_GUESS`).

    `able` float64[N] is the weight of the candidates that can read the byte, `log_z` that of all.
    """
    out = full(len(able), -np.inf)
    for e in range(len(ext.lane)):
        out[ext.lane[e]] = _log_add(out[ext.lane[e]], ext.logw[e])
    for n in range(len(able)):
        before = np.log(max(np.exp(log_z[n]) - np.exp(out[n]), 0.0))
        seen = able[n] - before if able[n] > -np.inf else -np.inf
        out[n] = _log_add(able[n] - max(seen, _LOG_GUESS), out[n])
    return out


@inner()
def _among(keys, width, some, ext):
    """Return which extensions are among the sorted `keys` int64[s] (see `Held`), bool[E]."""
    out = full(len(ext.lane), False)
    for e in range(len(out)):
        key = some.ctx[ext.lane[e], ext.cand[e]] * width + ext.token[e]
        out[e] = place_of(keys, key) >= 0
    return out


@inner()
def begin_read(trie, rows, tree, some, key, log_z, byte, limits, by_steps, foreseen, sure, width):
    """Move candidates along a known byte, and find the extensions to admit before it.

    Args:
        trie, rows, tree, some, key, log_z, byte: as elsewhere here.
        limits: extensions are held against the threshold as `admit` does, if random or `by_steps`
            against `log_z`, else against the candidates that can read the byte.
        by_steps: whether to admit what `steps_numba.step` admits, which does not know the byte.
        foreseen: whether to thin by the estimated share after the byte (`_mass_after`), and not
            at all what is in `sure`.
        sure: int64[s], extensions (see `Held.keys`); empty: none.
        width: see there.

    Returns:
        The candidates after `byte`; the extensions with their contexts, and those that lack a
        row, as from `followed`; the log mass left out [N].
    """
    moved = advance(trie, rows, some, byte, limits.cut)
    able = logsumexp_rows(moved.logw)
    ext = extensions(trie, rows, some, limits.cut)
    if foreseen and limits.log_threshold > -np.inf:
        base = _mass_after(ext, able, log_z)
        certain = _among(sure, width, some, ext)
        ext = thinned(certain, ext, base, key, limits.log_threshold)
        left = full(len(base), -np.inf)
    else:
        base = log_z if limits.random or by_steps else able
        ext, left = admit(ext, base, key, limits, by_steps)
    ext, missing = followed(tree, rows, some, ext)
    return moved, ext, missing, left


@inner(inline="always")
def end_read(trie, rows, moved, ext, byte, cut):
    """Read `byte` in extensions too, beside candidates that have `moved` along it.

    Returns (candidates, best first; log_z float64[N]).
    """
    some = moved
    if len(ext.lane):
        some = append_extensions(moved, ext)
        _move(trie, rows, some, moved.logw.shape[1], byte, cut, some.node, some.logw)
    pick, weight, most, _ = select_topk(some.logw, _ALL, -np.inf)
    some = take(some, pick, weight, most)
    return some, logsumexp_rows(some.logw)


@inner()
def lend(slot_of, known, at, some, ext, log_z, reach, guessed):
    """Point extensions without a row at a substitute row; see `steps_numba.run_texts`.

    Args:
        slot_of: of the rows; written to.
        known: int64[N, L + 1], see `known_text.Texts`; the heaviest context with a row is noted.
        at: bytes read by every lane.
        some, ext: candidates, and E extensions with their contexts.
        log_z: float64[N], weight of each lane, nats.
        reach: bytes to go on after a guess.
        guessed: int64[N], byte of the first guess in each lane; filled in.

    Returns:
        Which extensions go on, bool[E]; the m contexts that lacked a row, and `at` for each, or -1
        if it is too far after a guess to be worth a row: int64[2, m].
    """
    best = full(len(known), -np.inf)
    for e in range(len(ext.lane)):
        n = ext.lane[e]
        if not lacks(slot_of, ext.token[e]) and ext.logw[e] > best[n]:
            best[n] = ext.logw[e]
            known[n, at] = ext.token[e]
    goes = full(len(ext.lane), True)
    missed = full((2, len(ext.lane)), 0)
    count = 0
    for e in range(len(ext.lane)):
        n = ext.lane[e]
        if lacks(slot_of, ext.token[e]):
            missed[0, count] = ext.token[e]
            missed[1, count] = at if at <= guessed[n] + reach else -1
            count += 1
    for e in range(len(ext.lane)):
        n, context = ext.lane[e], ext.token[e]
        if lacks(slot_of, context):
            same = known[n, at]
            if same >= 0 and not lacks(slot_of, same):
                slot_of[context] = slot_of[same]
            elif ext.logw[e] > _LOG_HEAVY + log_z[n]:
                slot_of[context] = slot_of[some.ctx[n, ext.cand[e]]]
                guessed[n] = min(guessed[n], at)
            else:
                goes[e] = False
    return goes, missed[:, :count]
