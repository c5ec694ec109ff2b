"""Deferred pruning, compiled: contexts of a text by where they end, judged after the byte.

A lane holds *nodes*. A node is a context (a token string that spells the text up to a position)
that may still matter. A *live* node has a row of the model and a token in flight; a *deferred*
node has neither, only its weight. The arrays of N lanes with room for C nodes are

    ints    int64[N, C, 6]     CTX       context id; -1 if it is deferred
                               ABOVE     context id of the node that it extends by one token
                               TOKEN     that token
                               POS       number of bytes that it spells
                               PARENT    place of the node that it extends, -1 once that is gone
                               NODE      trie node of the token in flight (live; -1: none)
    floats  float64[N, C, 4]   P         probability of the last token after its context
                               OWN       weight of its history, over the lane's scale
                               WEIGHT    OWN and the weights of nodes that ride on it (live)
                               FLIGHT    probability that a longer token than the bytes since POS
                                         is in flight
    count   int64[N]           nodes in use

All weights are linear; a lane's scale keeps them near one.
"""

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.masses_numba import child_of_node, opened, touches
from genlm_bytes_smc.compiled import entry, full, inner

CTX, ABOVE, TOKEN, POS, PARENT, NODE = range(6)
P, OWN, WEIGHT, FLIGHT = range(4)
NOT_NOW = -2  # NODE of a deferred node that is not to be chosen, as its row cannot be had now
WINDOW = 32  # bytes after which a deferred node is forgotten
TEXT = 64  # bytes of the text that are kept, more than WINDOW

_FEW = 0.001  # share of a position's weight from which on a node is listed with its first one
_MAIN = 0.1  # share of it from which on the token that spells all further bytes is listed too


@inner()
def workroom(room):
    """Return room for judging a lane of `room` nodes: `order`, `begin`, `inner_of` and `at`.

    See `by_position` and `outlook`.
    """
    return full(room, 0), full(WINDOW + 3, 0), full(room, 0.0), full((WINDOW + 2, 3), 0.0)


@inner()
def by_position(ints, n, oldest, begin, order):
    """Sort n nodes by position: `order` int64[n], and where each position begins in it."""
    for w in range(len(begin)):
        begin[w] = 0
    for c in range(n):
        begin[max(ints[c, POS] - oldest, 0) + 1] += 1
    for w in range(1, len(begin)):
        begin[w] += begin[w - 1]
    for c in range(n - 1, -1, -1):  # leaves begin[w + 1] where position w begins
        w = max(ints[c, POS] - oldest, 0) + 1
        begin[w] -= 1
        order[begin[w]] = c
    for w in range(1, len(begin)):
        begin[w - 1] = begin[w]
    begin[len(begin) - 1] = n


@inner()
def _flow(ints, floats, order, begin, now):
    """Compute OWN and WEIGHT of one lane's nodes; return its mass, in units of its scale."""
    mass = 0.0
    for w in range(len(begin) - 1):
        live = riding = 0.0
        for x in range(begin[w], begin[w + 1]):
            c = order[x]
            if ints[c, PARENT] >= 0:
                floats[c, OWN] = floats[ints[c, PARENT], WEIGHT] * floats[c, P]
            if ints[c, CTX] >= 0:
                live += floats[c, OWN]
            else:
                riding += floats[c, OWN]
        for x in range(begin[w], begin[w + 1]):
            c = order[x]
            alive = ints[c, CTX] >= 0 and live > 0.0
            floats[c, WEIGHT] = floats[c, OWN] * (1.0 + riding / live) if alive else 0.0
            if ints[c, POS] == now:
                mass += floats[c, OWN]
            elif alive:
                mass += floats[c, WEIGHT] * floats[c, FLIGHT]
    return mass


@inner()
def outlook(ints, floats, order, begin, now, guess, mass, inner_of, at):
    """Estimate how likely the bytes from each position on are, from the end of the text backwards.

    Args:
        ints, floats: of one lane, with OWN set.
        order, begin: from `by_position`.
        now: bytes read.
        guess: see `judge`.
        mass: of the lane.
        inner_of: float64[C], room for what follows each node.
        at: float64[W, 3], set for each position of the window to the weight of its live nodes (0
            if none of them gives the bytes since), to that of its deferred ones, and to the
            estimated probability of the bytes from it on.

    Returns:
        The mass with what positions without a row are taken to hold, and the weight of those.
    """
    for c in range(begin[len(begin) - 1]):
        inner_of[c] = 0.0
    estimate, without = mass, 0.0
    for w in range(len(begin) - 2, -1, -1):
        position = now - WINDOW - 1 + w
        live = deferred = 0.0
        for x in range(begin[w], begin[w + 1]):
            c = order[x]
            if ints[c, CTX] >= 0:
                live += floats[c, OWN]
            else:
                deferred += floats[c, OWN]
        if position == now:
            ahead = 1.0
        else:
            ahead = 0.0
            for x in range(begin[w], begin[w + 1] if live > 0.0 else begin[w]):
                c = order[x]
                if ints[c, CTX] >= 0:
                    ahead += floats[c, OWN] / live * (floats[c, FLIGHT] + inner_of[c])
            if ahead == 0.0:  # no row, or none that gives these bytes: a deferred node still may
                live, ahead = 0.0, guess ** (now - position)
        for x in range(begin[w], begin[w + 1]):
            c = order[x]
            if ints[c, PARENT] >= 0:
                inner_of[ints[c, PARENT]] += floats[c, P] * ahead
        if live == 0.0 and position < now:
            estimate += deferred * ahead
            without += deferred
        at[w, 0], at[w, 1], at[w, 2] = live, deferred, ahead
    return estimate, without


@inner()
def heaviest(ints, floats, order, first, end):
    """Return the deferred node with the most OWN among `order[first:end]`; -1 if none has any."""
    best, top = -1, 0.0
    for x in range(first, end):
        c = order[x]
        if ints[c, CTX] < 0 and floats[c, OWN] > top:
            best, top = c, floats[c, OWN]
    return best


@inner()
def _insert(wanted, shares, c, share):
    """Put a node into the list of the most wanted, the greatest share first."""
    at = len(wanted)
    while at > 0 and share > shares[at - 1]:
        at -= 1
    if at < len(wanted):
        for x in range(len(wanted) - 1, at, -1):
            wanted[x], shares[x] = wanted[x - 1], shares[x - 1]
        wanted[at], shares[at] = c, share


@inner()
def _choose(ints, floats, lines, now, share, merge, estimate, at_end, wanted, shares):
    """Choose the deferred nodes of one lane whose estimated shares are above the limits.

    Args:
        lines: `order`, `begin` and `at` of `outlook`, whose results this takes.
        ints, floats, now, share, merge, at_end, wanted, shares: see `judge_lane`.
        estimate: from `outlook`.
    """
    order, begin, at = lines
    for w in range(len(begin) - 2, -1, -1):
        if (now - WINDOW - 1 + w == now) != at_end:
            continue
        live, deferred, ahead = at[w, 0], at[w, 1], at[w, 2]
        if live == 0.0:
            best = heaviest(ints, floats, order, begin[w], begin[w + 1])
            may = best >= 0 and ints[best, NODE] != NOT_NOW
            if may and deferred * ahead > share * estimate:
                _insert(wanted, shares, best, deferred * ahead / estimate)
            continue
        for x in range(begin[w], begin[w + 1]):
            c = order[x]
            worth = floats[c, OWN] * ahead
            rides = ints[c, CTX] < 0 and ints[c, NODE] != NOT_NOW
            if rides and worth > merge * estimate:
                _insert(wanted, shares, c, worth / estimate)


@inner()
def judge_lane(ints, floats, n, now, share, merge, guess, at_end, wanted, shares, rest, work):
    """Weigh the nodes of one lane, and choose the deferred ones whose rows may matter.

    Args:
        ints, floats: of the lane.
        n, now: its nodes, and the bytes that it has read.
        share: estimated share of the mass from which on a position gets its first row.
        merge: share from which on a further node of a position gets its row.
        guess: probability of each byte that a position without a row is taken to give.
        at_end: judge the nodes that end with the text instead of those before.
        wanted: int64[A], set to the places of the chosen nodes, -1 behind them.
        shares: float64[A], set to their estimated shares of the mass.
        rest: float64[2], set to the weight of deferred nodes that no row stands for, and to the
            mass that they are taken to hold.
        work: room for what is computed, see `workroom`.

    Returns:
        The mass of the lane, in units of its scale.
    """
    order, begin, inner_of, at = work
    oldest = now - WINDOW - 1
    by_position(ints, n, oldest, begin, order)
    mass = _flow(ints, floats, order, begin, now)
    estimate, rest[0] = outlook(ints, floats, order, begin, now, guess, mass, inner_of, at)
    rest[1] = estimate - mass
    for a in range(len(wanted)):
        wanted[a], shares[a] = -1, 0.0
    lines = (order, begin, at)
    _choose(ints, floats, lines, now, share, merge, estimate, at_end, wanted, shares)
    if mass == 0.0 and wanted[0] < 0:  # the text is lost but for what seemed not to matter
        _choose(ints, floats, lines, now, 0.0, 0.0, estimate, at_end, wanted, shares)
    return mass


@inner()
def _floor(worth, n, limit):
    """Return a number that at most `limit` of n weights exceed; 0 if n is no more."""
    low, high = 1e-300, 1e300
    if n <= limit:
        return 0.0
    for _ in range(60):
        middle = np.sqrt(low) * np.sqrt(high)
        above = 0
        for c in range(n):
            above += worth[c] > middle
        if above > limit:
            low = middle
        else:
            high = middle
    return high


@inner()
def settle_lane(ints, floats, n, now, mass, limit, work):
    """Forget nodes of one lane before the window and the lightest over the limit; scale to one.

    Args:
        ints, floats, n, now, work: as for `judge_lane`.
        mass: of the lane.
        limit: most deferred nodes that end before the text does.

    Returns:
        The number of nodes, and the weight of all that was forgotten, over the new scale. The
        weight of deferred nodes that no row stands for is a bound on their mass.
    """
    place, worth = work[0], work[2]
    for c in range(n):
        stays = ints[c, CTX] >= 0 or ints[c, POS] == now  # is not counted
        worth[c] = -1.0 if stays else floats[c, OWN]
    floor = _floor(worth, n, limit)
    kept, lost = 0, 0.0
    for c in range(n):
        old = ints[c, POS] < now - WINDOW
        gone = (old and ints[c, NODE] < 0) or 0.0 <= worth[c] < floor
        if old:
            ints[c, PARENT] = -1  # its weight stays what it is
        if gone and ints[c, CTX] < 0 and mass > 0.0:
            lost += floats[c, OWN] / mass
        place[c] = -1 if gone else kept
        if not gone:
            for f in range(6):
                ints[kept, f] = ints[c, f]
            for f in range(4):
                floats[kept, f] = floats[c, f]
            kept += 1
    for c in range(kept):
        if ints[c, PARENT] >= 0:
            ints[c, PARENT] = place[ints[c, PARENT]]
        if mass > 0.0:
            floats[c, OWN] /= mass
            floats[c, WEIGHT] /= mass
    return kept, lost


# -- which rows the next requests will most likely ask for ------------------------------------
# Nothing that a lane computes depends on it: rows that are foreseen are only there earlier.


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
                limit = _FEW * deferred * ahead
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
                if proxy < 0 and own > _MAIN * deferred:
                    token = _token_of(trie, rows.order, cut, text[i], position, now)
                    if token >= 0:
                        p = least[i] * estimate / own
                        found = _list(out, least_p, found, ints[i, c], token, p)
    return found
