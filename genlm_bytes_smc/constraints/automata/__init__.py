"""Automata as flat arrays on the host, without weights: regular expressions to minimal tables.

Nothing here knows torch or potentials; `dfa.py` and `languages.py` above make constraints of the
tables. `loops_numba.py` holds the compiled loops: a change there has all compiled code made anew.
"""
