"""Constraints on texts, as potentials over bytes.

    base.py                   the interface that all of them share, and its law; products
    dfa.py languages.py       deterministic automata; regular expressions, lists of strings
    automata/                 how their minimal tables are made
    tree.py                   constraints that remember texts: the four that follow
    matcher.py json_schema.py     what llguidance decides: grammars, schemas
    predicate.py wfsa.py      Python functions, patterns without automata; weighted automata
    learning.py learning_table.py     automata that approximate grammars and schemas

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
