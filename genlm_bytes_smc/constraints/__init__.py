"""Constraints on texts, as potentials over bytes.

    base.py               the interface that all of them share, and its law
    dfa.py patterns.py    deterministic automata; regular expressions
    automata.py           minimal tables, made of automata of any kind; UTF-8; automata_numba.py
    expressions.py        trees of expressions, made into automata, lookarounds among them
    regex_tree.py         such trees, from what the `regex` module parses
    tree.py               constraints that remember texts, as the next three; Python functions
    wfsa.py               weighted automata
    matcher.py            what llguidance decides: grammars; json_schema.py: schemas
    learning.py           automata that approximate these, by learning_table.py

A new constraint is a subclass of `ByteConstraint` with a case in `tests/constraints/cases.py`, on
which the tests of the interface run. Nothing here knows particles or look-ahead.
"""

from genlm_bytes_smc import alphabet as alphabet  # first: it imports genlm.control at less cost
from genlm_bytes_smc.constraints.base import ByteConstraint, ConstraintError
from genlm_bytes_smc.constraints.dfa import (
    AtomicUnits,
    ByteDFA,
    Containing,
    Ending,
    FiniteSet,
    Length,
    MaxBytes,
    StopStrings,
    Utf8,
)
from genlm_bytes_smc.constraints.json_schema import ByteJsonSchema
from genlm_bytes_smc.constraints.learning import approximate_automaton
from genlm_bytes_smc.constraints.matcher import ByteGrammar, MatcherError
from genlm_bytes_smc.constraints.patterns import ByteRegex, PartialRegex
from genlm_bytes_smc.constraints.tree import BytePredicate
from genlm_bytes_smc.constraints.wfsa import ByteWFSA, from_genlm

__all__ = [
    "AtomicUnits",
    "ByteConstraint",
    "ByteDFA",
    "ByteGrammar",
    "ByteJsonSchema",
    "BytePredicate",
    "ByteRegex",
    "ByteWFSA",
    "ConstraintError",
    "Containing",
    "Ending",
    "FiniteSet",
    "Length",
    "MatcherError",
    "MaxBytes",
    "PartialRegex",
    "StopStrings",
    "Utf8",
    "approximate_automaton",
    "from_genlm",
]
