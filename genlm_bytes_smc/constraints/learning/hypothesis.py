"""The hypothesis: the states that texts of one row make, explored into an automaton.

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
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.constraints.automata.nfa import Nfa, determinize
from genlm_bytes_smc.constraints.automata.table import Table
from genlm_bytes_smc.constraints.base import DEAD
from genlm_bytes_smc.constraints.learning.membership_oracle import Symbols
from genlm_bytes_smc.constraints.learning.observation_table import ObservationTable
from genlm_bytes_smc.constraints.matcher import END_BIT

Arc = tuple[bytes, int]  # what is forced on the way, and the node it leads to (-1: none)


@dataclass
class Node:
    """A state at which there is a choice, by the first text that was seen to lead to it.

    Attributes:
        mask: what may follow.
        text: that text.
        parent: the node it was reached from, -1 for the first.
        cost: -log probability of the text, where each way out of a node is as likely.
        arcs: the arcs out of it, each with the bytes that take it; None as long as the node is
            not explored.
    """

    mask: int
    text: bytes
    parent: int
    cost: float
    arcs: dict[Arc, list[int]] | None = None

    @property
    def n_states(self) -> int:
        """States that it takes: its own, and those of forced bytes on its arcs."""
        return 1 + sum(len(forced) for forced, _ in self.arcs or ())


class Hypothesis:
    """An automaton explored into nodes, likeliest first.

    Args:
        table: the observation table.
        passed: beginnings of known texts, whose ways are explored first.
        max_states: most states of the automaton.

    Attributes:
        nodes: what was found; those without arcs were not explored.
        start: the arc that each text begins with.
        complete: whether no limit was met.
    """

    def __init__(self, table: ObservationTable, passed: Collection[bytes], max_states: int) -> None:
        self._rows = table
        self.passed = passed
        self.nodes: list[Node] = []
        self._place: dict[Symbols, int] = {}
        self._queue: list[tuple[float, bool, int]] = []
        self.start = self._arc(b"", -1, 0.0)
        self.complete = self._explore(max_states)
        self._of_mask = {n.mask: i for i, n in enumerate(self.nodes) if n.arcs is not None}

    def _explore(self, max_states: int) -> bool:
        n_states = len(self.start[0])
        while self._queue:
            *_, at = heapq.heappop(self._queue)
            node = self.nodes[at]
            if node.arcs is not None:
                continue
            if self._rows.oracle.spent:
                return False
            node.arcs = self._arcs(at)
            n_states += node.n_states
            if n_states > max_states:
                node.arcs = None
                return False
        return True

    def _arc(self, text: bytes, parent: int, cost: float) -> Arc:
        """Return the arc that the last byte of a text takes, and note the node it leads to."""
        forced, row = self._rows.row(text)
        if not row[0]:
            return b"", DEAD
        text += forced
        if text in self.passed:
            cost = 0.0
        at = self._place.setdefault(row, len(self.nodes))
        if at == len(self.nodes):
            self.nodes.append(Node(row[0], text, parent, cost))
        elif self.nodes[at].arcs is not None or cost >= self.nodes[at].cost:
            return forced, at
        self.nodes[at].cost = cost
        heapq.heappush(self._queue, (cost, not row[0] & END_BIT, at))
        return forced, at

    def _arcs(self, at: int) -> dict[Arc, list[int]]:
        node = self.nodes[at]
        groups = self._groups(node)
        cost = node.cost + math.log(len(groups) + bool(node.mask & END_BIT))
        arcs: dict[Arc, list[int]] = {}
        for group in groups:
            arc = self._arc(node.text + bytes(group[:1]), at, cost)
            arcs.setdefault(arc, []).extend(group)
        return arcs

    def _groups(self, node: Node) -> list[list[int]]:
        """Return the bytes that are looked at together; one of a known text is so by itself."""
        groups: list[list[int]] = []
        for way in self._rows.ways(node.text, node.mask):
            alone = [b for b in way if node.text + bytes([b]) in self.passed]
            rest = [b for b in way if b not in alone]
            groups += [[b] for b in alone] + ([rest] if rest else [])
        return groups

    def folded(self, at: int) -> int:
        """Return the explored node that stands for a node: itself if it was; -1 for none."""
        node = self.nodes[at]
        if node.arcs is not None:
            return at
        up = node.parent
        while up >= 0 and (self.nodes[up].mask != node.mask or self.nodes[up].arcs is None):
            up = self.nodes[up].parent
        return up if up >= 0 else self._likest(node.mask)

    def _likest(self, mask: int) -> int:
        """Return the explored node whose mask has most in common with this one, -1 for none."""
        found = self._of_mask.get(mask)
        if found is None:
            known = self._of_mask
            shared = [((mask & m).bit_count() / (mask | m).bit_count(), m) for m in known]
            share, best = max(shared, default=(0.0, 0))
            found = self._of_mask[mask] = self._of_mask[best] if share else DEAD
        return found

    def automaton(self, max_states: int) -> Table:
        """Return the minimal automaton of the nodes explored.

        Raises:
            ConstraintError: none of them can end, or there are more states.
        """
        nfa = Nfa(labels=[[b] for b in range(N_BYTES)], limit=max_states)
        start = nfa.state()
        state_of = {i: nfa.state() for i, node in enumerate(self.nodes) if node.arcs is not None}

        def draw(source: int, first: Sequence[int], arc: Arc) -> None:
            forced, target = arc
            end = -1 if target == DEAD else state_of.get(self.folded(target), -1)
            if end < 0:
                return
            for byte in reversed(forced):
                here = nfa.state()
                nfa.arcs.append((here, byte, end))
                end = here
            nfa.arcs += [(source, byte, end) for byte in first]
            nfa.silent += [(source, end)] if not first else []

        draw(start, (), self.start)
        for at, state in state_of.items():
            for arc, group in (self.nodes[at].arcs or {}).items():
                draw(state, group, arc)
            if self.nodes[at].mask & END_BIT:
                nfa.accept.add(state)
        return determinize(nfa)
