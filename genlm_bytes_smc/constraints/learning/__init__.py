"""Automata of grammars and schemas, learned by asking a matcher (in the manner of Angluin 1987).

The matcher is the membership oracle, random texts stand in for the equivalence oracle, and the
observation table tells texts apart. Only `approximate_automaton` is used from outside.
"""

from genlm_bytes_smc.constraints.learning.learner import MAX_STATES, approximate_automaton

__all__ = ["MAX_STATES", "approximate_automaton"]
