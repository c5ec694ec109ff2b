"""The automata of a target that a look-ahead follows, and the target's language models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

from genlm.control.potential.tempered import Tempered

from genlm_bytes_smc.constraints import ByteDFA, ByteWFSA, ConstraintError, approximate_automaton
from genlm_bytes_smc.constraints.learning import MAX_STATES
from genlm_bytes_smc.constraints.matcher import ByteMatcher
from genlm_bytes_smc.smc.factors import factors_of, has_language_model, name_of

Automaton = ByteDFA | ByteWFSA


class Automata(NamedTuple):
    """The automata to look ahead along: two side by side, either of which may be missing.

    Attributes:
        dfa, wfsa: the deterministic and the weighted one.
        approximate: whether texts of the target may leave them.
    """

    dfa: ByteDFA | None
    wfsa: ByteWFSA | None
    approximate: bool


def automata_of(
    target: Any,
    constraint: Automaton | ByteMatcher | None = None,
    max_states: int = MAX_STATES,
    texts: Sequence[bytes] = (),
) -> Automata:
    """Return the constraint given, or else the automata, grammars and schemas of the target.

    Args:
        target: the target.
        constraint: look along this instead.
        max_states: most states of an automaton that approximates a grammar or a schema.
        texts: texts of the target that such an automaton learns from.

    Raises:
        ValueError: nothing to look along, or several weighted automata.
    """
    found = constraints_of(target) if constraint is None else [constraint]
    exact = [f for f in found if not isinstance(f, ByteMatcher)]
    matchers = [f for f in found if isinstance(f, ByteMatcher)]
    near = [approximate_automaton(m, max_states=max_states, texts=texts) for m in matchers]
    approximate = constraint is not None or bool(near)
    try:
        return Automata(*meet([*exact, *near]), approximate)
    except ConstraintError:
        if not exact or not near:
            raise
        # What the factors share is beyond what the approximation reached.
        return Automata(*meet(exact), False)


def constraints_of(target: Any) -> list[Automaton | ByteMatcher]:
    """Return the automata, grammars and schemas that a text of the target must pass.

    A power of one that is not weighted admits the same texts, so it counts as that.

    Raises:
        ValueError: there is none.
    """
    found: list[Automaton | ByteMatcher] = []
    for factor in factors_of(target):
        inner = factor
        while isinstance(inner, Tempered) and inner.beta > 0:
            inner = inner.p
        if isinstance(inner, ByteDFA | ByteMatcher) or isinstance(factor, ByteWFSA):
            found.append(inner)
    if not found:
        raise ValueError(
            f"no byte automaton, grammar or schema is a factor of {name_of(target)}, so there is "
            "nothing to look ahead along; name an automaton that approximates the constraint: "
            "Lookahead(constraint=...)"
        )
    return found


def meet(automata: list[Automaton]) -> tuple[ByteDFA | None, ByteWFSA | None]:
    """Return one deterministic automaton for all deterministic ones, and the weighted one.

    Raises:
        ValueError: several weighted ones.
    """
    weighted = [a for a in automata if isinstance(a, ByteWFSA)]
    if len(weighted) > 1:
        raise ValueError(
            f"a look-ahead takes at most one weighted automaton, got {len(weighted)}; name one: "
            "Lookahead(constraint=...)"
        )
    plain = [a for a in automata if isinstance(a, ByteDFA)]
    both = reduce(lambda a, b: a & b, plain) if plain else None
    return both, weighted[0] if weighted else None


def language_models_of(target: Any) -> list[Any]:
    """Return the factors of a target that hold language models.

    Raises:
        ValueError: there is none.
    """
    models = [f for f in factors_of(target) if has_language_model(f)]
    if not models:
        raise ValueError(f"no language model is a factor of {name_of(target)}")
    return models
