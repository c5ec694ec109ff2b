"""Constraints on texts, as potentials over bytes.

    base.py                       the interface that all of them share, and its law
    dfa.py languages.py           deterministic automata; regular expressions, lists of strings
    automata/                     how their minimal tables are made
    tree.py                       constraints that remember texts: the three that follow
    matcher.py grammar.py json_schema.py json_parts.py    what llguidance decides
    predicate.py wfsa.py          Python functions; weighted automata
    learning/                     automata that approximate grammars and schemas
    product.py genlm_fsa.py       products with genlm-control's potentials, and its automata

A new constraint is a subclass of `ByteConstraint` with a case in `tests/constraints/cases.py`, on
which the tests of the interface run. Nothing here knows particles or look-ahead.
"""

from genlm_bytes_smc import alphabet as alphabet  # first: it imports genlm.control at less cost
from genlm_bytes_smc.constraints.base import ByteConstraint, ConstraintError
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.constraints.genlm_fsa import from_genlm
from genlm_bytes_smc.constraints.grammar import ByteGrammar
from genlm_bytes_smc.constraints.json_schema import ByteJsonSchema
from genlm_bytes_smc.constraints.languages import (
    AtomicUnits,
    ByteRegex,
    Containing,
    Ending,
    FiniteSet,
    Length,
    MaxBytes,
    StopStrings,
    Utf8,
)
from genlm_bytes_smc.constraints.learning import approximate_automaton
from genlm_bytes_smc.constraints.matcher import MatcherError
from genlm_bytes_smc.constraints.partial import PartialRegex
from genlm_bytes_smc.constraints.predicate import BytePredicate
from genlm_bytes_smc.constraints.wfsa import ByteWFSA

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
