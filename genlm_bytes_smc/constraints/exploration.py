"""Exploring what a matcher admits into the states of an automaton.

States are explored from the empty text, the likeliest under a walk that takes each way out of
a state alike first (and before all others those that known texts pass). Bytes that nothing
stands beside are passed without a question. Where a limit is met, a state not yet explored is
folded into its nearest ancestor with the same mask, so nesting that is too deep looks like
nesting as deep as could be explored; without one, into a state whose mask has most in common
with its own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.constraints.answers import Answers, Key
from genlm_bytes_smc.constraints.automata.table import Int32, Table
from genlm_bytes_smc.constraints.base import DEAD
from genlm_bytes_smc.constraints.probe import END_BIT


@dataclass
class Node:
    """A state at which there is a choice, by the first text that was seen to lead to it.

    Attributes:
        bits: what may follow.
        text: that text.
        parent: the node it was reached from, -1 for the first.
        cost: -log probability of the text, where each way out of a node is as likely.
        arcs: for each byte, what is forced after it and the node that follows; None as long
            as the node is not explored.
    """

    bits: int
    text: bytes
    parent: int
    cost: float
    arcs: dict[int, tuple[bytes, int]] | None = None

    @property
    def states(self) -> int:
        """States that it takes: its own, and those of forced bytes on its arcs."""
        return 1 + sum(len(forced) for forced, _ in set((self.arcs or {}).values()))


class Explorer:
    """Explores a constraint into nodes, likeliest first.

    Args:
        answers: what is known of texts, and who to ask about others.
        passed: beginnings of known texts, whose ways are explored first.
        max_states: most states of the table.

    Attributes:
        nodes: what was found; those without arcs were not explored.
        forced, first: what each text begins with, and the node after it.
        complete: whether no limit was met.
    """

    def __init__(self, answers: Answers, passed: Collection[bytes], max_states: int) -> None:
        self.answers = answers
        self.passed = passed
        self.nodes: list[Node] = []
        self._place: dict[Key, int] = {}
        self._queue: list[tuple[float, bool, int]] = []
        self.forced, self.first = self._settle(b"", -1, 0.0)
        self.complete = self._explore(max_states)
        self._others = {n.bits: i for i, n in enumerate(self.nodes) if n.arcs is not None}

    def _explore(self, max_states: int) -> bool:
        n_states = len(self.forced)
        while self._queue:
            *_, at = heapq.heappop(self._queue)
            node = self.nodes[at]
            if node.arcs is not None:
                continue
            if self.answers.probe.spent:
                return False
            node.arcs = self._arcs(at)
            n_states += node.states
            if n_states > max_states:
                node.arcs = None
                return False
        return True

    def _settle(self, text: bytes, parent: int, cost: float) -> tuple[bytes, int]:
        """The node that a text leads to: (what is forced before it, its number or -1)."""
        forced, key = self.answers.of(text)
        if not key[0]:
            return b"", DEAD
        text += forced
        if text in self.passed:
            cost = 0.0
        at = self._place.setdefault(key, len(self.nodes))
        if at == len(self.nodes):
            self.nodes.append(Node(key[0], text, parent, cost))
        elif self.nodes[at].arcs is not None or cost >= self.nodes[at].cost:
            return forced, at
        self.nodes[at].cost = cost
        heapq.heappush(self._queue, (cost, not key[0] & END_BIT, at))
        return forced, at

    def _arcs(self, at: int) -> dict[int, tuple[bytes, int]]:
        node = self.nodes[at]
        groups = self._groups(node)
        ways = len(groups) + bool(node.bits & END_BIT)
        arcs = {}
        for group in groups:
            text = node.text + bytes(group[:1])
            arc = self._settle(text, at, node.cost + math.log(ways))
            arcs.update(dict.fromkeys(group, arc))
        return arcs

    def _groups(self, node: Node) -> list[list[int]]:
        """Bytes that are looked at together; one that known texts read is so by itself."""
        groups: list[list[int]] = []
        for way in self.answers.ways(node.text, node.bits):
            alone = [b for b in way if node.text + bytes([b]) in self.passed]
            rest = [b for b in way if b not in alone]
            groups += [[b] for b in alone] + ([rest] if rest else [])
        return groups

    def folded(self, at: int) -> int:
        """The explored node that stands for a node: itself if it was; -1 if there is none."""
        node = self.nodes[at]
        if node.arcs is not None:
            return at
        up = node.parent
        while up >= 0 and (self.nodes[up].bits != node.bits or self.nodes[up].arcs is None):
            up = self.nodes[up].parent
        return up if up >= 0 else self._likest(node.bits)

    @property
    def ends(self) -> bool:
        """Whether a whole text can be read through the nodes explored."""
        alive = {at for at, node in enumerate(self.nodes) if node.bits & END_BIT}
        grown = True
        while grown:
            more = {
                at
                for at, node in enumerate(self.nodes)
                if at not in alive and alive & {to for _, to in (node.arcs or {}).values()}
            }
            alive |= more
            grown = bool(more)
        return self.first in alive

    def _likest(self, bits: int) -> int:
        """The explored node whose mask has most in common with this one, -1 for nothing."""
        found = self._others.get(bits)
        if found is None:
            shared = [((bits & b).bit_count() / (bits | b).bit_count(), b) for b in self._others]
            share, mask = max(shared, default=(0.0, 0))
            found = self._others[bits] = self._others[mask] if share else DEAD
        return found

    def table(self) -> Table:
        """The automaton; it may have states that lead nowhere."""
        rows = _Rows()
        name = {DEAD: DEAD}
        name |= {at: rows.new() for at, node in enumerate(self.nodes) if node.arcs is not None}
        for at, node in enumerate(self.nodes):
            if node.arcs is None:
                continue
            made: dict[tuple[bytes, int], int] = {}
            for byte, arc in node.arcs.items():
                if arc not in made:
                    target = DEAD if arc[1] == DEAD else name[self.folded(arc[1])]
                    made[arc] = rows.chain(arc[0], target)
                rows.next[name[at]][byte] = made[arc]
            rows.accept[name[at]] = bool(node.bits & END_BIT)
        start = DEAD if self.first == DEAD else name[self.folded(self.first)]
        return rows.table(rows.chain(self.forced, start))


class _Rows:
    """A table of states that grows."""

    def __init__(self) -> None:
        self.next: list[Int32] = []
        self.accept: list[bool] = []

    def new(self) -> int:
        """A state that leads nowhere yet."""
        self.next.append(np.full(N_BYTES, DEAD, dtype=np.int32))
        self.accept.append(False)
        return len(self.next) - 1

    def chain(self, text: bytes, target: int) -> int:
        """The state from which `text` leads to a target."""
        if target == DEAD:
            return DEAD
        for byte in reversed(text):
            state = self.new()
            self.next[state][byte] = target
            target = state
        return target

    def table(self, start: int) -> Table:
        """With `start` as state 0."""
        if start == DEAD:
            start = self.new()
        order = np.array([start, *(i for i in range(len(self.next)) if i != start)])
        name = np.append(np.argsort(order), DEAD).astype(np.int32)
        return Table(name[np.stack(self.next)[order]], np.array(self.accept)[order])
