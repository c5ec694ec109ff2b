"""Which rows the next requests of lanes with deferred pruning will most likely ask for, compiled.

Nothing that a lane computes depends on it: rows that are foreseen are only there earlier.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from genlm_bytes_smc.beam.deferred_numba import (
    ABOVE,
    CTX,
    NODE,
    NOT_NOW,
    OWN,
    PARENT,
    POS,
    TEXT,
    TOKEN,
    WINDOW,
    P,
    by_position,
    outlook,
)
from genlm_bytes_smc.beam.masses_numba import child_of_node, opened, touches
from genlm_bytes_smc.compiled import entry, full, inner

FEW = 0.001  # share of a position's weight from which on a node is listed with the position's first
MAIN = 0.1  # share of it from which on the token that spells all further bytes is listed too


@inner()
def _list(out, least_p, found, node, token, p):
    """Put a deferred node, and a token after it or -1, into the lists; return their new length."""
    if found < len(out):
        out[found, 0], out[found, 1], out[found, 2] = node[ABOVE], node[TOKEN], token
        least_p[found] = p
    return found + 1


@inner()
def _token_of(trie, order, cut, text, first, end):
    """Return a token that spells the bytes `first` to `end` of a text; -1 if none does."""
    node = 0
    for q in range(first, end):
        node = child_of_node(trie, node, text[q % TEXT])
        if node < 0:
            return -1
    j = trie.lo[node]
    if trie.ends[node] == 0 or touches(j, j + 1, cut):
        return -1
    return order[j]


@entry()
def foresee(
    handles, probs, cut, ints, floats, count, length, text, masses, share, merge, least, guess,
    at_end, out, least_p,
):  # fmt: skip
    """List the rows that further turns, and the proposals after them, may ask for.

    Args:
        handles, probs: of the rows, see `Handles`.
        cut: int64[c], trie positions that are no text, sorted.
        ints, floats, count, length, text: see `deferred_numba`, after `judge_lane`.
        masses: float64[N], from `judge_lane`.
        share, merge, guess, at_end: see `judge_lane`.
        least: float64[N], share from which on a node that ends with the text is listed.
        out: int64[m, 3], room for the contexts: the context that each extends, by which token,
            and by which further one (-1: by none).
        least_p: float64[m], room for the probability that the further token must have, in case
            its row is there.

    Returns:
        The number of contexts; if it is over m, only m are listed.
    """
    trie, rows, _ = opened(handles, probs)
    found = 0
    room = ints.shape[1]
    order, begin = full(room, 0), full(WINDOW + 3, 0)
    inner_of, at = full(room, 0.0), full((WINDOW + 2, 3), 0.0)
    for i in range(len(count)):
        n, now = count[i], length[i]
        oldest = now - WINDOW - 1
        by_position(ints[i], n, oldest, begin, order)
        estimate, _ = outlook(ints[i], floats[i], order, begin, now, guess, masses[i], inner_of, at)
        for w in range(len(begin) - 1):
            position, live, deferred, ahead = oldest + w, at[w, 0], at[w, 1], at[w, 2]
            limit = merge[i] * estimate
            if position == now:
                limit = least[i] * estimate
            elif at_end:
                continue
            elif live == 0.0:
                if deferred * ahead <= share[i] * estimate:
                    continue
                limit = FEW * deferred * ahead
            proxy = -1
            for x in range(begin[w], begin[w + 1]):
                c = order[x]
                if ints[i, c, CTX] >= 0 and (
                    proxy < 0 or floats[i, c, OWN] > floats[i, proxy, OWN]
                ):
                    proxy = c
            for x in range(begin[w], begin[w + 1]):
                c = order[x]
                if ints[i, c, CTX] >= 0 or ints[i, c, NODE] == NOT_NOW:
                    continue
                own = floats[i, c, OWN]
                if own * ahead <= limit:
                    continue
                found = _list(out, least_p, found, ints[i, c], -1, 0.0)
                if position == now:
                    continue
                # What extends it will be known with its row. Until then, its neighbour's tells.
                for d in range(n if proxy >= 0 else 0):
                    if ints[i, d, PARENT] != proxy:
                        continue
                    e = ints[i, d, POS]
                    ends = least[i] if e == now else merge[i]
                    p = ends * estimate / (own * at[e - oldest, 2])
                    if floats[i, d, P] > p:
                        found = _list(out, least_p, found, ints[i, c], ints[i, d, TOKEN], p)
                if proxy < 0 and own > MAIN * deferred:
                    token = _token_of(trie, rows.order, cut, text[i], position, now)
                    if token >= 0:
                        p = least[i] * estimate / own
                        found = _list(out, least_p, found, ints[i, c], token, p)
    return found
