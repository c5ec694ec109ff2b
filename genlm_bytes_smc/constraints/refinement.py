"""Texts on which an explored automaton and its constraint differ, and what mends them.

Random texts of the automaton are shown to the matcher, and whole texts of the constraint to
the automaton. Where the two disagree, some state stands for texts that are not alike; the rest
of the text, from that state on, is an ending that tells them apart (Rivest & Schapire 1993).
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.constraints.completions import Ending
from genlm_bytes_smc.constraints.exploration import Explorer
from genlm_bytes_smc.constraints.probe import END_BIT

_WALKS = 64
_LONGEST = 200


class Path(NamedTuple):
    """A text through an automaton.

    Attributes:
        symbols: what was read, the end as 256.
        stops: (how many symbols were read, node, whether it stands for one that was not
            explored) of each node it passes.
    """

    symbols: Ending
    stops: list[tuple[int, int, bool]]


def refine(explorer: Explorer, rng: random.Random) -> bool:
    """Add the endings that disagreements show; says whether there were any.

    Each mask is given one at most: others may say the same.
    """
    answers = explorer.answers
    drawn = (_drawn(explorer, rng) for _ in range(_WALKS))
    known = (_spelled(explorer, text) for text in list(answers.completions.whole))
    mended: set[int] = set()
    for path in itertools.chain(drawn, known):
        if answers.probe.spent:
            break
        found = _disagreement(explorer, path)
        if found is not None and found[0] not in mended and answers.completions.add(*found):
            mended.add(found[0])
    return bool(mended)


def _drawn(explorer: Explorer, rng: random.Random) -> Path:
    """A random text of the automaton, each arc out of a node as likely as another."""
    symbols: list[int] = list(explorer.forced)
    at = explorer.first
    stops = []
    while at >= 0 and len(symbols) < _LONGEST:
        here, folded = explorer.folded(at), explorer.nodes[at].arcs is None
        if here < 0:
            break
        stops.append((len(symbols), here, folded))
        node = explorer.nodes[here]
        ways: dict[tuple[bytes, int], list[int]] = {}
        for byte, arc in (node.arcs or {}).items():
            ways.setdefault(arc, []).append(byte)
        ends = [None] if node.bits & END_BIT else []
        if not ways and not ends:
            break
        way = rng.choice([*ways, *ends])
        if way is None:
            return Path((*symbols, EOS_COLUMN), stops)
        symbols += [rng.choice(ways[way]), *way[0]]
        at = way[1]
    return Path(tuple(symbols), stops)


def _spelled(explorer: Explorer, text: bytes) -> Path:
    """A whole text of the constraint, up to the first symbol that the automaton lacks."""
    symbols = (*text, EOS_COLUMN)
    n, at, stops = len(explorer.forced), explorer.first, []
    while at >= 0:
        here, folded = explorer.folded(at), explorer.nodes[at].arcs is None
        if here < 0:
            break
        stops.append((n, here, folded))
        arc = (explorer.nodes[here].arcs or {}).get(symbols[n])
        if arc is None:
            break
        forced, at = arc
        if tuple(forced) != symbols[n + 1 : n + 1 + len(forced)]:
            break
        n += 1 + len(forced)
    return Path(symbols[: n + 1], stops)


def _disagreement(explorer: Explorer, path: Path) -> tuple[int, Ending] | None:
    """A mask and an ending that tells two texts apart which led to one node, if any."""
    probe = explorer.answers.probe
    admitted = probe.admits(probe.root, path.symbols)
    symbols = path.symbols[: admitted + 1]
    whole = admitted == len(symbols)  # whether the constraint admits all of it
    after: tuple[int, Ending] | None = None
    for n, at, folded in reversed([s for s in path.stops if s[0] < len(symbols)]):
        node = explorer.nodes[at]
        matcher = probe.read(probe.root, node.text)
        rest = symbols[n:]
        if whole == (matcher is not None and probe.admits(matcher, rest) == len(rest)):
            return after  # from here on the node was right, at the next one it no longer was
        # A node that stands for one that was not explored is wrong for want of room.
        after = None if folded else (node.bits, rest)
    return None
