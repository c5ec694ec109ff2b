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

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.masses_numba import child_of_node, opened, sum_range, touches
from genlm_bytes_smc.compiled import entry, full, inner

CTX, ABOVE, TOKEN, POS, PARENT, NODE = range(6)
P, OWN, WEIGHT, FLIGHT = range(4)
NOT_NOW = -2  # NODE of a deferred node that is not to be chosen, as its row cannot be had now
WINDOW = 32  # bytes after which a deferred node is forgotten
TEXT = 64  # bytes of the text that are kept, more than WINDOW


@entry()
def follow(handles, probs, cut, ints, floats, length, text, lanes, places, first, ends):
    """Move live nodes along the bytes of their lanes; list the tokens that end on the way.

    Args:
        handles, probs: of the rows, see `Handles`; every node's row must be held.
        cut: int64[c], trie positions that are no text, sorted.
        ints, floats: see the module; NODE and FLIGHT of the nodes are set.
        length: int64[N], bytes read.
        text: uint8[N, TEXT], byte i of a lane at i % TEXT.
        lanes, places: int64[m], the nodes.
        first: int64[m], position of the first byte that each has not followed.
        ends: float64[e, 5], room for the tokens: lane, place, token, end, probability.

    Returns:
        The number of tokens that end; if it is over e, only e are listed and nothing is set.
    """
    trie, rows, _ = opened(handles, probs)
    found = 0
    for k in range(len(lanes)):
        i, c = lanes[k], places[k]
        node = ints[i, c, NODE] if first[k] > ints[i, c, POS] else 0
        slot = rows.slot_of[ints[i, c, CTX]]
        row, scale = rows.probs[slot], rows.scale[slot]
        for q in range(first[k], length[i]):
            node = child_of_node(trie, node, text[i, q % TEXT]) if node >= 0 else -1
            if node < 0:
                break
            for j in range(trie.lo[node], trie.lo[node] + trie.ends[node]):
                p = np.float64(row[rows.order[j]]) * scale
                if p > 0.0 and not touches(j, j + 1, cut):
                    if found < len(ends):
                        ends[found, 0], ends[found, 1], ends[found, 2] = i, c, rows.order[j]
                        ends[found, 3], ends[found, 4] = q + 1, p
                    found += 1
        if found <= len(ends):
            ints[i, c, NODE] = node
            flight = 0.0
            if node == 0:
                flight = 1.0
            elif node > 0:
                lo, hi = trie.lo[node] + trie.ends[node], trie.hi[node]
                flight = sum_range(row, rows.order, lo, hi, cut) * scale
            floats[i, c, FLIGHT] = flight
    return found


@entry()
def defer(ints, floats, count, ends):
    """Append a deferred node for each line of `ends` (see `follow`); there is room for all."""
    for k in range(len(ends)):
        i, c = np.int64(ends[k, 0]), np.int64(ends[k, 1])
        n = count[i]
        ints[i, n, CTX] = -1
        ints[i, n, ABOVE] = ints[i, c, CTX]
        ints[i, n, TOKEN] = np.int64(ends[k, 2])
        ints[i, n, POS] = np.int64(ends[k, 3])
        ints[i, n, PARENT] = c
        ints[i, n, NODE] = -1
        floats[i, n, P] = ends[k, 4]
        floats[i, n, OWN] = floats[i, n, WEIGHT] = floats[i, n, FLIGHT] = 0.0
        count[i] = n + 1


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
        at: float64[W, 3], set for each position of the window to the weight of its live nodes,
            to that of its deferred ones, and to the estimated probability of the bytes from it on.

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
        elif live > 0.0:
            ahead = 0.0
            for x in range(begin[w], begin[w + 1]):
                c = order[x]
                if ints[c, CTX] >= 0:
                    ahead += floats[c, OWN] / live * (floats[c, FLIGHT] + inner_of[c])
        else:
            ahead = guess ** (now - position)
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


@entry()
def judge(ints, floats, count, length, share, merge, guess, at_end, wanted, shares, rest):
    """Weigh all nodes, and choose the deferred ones whose rows may matter.

    Args:
        ints, floats, count, length: see the module; OWN and WEIGHT are set.
        share: float64[N], estimated share of the mass from which on a position gets its first row.
        merge: float64[N], share from which on a further node of a position gets its row.
        guess: probability of each byte that a position without a row is taken to give.
        at_end: judge the nodes that end with the text instead of those before.
        wanted: int64[N, A], set to the places of the chosen nodes, -1 behind them.
        shares: float64[N, A], set to their estimated shares of the mass.
        rest: float64[N, 2], set to the weight of deferred nodes that no row stands for, and to
            the mass that they are taken to hold.

    Returns:
        The mass of each lane, float64[N], in units of its scale.
    """
    masses = full(len(count), 0.0)
    room = ints.shape[1]
    order, begin = full(room, 0), full(WINDOW + 3, 0)
    inner_of, at = full(room, 0.0), full((WINDOW + 2, 3), 0.0)
    for i in range(len(count)):
        now = length[i]
        oldest = now - WINDOW - 1
        by_position(ints[i], count[i], oldest, begin, order)
        mass = masses[i] = _flow(ints[i], floats[i], order, begin, now)
        for a in range(wanted.shape[1]):
            wanted[i, a], shares[i, a] = -1, 0.0
        estimate, rest[i, 0] = outlook(
            ints[i], floats[i], order, begin, now, guess, mass, inner_of, at
        )
        rest[i, 1] = estimate - mass
        for w in range(len(begin) - 2, -1, -1):
            if (oldest + w == now) != at_end:
                continue
            live, deferred, ahead = at[w, 0], at[w, 1], at[w, 2]
            if live == 0.0:
                best = heaviest(ints[i], floats[i], order, begin[w], begin[w + 1])
                may = best >= 0 and ints[i, best, NODE] != NOT_NOW
                if may and deferred * ahead > share[i] * estimate:
                    _insert(wanted[i], shares[i], best, deferred * ahead / estimate)
                continue
            for x in range(begin[w], begin[w + 1]):
                c = order[x]
                worth = floats[i, c, OWN] * ahead
                rides = ints[i, c, CTX] < 0 and ints[i, c, NODE] != NOT_NOW
                if rides and worth > merge[i] * estimate:
                    _insert(wanted[i], shares[i], c, worth / estimate)
    return masses


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


@entry()
def settle(ints, floats, count, length, masses, limit, neglected):
    """Forget nodes before the window and the lightest over the limit; scale to mass one.

    Args:
        ints, floats, count, length: see the module.
        masses: float64[N], from `judge`.
        limit: most nodes of a lane.
        neglected: float64[N], set to the weight of all that was forgotten, over the new scale.
            The weight of deferred nodes that no row stands for is a bound on their mass.
    """
    room = ints.shape[1]
    place, worth = full(room, 0), full(room, 0.0)
    for i in range(len(count)):
        n, now, mass = count[i], length[i], masses[i]
        neglected[i] = 0.0
        for c in range(n):
            alive = ints[i, c, CTX] >= 0
            worth[c] = np.inf if alive or ints[i, c, POS] == now else floats[i, c, OWN]
        floor = _floor(worth, n, limit)
        kept = 0
        for c in range(n):
            old = ints[i, c, POS] < now - WINDOW
            gone = (old and ints[i, c, NODE] < 0) or worth[c] < floor
            if old:
                ints[i, c, PARENT] = -1  # its weight stays what it is
            if gone and ints[i, c, CTX] < 0 and mass > 0.0:
                neglected[i] += floats[i, c, OWN] / mass
            place[c] = -1 if gone else kept
            if not gone:
                for f in range(6):
                    ints[i, kept, f] = ints[i, c, f]
                for f in range(4):
                    floats[i, kept, f] = floats[i, c, f]
                kept += 1
        count[i] = kept
        for c in range(kept):
            if ints[i, c, PARENT] >= 0:
                ints[i, c, PARENT] = place[ints[i, c, PARENT]]
            if mass > 0.0:
                floats[i, c, OWN] /= mass
                floats[i, c, WEIGHT] /= mass
