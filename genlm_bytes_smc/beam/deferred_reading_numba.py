"""Reading bytes with deferred pruning, compiled: from lanes before a byte to lanes after it.

See `deferred_numba` for the arrays. One call does all that needs no row of the model that is not
there: a byte of many lanes while they are stepped, or whole texts with the rows that are held.
"""

from __future__ import annotations

import numpy as np

from genlm_bytes_smc.beam.deferred_numba import (
    ABOVE,
    CTX,
    FLIGHT,
    NODE,
    NOT_NOW,
    OWN,
    PARENT,
    POS,
    TEXT,
    TOKEN,
    WEIGHT,
    P,
    judge_lane,
    settle_lane,
    workroom,
)
from genlm_bytes_smc.beam.masses_numba import (
    ROOT,
    add_masses,
    child_of_node,
    longer_mass,
    opened,
    touches,
)
from genlm_bytes_smc.compiled import entry, full, inner
from genlm_bytes_smc.lm.contexts_numba import known_child, place_of

AT_ONCE = 4  # rows that a lane takes in one turn of judging
READ, PICK = -1, 0  # what is next in a lane, see `judge`
# Log weights of a lane, nats: what its weights are in units of, its total, and those of contexts
# that were forgotten and that no row stands for.
SCALE, TOTAL, FORGOTTEN, PENDING = range(4)


@inner()
def _ending(trie, node, text, first, now):
    """Return how many tokens end on the way from a trie node along the bytes `first` to `now`."""
    found = 0
    for q in range(first, now):
        node = child_of_node(trie, node, text[q % TEXT]) if node >= 0 else -1
        if node < 0:
            break
        found += trie.ends[node]
    return found


@inner()
def _follow(trie, rows, cut, ints, floats, n, c, first, now, text):
    """Move live node `c` along the bytes from `first` on; append the tokens that end on the way.

    Its row must be held, and there must be room for what `_ending` says.

    Returns:
        The number of nodes.
    """
    node = ints[c, NODE] if first > ints[c, POS] else 0
    slot = rows.slot_of[ints[c, CTX]]
    row, scale = rows.probs[slot], rows.scale[slot]
    for q in range(first, now):
        node = child_of_node(trie, node, text[q % TEXT]) if node >= 0 else -1
        if node < 0:
            break
        for j in range(trie.lo[node], trie.lo[node] + trie.ends[node]):
            p = np.float64(row[rows.order[j]]) * scale
            if p > 0.0 and not touches(j, j + 1, cut):
                ints[n, CTX] = -1
                ints[n, ABOVE] = ints[c, CTX]
                ints[n, TOKEN] = np.int64(rows.order[j])
                ints[n, POS] = q + 1
                ints[n, PARENT] = c
                ints[n, NODE] = -1
                floats[n, P] = p
                floats[n, OWN] = floats[n, WEIGHT] = floats[n, FLIGHT] = 0.0
                n += 1
    ints[c, NODE] = node
    floats[c, FLIGHT] = 1.0 if node == 0 else longer_mass(trie, rows, slot, node, cut)
    return n


@entry()
def weigh_flights(handles, probs, cut, ints, floats, lanes, places):
    """Compute FLIGHT of live nodes, `places` int64[m] of `lanes` int64[m], under another `cut`."""
    trie, rows, _ = opened(handles, probs)
    for k in range(len(lanes)):
        i, c = lanes[k], places[k]
        node, slot = ints[i, c, NODE], rows.slot_of[ints[i, c, CTX]]
        floats[i, c, FLIGHT] = 1.0 if node == 0 else longer_mass(trie, rows, slot, node, cut)


@inner()
def _read_byte(trie, rows, cut, nodes, weights, n, now, text, byte):
    """Read one more byte in a lane.

    Returns:
        The number of nodes after it, or, where there is no room for them, minus how many more.
    """
    text[now % TEXT] = byte
    more = 0
    for c in range(n):
        if nodes[c, NODE] >= 0:
            more += _ending(trie, nodes[c, NODE], text, now, now + 1)
    if n + more > len(nodes):
        return -more
    after = n
    for c in range(n):
        if nodes[c, NODE] >= 0:
            after = _follow(trie, rows, cut, nodes, weights, after, c, now, now + 1, text)
    return after


@inner()
def _take(trie, rows, cut, nodes, weights, n, now, text, places, ids):
    """Make nodes live, `places` int64[m], whose contexts `ids` int64[m] have rows (-1: has none).

    Returns:
        As `_read_byte`.
    """
    more = 0
    for a in range(len(places)):
        if ids[a] >= 0:
            more += _ending(trie, ROOT, text, nodes[places[a], POS], now)
    if n + more > len(nodes):
        return -more
    for a in range(len(places)):
        if ids[a] >= 0:
            nodes[places[a], CTX], nodes[places[a], NODE] = ids[a], -1
    for a in range(len(places)):
        c = places[a]
        if ids[a] >= 0:
            n = _follow(trie, rows, cut, nodes, weights, n, c, nodes[c, POS], now, text)
    return n


@inner()
def _held_id(held, node, width):
    """Return the id of the context of a deferred node if its row is held (see `judge`), or -1."""
    at = place_of(held[0], node[ABOVE] * width + node[TOKEN])
    return held[1, at] if at >= 0 else -1


@inner()
def _stored_id(tree, rows, node):
    """Return the id of the context of a deferred node if its row is there, or -1."""
    found = known_child(tree, node[ABOVE], node[TOKEN])
    return found if found >= 0 and rows.slot_of[found] >= 0 else np.int64(-1)


@inner()
def _held_among(held, width, nodes, n, places, ids):
    """List the deferred ones of n nodes in `places`, and in `ids` what `_held_id` says of them.

    Returns:
        How many there are.
    """
    found = 0
    for c in range(n):
        if nodes[c, CTX] < 0:
            places[found], ids[found] = c, _held_id(held, nodes[c], width)
            found += 1
    return found


@inner()
def _settle(nodes, weights, n, now, mass, without, limit, z, work):
    """Settle a lane after a byte, and bring its log weights `z` float64[4] up to date.

    Args:
        nodes, weights, n, now, mass, limit, work: see `settle_lane`.
        without: weight of deferred nodes that no row stands for.
        z: set, see `SCALE`.

    Returns:
        The number of nodes.
    """
    n, lost = settle_lane(nodes, weights, n, now, mass, limit, work)
    z[PENDING] = np.log(without) + z[SCALE]
    if mass > 0.0:
        z[SCALE] += np.log(mass)
    z[FORGOTTEN] = np.logaddexp(z[FORGOTTEN], np.log(lost) + z[SCALE])
    z[TOTAL] = z[SCALE] if mass > 0.0 else -np.inf
    return n


@entry()
def judge(
    handles, probs, cut, ints, floats, count, length, text, symbols, at, turn, held, width, free,
    limits, guess, at_end, turns, limit, z, masses, rest, noted, shares, log_z, state,
):  # fmt: skip
    """Read bytes, weigh all nodes, and take the rows that may matter, as far as they are there.

    Args:
        handles, probs: of the rows, see `Handles`; the row of every live node must be held.
        cut: int64[c], trie positions that are no text, sorted.
        ints, floats, count, length: see `deferred_numba`.
        text: uint8[N, TEXT], byte i of a lane at i % TEXT.
        symbols: int64[N, L], the bytes to read, -1 behind them.
        at: int64[N], how many of them each lane has read.
        turn: int64[N], what is next in each lane: READ, PICK (take rows of `held`), or the number
            of a turn of judging, from 1 on.
        held: int64[2, m], keys and ids of the contexts whose rows may be used (see `Held`). What
            else is wanted is noted, and the lane does without.
        width: of the keys.
        free: whether instead all rows may be used. A lane then stops where a row is wanted that
            is not there, and L is 1.
        limits: float64[N, 2], `share` and `merge` of each lane, see `judge_lane`.
        guess, at_end: see `judge_lane`.
        turns: turns of judging in which a lane may take rows.
        limit: most deferred nodes of a lane, see `settle_lane`; 0: lanes are not settled.
        z: float64[N, 4], log weights, see `SCALE`; set where lanes are settled.
        masses: float64[N], set to the mass of each lane, in units of its scale (1 or 0 of one
            that has been settled).
        rest: float64[N, 2], set, see `judge_lane`.
        noted: int64[k, 2], set to contexts that are wanted and not there: the context that each
            extends, and by which token.
        shares: float64[k], set to the estimated shares that they hold of their lanes.
        log_z: float64[L, N], set to the weight after each byte where lanes are settled, nats.
        state: int64[3], set to the number of contexts noted, how many more nodes a lane needs
            room for, and 1 if `noted` needs room; after either this is to be called again.
    """
    trie, rows, tree = opened(handles, probs)
    room = ints.shape[1]
    work = workroom(room)
    wanted, worth, ids = full(AT_ONCE, 0), full(AT_ONCE, 0.0), full(AT_ONCE, 0)
    places, picked = full(room, 0), full(room, 0)
    found, lacking, state[2] = 0, 0, 0
    for i in range(len(count)):
        nodes, weights = ints[i], floats[i]
        while at[i] < symbols.shape[1] and symbols[i, at[i]] >= 0:
            if turn[i] == READ:
                n = _read_byte(
                    trie, rows, cut, nodes, weights, count[i], length[i], text[i],
                    symbols[i, at[i]],
                )  # fmt: skip
                if n < 0:
                    lacking = max(lacking, -n)
                    break
                count[i], turn[i] = n, PICK
                length[i] += 1
            now = length[i]
            if turn[i] == PICK:
                deferred = 0 if free else _held_among(held, width, nodes, count[i], places, picked)
                n = _take(
                    trie, rows, cut, nodes, weights, count[i], now, text[i], places[:deferred],
                    picked,
                )  # fmt: skip
                if n < 0:
                    lacking = max(lacking, -n)
                    break
                count[i], turn[i] = n, 1
            done = False
            while not done:
                masses[i] = judge_lane(
                    nodes, weights, count[i], now, limits[i, 0], limits[i, 1], guess, at_end,
                    wanted, worth, rest[i], work,
                )  # fmt: skip
                n_wanted = AT_ONCE
                while n_wanted > 0 and wanted[n_wanted - 1] < 0:
                    n_wanted -= 1
                if n_wanted == 0 or turn[i] > turns:
                    done = True
                    break
                if found + AT_ONCE > len(noted):
                    state[2] = 1
                    break
                there = 0
                for a in range(n_wanted):
                    node = nodes[wanted[a]]
                    ids[a] = _stored_id(tree, rows, node) if free else _held_id(held, node, width)
                    there += ids[a] >= 0
                if there == n_wanted or not free:
                    n = _take(
                        trie, rows, cut, nodes, weights, count[i], now, text[i],
                        wanted[:n_wanted], ids,
                    )  # fmt: skip
                    if n < 0:
                        lacking = max(lacking, -n)
                        break
                    count[i] = n
                    turn[i] += 1
                for a in range(n_wanted):
                    if ids[a] < 0:
                        node = nodes[wanted[a]]
                        noted[found, 0], noted[found, 1] = node[ABOVE], node[TOKEN]
                        shares[found] = worth[a]
                        found += 1
                        if not free:
                            node[NODE] = NOT_NOW
                if there < n_wanted and free:
                    break
            if not done:
                break
            if limit > 0:
                count[i] = _settle(
                    nodes, weights, count[i], now, masses[i], rest[i, 0], limit, z[i], work
                )
                log_z[at[i], i] = z[i, TOTAL]
                masses[i] = 1.0 if masses[i] > 0.0 else 0.0
            turn[i] = READ
            at[i] = at[i] + 1 if masses[i] > 0.0 else symbols.shape[1]
    state[0], state[1] = found, lacking


@entry()
def forecast(
    handles, probs, cut, ints, floats, count, length, alive, masses, guessed, lossy, reserve, alike
):  # fmt: skip
    """Return the log probabilities of the next symbol of each lane, float64[N, 257].

    Args:
        handles, probs, cut, ints, floats, count, length, masses: as `judge` leaves them.
        alive: bool[N]; rows of other lanes are -inf.
        guessed: float64[N], mass that nodes without any row are taken to hold: symbols share it
            as tokens do, so that none is out of reach that such a node may give.
        lossy: bool[N], lanes of which something has been dropped.
        reserve: least share of a row that symbols have so, where a lane is lossy or has deferred
            nodes.
        alike: float64[257], the shares of the symbols in it.
    """
    trie, rows, _ = opened(handles, probs)
    room = ints.shape[1]
    ctx, node, weight = full(room, 0), full(room, 0), full(room, 0.0)
    out = full((len(count), 257), 0.0)
    for i in range(len(count)):
        nodes, line, n = ints[i], out[i], count[i]
        stands = deferred = False
        for c in range(n):
            stands |= nodes[c, NODE] >= 0 and nodes[c, POS] == length[i]
            deferred |= nodes[c, CTX] < 0
        for c in range(n):
            ctx[c], node[c], weight[c] = nodes[c, CTX], nodes[c, NODE], floats[i, c, WEIGHT]
            if nodes[c, CTX] < 0 and nodes[c, POS] == length[i] and not stands:
                # No row is there for what ends with the text: the row before its last token.
                ctx[c], node[c], weight[c] = nodes[c, ABOVE], 0, floats[i, c, OWN]
            weight[c] = np.log(weight[c]) if node[c] >= 0 and alive[i] else -np.inf
        logs = weight[:n]
        add_masses(trie, rows, ctx[:n], node[:n], logs, logs, cut, len(count) == 1, line)
        total = 0.0
        for b in range(257):
            total += line[b]
        share = 0.0
        if alive[i] and (deferred or lossy[i]):
            share = max(guessed[i] / (masses[i] + guessed[i]) if masses[i] > 0.0 else 1.0, reserve)
        for b in range(257):
            p = (1.0 - share) * (line[b] / total) if total > 0.0 else 0.0
            line[b] = np.log(p + share * alike[b])
    return out
