"""The automata and the language models among the factors of a target."""

from __future__ import annotations

from functools import reduce
from typing import Any

from genlm.control.potential.tempered import Tempered

from genlm_bytes_smc.constraints import ByteDFA, ByteWFSA
from genlm_bytes_smc.smc.factors import factors_of, has_language_model, name_of

Automaton = ByteDFA | ByteWFSA


def automata_of(target: Any) -> list[Automaton]:
    """The automata that a text of the target must pass.

    A power of a deterministic automaton admits the same texts, so it counts as that.

    Raises:
        ValueError: there is none.
    """
    found: list[Automaton] = []
    for factor in factors_of(target):
        inner = factor
        while isinstance(inner, Tempered) and inner.beta > 0:
            inner = inner.p
        if isinstance(inner, ByteDFA) or (isinstance(factor, ByteWFSA)):
            found.append(inner)
    if not found:
        raise ValueError(
            f"no byte automaton is a factor of {name_of(target)}, so there is nothing to look "
            "ahead along; name one that approximates the constraint: Lookahead(constraint=...)"
        )
    return found


def meet(automata: list[Automaton]) -> tuple[ByteDFA | None, ByteWFSA | None]:
    """One deterministic automaton for all deterministic ones, and the weighted one.

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
    """The factors of a target that hold language models.

    Raises:
        ValueError: there is none.
    """
    models = [f for f in factors_of(target) if has_language_model(f)]
    if not models:
        raise ValueError(f"no language model is a factor of {name_of(target)}")
    return models
