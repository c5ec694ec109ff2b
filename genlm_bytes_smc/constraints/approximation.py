"""An automaton that is nearly the language of a grammar or a schema, found by asking.

A matcher of llguidance has no states that could be listed, but it says what may follow any
text. Texts after which the same may follow are one state (Nerode). That is approximated: two
texts are one state if their masks (what may stand next) are equal and if each of some endings
is admitted equally far after both. Merging texts by the beginnings of their residual languages
is the k-tails method (Biermann & Feldman 1972); endings to try in place of all those of k
bytes are an observation table (Angluin 1987). Its columns are drawn by random walks
(`completions.py`), and more are found where automaton and constraint disagree
(`refinement.py`); the rows are explored in `exploration.py`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch

from genlm_bytes_smc.alphabet import as_bytes
from genlm_bytes_smc.constraints.answers import Answers
from genlm_bytes_smc.constraints.base import ConstraintError, check_limit
from genlm_bytes_smc.constraints.completions import Completions
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.constraints.exploration import Explorer
from genlm_bytes_smc.constraints.languages import FiniteSet
from genlm_bytes_smc.constraints.matcher import ByteMatcher
from genlm_bytes_smc.constraints.probe import Probe
from genlm_bytes_smc.constraints.refinement import refine

MAX_STATES = 1000
MAX_CALLS = 200_000
TESTS = 8
_ROUNDS = 32  # of exploring and mending
_FEWER = (4, 2, 1)  # endings a mask, where those asked for make too many states


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
    """A deterministic automaton that approximates a grammar or a schema.

    It may admit texts that the constraint does not (nesting that is too deep is counted up to
    some depth) and miss some that it does. As the `constraint` of a `Lookahead` either costs
    variance and nothing else; it is no substitute for the constraint in a target. Equal
    arguments give equal automata.

    Args:
        constraint: a `ByteGrammar` or a `ByteJsonSchema`.
        max_states: most states of the automaton.
        max_calls: about how many questions the matcher is asked, of 1 to 100 microseconds each.
        tests: most endings that texts with one mask are told apart by; more tell more apart.
        texts: known texts or beginnings (`str` as UTF-8), for example of a pilot run. Where
            they pass is explored first, and their endings are among those tried.
        seed: of the random endings.
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
        check_limit(name, value)
    if isinstance(texts, bytes | str):
        raise TypeError(f"texts must be several texts, got one of type {type(texts).__name__}")
    known = [t.encode() if isinstance(t, str) else as_bytes(t) for t in texts]
    probe = Probe(constraint.matcher(), max_calls)
    completions = Completions(probe, known, tests, seed)
    device = constraint.device if device is None else device
    answers = Answers(probe, completions)
    table = _explored(answers, known, max_states, random.Random(seed)).table()
    try:
        return ByteDFA(table.next, table.accept, device=device, max_states=max_states)
    except ConstraintError:
        return _of_texts(list(completions.whole), max_states, device)


def _explored(
    answers: Answers, known: Sequence[bytes], max_states: int, rng: random.Random
) -> Explorer:
    """Explored and mended, until nothing is left to mend or a limit is met.

    An automaton that is too coarse is better than one that was cut off: it leaves nothing out.
    So the last one is taken that was explored to its end; if not even the first was, one with
    fewer endings.
    """
    passed = {t[:k] for t in known for k in range(len(t) + 1)}
    first = last = Explorer(answers, passed, max_states)
    for _ in range(_ROUNDS):
        if not last.complete or not refine(last, rng):
            break
        found = Explorer(answers, passed, max_states)
        if not found.complete:
            break
        last = found
    if first.complete or answers.probe.spent:
        return last
    for answers.most in _FEWER:
        found = Explorer(answers, passed, max_states)
        if found.complete and found.ends:
            return found
    return first


def _of_texts(whole: list[bytes], most: int, device: torch.device | str) -> ByteDFA:
    """What is left where no explored state leads to an end: the whole texts that are known."""
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
