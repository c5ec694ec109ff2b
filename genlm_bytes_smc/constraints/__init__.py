"""Constraints on texts, as potentials over bytes."""

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
    "StopStrings",
    "Utf8",
    "approximate_automaton",
    "from_genlm",
]
