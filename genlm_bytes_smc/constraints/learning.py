"""An automaton that is nearly the language of a grammar or a schema, found by asking.

A matcher of llguidance has no states that could be listed, but it says what may follow any
text. Texts that are alike in an observation table are one state of a hypothesis; where the
hypothesis and the constraint then disagree about a text, its rest becomes a new column, and the
hypothesis is made anew (Angluin 1987; Rivest & Schapire 1993). No matcher can say whether a
hypothesis is right, so random texts of both sides stand in for the equivalence oracle.

States are explored from the empty text, the likeliest under a walk that takes each way out of
a state alike first (and before all others those that known texts pass). Bytes that nothing
stands beside are passed without a question. Where a limit is met, a state not yet explored is
folded into its nearest ancestor with the same mask, so nesting that is too deep looks like
nesting as deep as could be explored; without one, into a state whose mask has most in common
with its own.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, as_bytes
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.automata import Nfa, Table, determinize
from genlm_bytes_smc.constraints.base import DEAD, ConstraintError
from genlm_bytes_smc.constraints.dfa import ByteDFA, FiniteSet
from genlm_bytes_smc.constraints.learning_table import MembershipOracle, ObservationTable, Symbols
from genlm_bytes_smc.constraints.matcher import END_BIT, ByteMatcher

MAX_STATES = 1000
MAX_CALLS = 200_000
TESTS = 8
_ROUNDS = 32  # of hypotheses
_FEWER = (4, 2, 1)  # suffixes a mask, where those asked for make too many states
_WALKS = 64  # texts of a hypothesis that are shown to the matcher
_LONGEST = 200  # symbols of such a text

Arc = tuple[bytes, int]  # what is forced on the way, and the node it leads to (-1: none)


def approximate_automaton(
    constraint: ByteMatcher,
    *,
    max_states: int = MAX_STATES,
    max_calls: int = MAX_CALLS,
    tests: int = TESTS,
    texts: Iterable[bytes | str] = (),
    seed: int = 0,
    device: torch.device | str | None = None,
) -> ByteDFA:
    """Return a deterministic automaton that approximates a grammar or a schema.

    It may admit texts that the constraint does not (nesting that is too deep is counted up to
    some depth) and miss some that it does. As the `constraint` of a `Lookahead` either costs
    variance and nothing else; it is no substitute for the constraint in a target. Equal
    arguments give equal automata.

    Args:
        constraint: a `ByteGrammar` or a `ByteJsonSchema`.
        max_states: most states of the automaton.
        max_calls: about how many questions the matcher is asked, of 1 to 100 microseconds each.
        tests: most suffixes that texts with one mask are told apart by; more tell more apart.
        texts: known texts or beginnings (`str` as UTF-8), for example of a pilot run. Where
            they pass is explored first, and their suffixes are among those tried.
        seed: of the random suffixes.
        device: where the automaton lives (None: that of the constraint).

    Raises:
        TypeError: `constraint` is neither a grammar nor a schema, or a limit is no int.
        ValueError: a limit below 1.
        ConstraintError: no whole text was found within the limits.
    """
    if not isinstance(constraint, ByteMatcher):
        raise TypeError(
            "an automaton is approximated for a ByteGrammar or a ByteJsonSchema, "
            f"got {type(constraint).__name__}"
        )
    for name, value in (("max_states", max_states), ("max_calls", max_calls), ("tests", tests)):
        check_count(name, value, 1)
    if isinstance(texts, bytes | str):
        raise TypeError(f"texts must be several texts, got one of type {type(texts).__name__}")
    known = [t.encode() if isinstance(t, str) else as_bytes(t) for t in texts]
    oracle = MembershipOracle(constraint.matcher(), max_calls)
    table = ObservationTable(oracle, known, tests, seed)
    device = constraint.device if device is None else device
    found = _learned(table, known, max_states, random.Random(seed))
    try:
        return ByteDFA._of(found.automaton(max_states), device)
    except ConstraintError:
        return _of_texts(list(table.walks.whole), max_states, device)


def _learned(
    table: ObservationTable, known: Sequence[bytes], max_states: int, rng: random.Random
) -> Hypothesis:
    """Return the last hypothesis that was explored to its end, when none is left to mend.

    An automaton that is too coarse is better than one that was cut off: it leaves nothing out.
    So if not even the first was explored to its end, one with fewer suffixes is taken.
    """
    passed = {t[:k] for t in known for k in range(len(t) + 1)}
    first = last = Hypothesis(table, passed, max_states)
    for _ in range(_ROUNDS):
        if not last.complete or not refine(last, rng):
            break
        found = Hypothesis(table, passed, max_states)
        if not found.complete:
            break
        last = found
    if first.complete or table.oracle.spent:
        return last
    for table.most in _FEWER:
        found = Hypothesis(table, passed, max_states)
        with suppress(ConstraintError):  # no text comes to an end
            if found.complete and found.automaton(max_states):
                return found
    return first


def _of_texts(whole: list[bytes], most: int, device: torch.device | str) -> ByteDFA:
    """Return the automaton of known whole texts, where no explored state leads to an end."""
    room, kept = most - 1, []
    for text in sorted(whole, key=lambda t: (len(t), t)):
        room -= len(text)
        if room >= 0:
            kept.append(text)
    if not kept:
        raise ConstraintError(
            "no whole text of the constraint was found within the limits of the approximation; "
            "raise max_states or max_calls, or name texts that it admits"
        )
    return FiniteSet(kept, device=device)


@dataclass
class Node:
    """A state at which there is a choice, by the first text that was seen to lead to it.

    Attributes:
        mask: what may follow.
        text: that text.
        parent: the node it was reached from, -1 for the first.
        cost: -log probability of the text, where each way out of a node is as likely.
        arcs: the arcs out of it, each with the bytes that take it (None: not explored yet).
    """

    mask: int
    text: bytes
    parent: int
    cost: float
    arcs: dict[Arc, list[int]] | None = None


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
        self.table = table
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
            if self.table.oracle.spent:
                return False
            arcs = self._arcs(at)
            n_states += 1 + sum(len(forced) for forced, _ in arcs)
            if n_states > max_states:
                return False
            node.arcs = arcs
        return True

    def _arc(self, text: bytes, parent: int, cost: float) -> Arc:
        """Return the arc that the last byte of a text takes, and note the node it leads to."""
        forced, row = self.table.row(text)
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
        for way in self.table.ways(node.text, node.mask):
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
        nfa = Nfa(limit=max_states)
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


# A text through a hypothesis: its symbols, and where it passes nodes (how many symbols were read,
# the node, whether it stands for one that was not explored).
Path = tuple[Symbols, list[tuple[int, int, bool]]]


def refine(hypothesis: Hypothesis, rng: random.Random) -> bool:
    """Add suffixes to the table that disagreements show; return whether there were any.

    Random texts of the hypothesis are shown to the matcher, and whole texts of the constraint to
    the hypothesis. Each mask is given one suffix at most: others may say the same.
    """
    table = hypothesis.table
    drawn = (_drawn(hypothesis, rng) for _ in range(_WALKS))
    known = (_spelled(hypothesis, text) for text in list(table.walks.whole))
    mended: set[int] = set()
    for path in itertools.chain(drawn, known):
        if table.oracle.spent:
            break
        found = _disagreement(hypothesis, path)
        if found is not None and found[0] not in mended and table.add(*found):
            mended.add(found[0])
    return bool(mended)


def _drawn(hypothesis: Hypothesis, rng: random.Random) -> Path:
    """Draw a text of the hypothesis, each arc out of a node as likely as another."""
    forced, at = hypothesis.start
    symbols = [*forced]
    stops = []
    while at >= 0 and len(symbols) < _LONGEST and (here := hypothesis.folded(at)) >= 0:
        stops.append((len(symbols), here, here != at))
        node = hypothesis.nodes[here]
        arcs = node.arcs or {}
        choices = [*arcs, *([None] if node.mask & END_BIT else [])]
        if not choices:
            break
        arc = rng.choice(choices)
        if arc is None:
            return (*symbols, EOS_COLUMN), stops
        symbols += [rng.choice(arcs[arc]), *arc[0]]
        at = arc[1]
    return tuple(symbols), stops


def _spelled(hypothesis: Hypothesis, text: bytes) -> Path:
    """Read a whole text of the constraint, up to the first symbol that the hypothesis lacks."""
    symbols = (*text, EOS_COLUMN)
    forced, at = hypothesis.start
    n, stops = len(forced), []
    while at >= 0 and (here := hypothesis.folded(at)) >= 0:
        stops.append((n, here, here != at))
        arcs = hypothesis.nodes[here].arcs or {}
        arc = next((a for a, group in arcs.items() if symbols[n] in group), None)
        if arc is None or tuple(arc[0]) != symbols[n + 1 : n + 1 + len(arc[0])]:
            break
        n, at = n + 1 + len(arc[0]), arc[1]
    return symbols[: n + 1], stops


def _disagreement(hypothesis: Hypothesis, path: Path) -> tuple[int, Symbols] | None:
    """Return a mask and a suffix that tells two texts apart which led to one node, if any."""
    oracle, (symbols, stops) = hypothesis.table.oracle, path
    admitted = oracle.admits(oracle.root, symbols)
    symbols = symbols[: admitted + 1]
    whole = admitted == len(symbols)  # whether the constraint admits all of it
    after: tuple[int, Symbols] | None = None
    for n, at, folded in reversed([s for s in stops if s[0] < len(symbols)]):
        node = hypothesis.nodes[at]
        matcher = oracle.read(node.text)
        rest = symbols[n:]
        if whole == (matcher is not None and oracle.admits(matcher, rest) == len(rest)):
            return after  # from here on the node was right, at the next one it no longer was
        # A node that stands for one that was not explored is wrong for want of room.
        after = None if folded else (node.mask, rest)
    return None
