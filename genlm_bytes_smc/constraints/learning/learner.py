"""An automaton that is nearly the language of a grammar or a schema, found by asking.

A matcher of llguidance has no states that could be listed, but it says what may follow any
text. Texts that are alike in an observation table are one state of a hypothesis; where the
hypothesis and the constraint then disagree about a text, its rest becomes a new column, and the
hypothesis is made anew (Angluin 1987; Rivest & Schapire 1993). No matcher can say whether a
hypothesis is right, so random texts of both sides stand in for the equivalence oracle.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, as_bytes
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.base import ConstraintError
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.constraints.languages import FiniteSet
from genlm_bytes_smc.constraints.learning.hypothesis import Hypothesis
from genlm_bytes_smc.constraints.learning.membership_oracle import MembershipOracle, Symbols
from genlm_bytes_smc.constraints.learning.observation_table import ObservationTable
from genlm_bytes_smc.constraints.matcher import END_BIT, ByteMatcher

MAX_STATES = 1000
MAX_CALLS = 200_000
TESTS = 8
_ROUNDS = 32  # of hypotheses
_FEWER = (4, 2, 1)  # suffixes a mask, where those asked for make too many states
_WALKS = 64  # texts of a hypothesis that are shown to the matcher
_LONGEST = 200  # symbols of such a text


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
        return ByteDFA._of(found.automaton(max_states), device, max_states)
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
        if not last.complete or not refine(last, table, rng):
            break
        found = Hypothesis(table, passed, max_states)
        if not found.complete:
            break
        last = found
    if first.complete or table.oracle.spent:
        return last
    for table.most in _FEWER:
        found = Hypothesis(table, passed, max_states)
        if found.complete and _can_end(found, max_states):
            return found
    return first


def _can_end(hypothesis: Hypothesis, max_states: int) -> bool:
    try:
        return len(hypothesis.automaton(max_states)) > 0
    except ConstraintError:
        return False


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


class Path(NamedTuple):
    """A text through a hypothesis.

    Attributes:
        symbols: what was read, the end as 256.
        stops: (how many symbols were read, node, whether it stands for one that was not
            explored) of each node it passes.
    """

    symbols: Symbols
    stops: list[tuple[int, int, bool]]


def refine(hypothesis: Hypothesis, table: ObservationTable, rng: random.Random) -> bool:
    """Add suffixes to the table that disagreements show; return whether there were any.

    Random texts of the hypothesis are shown to the matcher, and whole texts of the constraint to
    the hypothesis. Each mask is given one suffix at most: others may say the same.
    """
    drawn = (_drawn(hypothesis, rng) for _ in range(_WALKS))
    known = (_spelled(hypothesis, text) for text in list(table.walks.whole))
    mended: set[int] = set()
    for path in itertools.chain(drawn, known):
        if table.oracle.spent:
            break
        found = _disagreement(hypothesis, table.oracle, path)
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
            return Path((*symbols, EOS_COLUMN), stops)
        symbols += [rng.choice(arcs[arc]), *arc[0]]
        at = arc[1]
    return Path(tuple(symbols), stops)


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
    return Path(symbols[: n + 1], stops)


def _disagreement(
    hypothesis: Hypothesis, oracle: MembershipOracle, path: Path
) -> tuple[int, Symbols] | None:
    """Return a mask and a suffix that tells two texts apart which led to one node, if any."""
    admitted = oracle.admits(oracle.root, path.symbols)
    symbols = path.symbols[: admitted + 1]
    whole = admitted == len(symbols)  # whether the constraint admits all of it
    after: tuple[int, Symbols] | None = None
    for n, at, folded in reversed([s for s in path.stops if s[0] < len(symbols)]):
        node = hypothesis.nodes[at]
        matcher = oracle.read(node.text)
        rest = symbols[n:]
        if whole == (matcher is not None and oracle.admits(matcher, rest) == len(rest)):
            return after  # from here on the node was right, at the next one it no longer was
        # A node that stands for one that was not explored is wrong for want of room.
        after = None if folded else (node.mask, rest)
    return None
