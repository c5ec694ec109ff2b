"""Loops over the arcs of automata, compiled: walks, coarsest congruences, subsets.

Arcs that are grouped by a state come as compressed rows: those of state q are
offset[q]..offset[q+1].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.compiled import entry, full, inner

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

# Why `subsets` returned.
DONE, SLICE, MEMBERS, CELLS, STATES, ARCS = range(6)


@entry()
def walk(table, start):
    """Return the states that a table int32[S, K] leads to from one, breadth first, int64[m]."""
    seen = full(len(table), False)
    order = full(len(table), start)
    seen[start] = True
    at, n = 0, 1
    while at < n:
        for target in table[order[at]]:
            if target >= 0 and not seen[target]:
                seen[target] = True
                order[n] = target
                n += 1
        at += 1
    return order[:n]


@entry()
def reach(offset, target, starts):
    """Return which states can be reached from some of `starts` int64[k], bool[S]."""
    seen = full(len(offset) - 1, False)
    stack = full(len(seen), 0)
    n = 0
    for q in starts:
        if not seen[q]:
            seen[q] = True
            stack[n] = q
            n += 1
    while n:
        n -= 1
        q = stack[n]
        for i in range(offset[q], offset[q + 1]):
            r = target[i]
            if not seen[r]:
                seen[r] = True
                stack[n] = r
                n += 1
    return seen


class _Parts(NamedTuple):
    """A partition: part p holds elements[first[p]:past[p]], the first marked[p] are marked.

    `counts` holds the numbers of touched parts and of parts. (Numbers that are passed on would
    have each function compiled for the literal 0 as well.)
    """

    elements: Int64
    place: Int64
    part: Int64
    first: Int64
    past: Int64
    marked: Int64
    touched: Int64
    counts: Int64


@inner()
def _one_part(n):
    elements, place, past, counts = full(n, 0), full(n, 0), full(n, 0), full(2, 0)
    for i in range(n):
        elements[i] = place[i] = i
    if n:
        past[0], counts[1] = n, 1
    return _Parts(elements, place, full(n, 0), full(n, 0), past, full(n, 0), full(n, 0), counts)


@inner()
def _mark(p, element):
    s = p.part[element]
    i, j = p.place[element], p.first[s] + p.marked[s]
    other = p.elements[j]
    p.elements[i], p.place[other] = other, i
    p.elements[j], p.place[element] = element, j
    if p.marked[s] == 0:
        p.touched[p.counts[0]] = s
        p.counts[0] += 1
    p.marked[s] += 1


@inner()
def _split(p):
    """Split the marked elements of each touched part off; the smaller part is the new one."""
    n_parts = p.counts[1]
    for t in range(p.counts[0]):
        s = p.touched[t]
        cut = p.first[s] + p.marked[s]
        p.marked[s] = 0
        if cut == p.past[s]:
            continue
        if cut - p.first[s] <= p.past[s] - cut:
            p.first[n_parts], p.past[n_parts] = p.first[s], cut
            p.first[s] = cut
        else:
            p.first[n_parts], p.past[n_parts] = cut, p.past[s]
            p.past[s] = cut
        for i in range(p.first[n_parts], p.past[n_parts]):
            p.part[p.elements[i]] = n_parts
        n_parts += 1
    p.counts[0], p.counts[1] = 0, n_parts


@entry()
def coarsest(source, symbol, by_symbol, into_offset, into, accept):
    """Return the class of each state in the coarsest congruence, int64[S] (Valmari 2012).

    Args:
        source, symbol: int[A], of arcs among states that all can reach acceptance.
        by_symbol: int64[A], the arcs in order of their symbols.
        into_offset, into: the arcs into each state.
        accept: bool[S].
    """
    blocks = _one_part(len(accept))
    for q in range(len(accept)):
        if accept[q]:
            _mark(blocks, q)
    _split(blocks)
    cords = _one_part(len(source))
    n_cords = 0
    for i in range(len(by_symbol)):
        arc = by_symbol[i]
        cords.elements[i], cords.place[arc] = arc, i
        if i == 0 or symbol[arc] != symbol[by_symbol[i - 1]]:
            cords.first[n_cords] = i
            n_cords += 1
        cords.past[n_cords - 1] = i + 1
        cords.part[arc] = n_cords - 1
    cords.counts[1] = n_cords
    block, cord = 1, 0
    while cord < cords.counts[1]:
        for i in range(cords.first[cord], cords.past[cord]):
            _mark(blocks, source[cords.elements[i]])
        _split(blocks)
        cord += 1
        while block < blocks.counts[1]:
            for i in range(blocks.first[block], blocks.past[block]):
                q = blocks.elements[i]
                for k in range(into_offset[q], into_offset[q + 1]):
                    _mark(cords, into[k])
            _split(cords)
            block += 1
    return blocks.part


class NfaArrays(NamedTuple):
    """A nondeterministic automaton in which every state can reach acceptance.

    Attributes:
        silent_offset, silent: targets of the silent steps of each state.
        arc_offset, label, target: the arcs of each state.
        label_offset, symbols: the symbols of each label.
        width: int64[N], the number of (arc, symbol) of each state.
        accept: bool[N].
        salt: uint64[N], random.
    """

    silent_offset: Int64
    silent: Int64
    arc_offset: Int64
    label: Int64
    target: Int64
    label_offset: Int64
    symbols: Int64
    width: Int64
    accept: Bool
    salt: npt.NDArray[np.uint64]


class Subsets(NamedTuple):
    """The subsets found so far, with room for more.

    Attributes:
        members: int32, the states of the subsets one after another.
        offset: int64[states + 1], where each begins.
        hashes: uint64[states], the salts of the members, xored.
        accept: bool[states].
        source, symbol, arc_target: int32, the arcs.
        slots: int32, a hash table of the subsets; its length is a power of two.
        cells: int64[2, n], scratch: lists of targets, one for each symbol.
        counts: int64[4], numbers of states, arcs, and of states whose arcs are all there; then
            how much room is wanted.
    """

    members: Int32
    offset: Int64
    hashes: npt.NDArray[np.uint64]
    accept: Bool
    source: Int32
    symbol: Int32
    arc_target: Int32
    slots: Int32
    cells: Int64
    counts: Int64


def room(n: int) -> Subsets:
    """Make room for the first subsets of an automaton of `n` states."""
    return Subsets(
        members=np.empty(2 * n, dtype=np.int32),
        offset=np.zeros(1025, dtype=np.int64),
        hashes=np.empty(1024, dtype=np.uint64),
        accept=np.empty(1024, dtype=np.bool_),
        source=np.empty(1024, dtype=np.int32),
        symbol=np.empty(1024, dtype=np.int32),
        arc_target=np.empty(1024, dtype=np.int32),
        slots=np.empty(4096, dtype=np.int32),
        cells=np.empty((2, 1024), dtype=np.int64),
        counts=np.zeros(4, dtype=np.int64),
    )


def enlarged(found: Subsets, what: int) -> Subsets:
    """Return a copy with at least twice as much room in the arrays that lack it."""
    wanted = int(found.counts[3])
    fields = {
        MEMBERS: ("members",),
        STATES: ("offset", "hashes", "accept", "slots"),
        ARCS: ("source", "symbol", "arc_target"),
        CELLS: ("cells",),
    }[what]
    larger = {}
    for name in fields:
        old = getattr(found, name)
        more = list(old.shape)
        more[-1] = max(len(old) if name == "slots" else wanted, old.shape[-1])
        larger[name] = np.concatenate([old, np.zeros(more, dtype=old.dtype)], axis=-1)
    return found._replace(**larger)


@inner()
def _number(nfa, s, todo, n, seen, stamp):
    """Return the number of the subset that `todo[:n]` reaches in silence; -1 if it needs room.

    Those of `todo[:n]` are stamped. Only states that read or accept are members.
    """
    begin = s.offset[s.counts[0]]
    end = begin
    hash_ = np.uint64(0)
    accept = False
    while n:
        n -= 1
        q = todo[n]
        if nfa.accept[q] or nfa.arc_offset[q] < nfa.arc_offset[q + 1]:
            s.members[end] = q
            end += 1
            hash_ ^= nfa.salt[q]
            accept |= nfa.accept[q]
        for i in range(nfa.silent_offset[q], nfa.silent_offset[q + 1]):
            r = nfa.silent[i]
            if seen[r] != stamp:
                seen[r] = stamp
                todo[n] = r
                n += 1
    mask = np.uint64(len(s.slots) - 1)
    slot = hash_ & mask
    while s.slots[slot] >= 0:
        other = s.slots[slot]
        if s.hashes[other] == hash_ and s.offset[other + 1] - s.offset[other] == end - begin:
            same = True
            for i in range(s.offset[other], s.offset[other + 1]):
                same &= seen[s.members[i]] == stamp
            if same:
                return other
        slot = (slot + np.uint64(1)) & mask
    new = s.counts[0]
    if new == len(s.hashes):
        return -1
    s.slots[slot] = new
    s.hashes[new] = hash_
    s.accept[new] = accept
    s.offset[new + 1] = end
    s.counts[0] += 1
    return new


@inner()
def _fill_slots(s):
    """Enter the subsets found so far into the hash table."""
    for i in range(len(s.slots)):
        s.slots[i] = -1
    mask = np.uint64(len(s.slots) - 1)
    for q in range(s.counts[0]):
        slot = s.hashes[q] & mask
        while s.slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        s.slots[slot] = q


@inner()
def _list_targets(nfa, s, here, head, touched):
    """List the targets of the arcs of a subset in `cells`, and return how many symbols they have.

    `touched` int64[K] is set to these symbols, and `head` int64[K] to the last cell of each.
    """
    n_touched = n_cells = 0
    for i in range(s.offset[here], s.offset[here + 1]):
        q = s.members[i]
        for a in range(nfa.arc_offset[q], nfa.arc_offset[q + 1]):
            for k in range(nfa.label_offset[nfa.label[a]], nfa.label_offset[nfa.label[a] + 1]):
                symbol = nfa.symbols[k]
                if head[symbol] < 0:
                    touched[n_touched] = symbol
                    n_touched += 1
                s.cells[0, n_cells] = nfa.target[a]
                s.cells[1, n_cells] = head[symbol]
                head[symbol] = n_cells
                n_cells += 1
    return n_touched


@entry()
def subsets(nfa, s, n_symbols, budget):
    """Go on with the subset construction (Rabin and Scott 1959) from where `s` stands.

    Returns:
        DONE; SLICE where about `budget` members were looked at; or which array lacks room.
        Whoever calls gives it more, and calls again.
    """
    n = len(nfa.accept)
    seen = full(n, 0)
    todo = full(n, 0)
    head = full(n_symbols, -1)
    touched = full(n_symbols, 0)
    _fill_slots(s)
    stamp = min(n, 1)  # for a literal 1, `_number` would be compiled once more
    if s.counts[0] == 0:
        if len(s.members) < n:
            s.counts[3] = n
            return MEMBERS
        seen[0] = stamp  # todo[0] is 0, the start
        _number(nfa, s, todo, stamp, seen, stamp)
    while s.counts[2] < s.counts[0]:
        if budget <= 0:
            return SLICE
        here = s.counts[2]
        arcs = s.counts[1]
        room = 0
        for i in range(s.offset[here], s.offset[here + 1]):
            room += nfa.width[s.members[i]]
        if room > s.cells.shape[1]:
            s.counts[3] = room
            return CELLS
        budget -= room + s.offset[here + 1] - s.offset[here]
        n_touched = _list_targets(nfa, s, here, head, touched)
        if arcs + n_touched > len(s.source):
            s.counts[3] = arcs + n_touched
            return ARCS
        for t in range(n_touched):
            symbol = touched[t]
            end = s.offset[s.counts[0]]
            if end + n > len(s.members):
                s.counts[3] = end + n
                return MEMBERS
            stamp += 1
            n_todo = 0
            cell = head[symbol]
            while cell >= 0:
                r = s.cells[0, cell]
                if seen[r] != stamp:
                    seen[r] = stamp
                    todo[n_todo] = r
                    n_todo += 1
                cell = s.cells[1, cell]
            head[symbol] = -1
            budget -= n_todo
            number = _number(nfa, s, todo, n_todo, seen, stamp)
            if number < 0:
                s.counts[3] = len(s.hashes) + 1
                return STATES
            s.source[arcs], s.symbol[arcs], s.arc_target[arcs] = here, symbol, number
            arcs += 1
        s.counts[1] = arcs
        s.counts[2] += 1
    return DONE
