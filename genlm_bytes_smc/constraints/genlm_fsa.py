"""Automata of genlm-control as byte constraints of this package."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from genlm.control import BoolFSA
from genlm.control.potential.base import Potential
from genlm.control.potential.built_in.wfsa import WFSA

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.constraints.automata.nfa import Nfa, determinize
from genlm_bytes_smc.constraints.automata.table import MAX_STATES
from genlm_bytes_smc.constraints.base import ConstraintError
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.constraints.product import device_of_factor, over_bytes
from genlm_bytes_smc.constraints.wfsa import Arc, ByteWFSA


def from_genlm(fsa: WFSA, *, device: torch.device | str | None = None) -> ByteWFSA | ByteDFA:
    """Return the same weights over bytes: a `ByteWFSA` for a WFSA, a `ByteDFA` for a BoolFSA.

    Symbols may be bytes as numbers, byte strings, or characters, which become their UTF-8.

    Args:
        fsa: an automaton of genlm-control 0.4.
        device: where the tables live and weights are returned (None: the CPU).

    Raises:
        ConstraintError: not such an automaton, or a symbol that spells no bytes.
    """
    if not isinstance(fsa, WFSA):
        raise ConstraintError(
            f"expected a WFSA or BoolFSA of genlm-control, got {type(fsa).__name__}"
        )
    # States are numbered in the order they come up; `_spelled` adds those inside a symbol.
    number: defaultdict[Any, int] = defaultdict(count().__next__)
    bare = fsa.wfsa.epsremove
    initial = [(number[q], _log(w)) for q, w in bare.I]
    arcs = list(_spelled(bare, number))
    final = [(number[q], _log(w)) for q, w in bare.F]
    n = len(number)
    if isinstance(fsa, BoolFSA):
        # State 0 is a start beside the automaton's own states, which are numbered from 1 here.
        nfa = Nfa(labels=[[b] for b in range(N_BYTES)], n_states=n + 1)
        nfa.silent = [(0, q + 1) for q, w in initial if w > -math.inf]
        nfa.arcs = [(q + 1, byte, r + 1) for q, byte, r, w in arcs if w > -math.inf]
        nfa.accept = {q + 1 for q, w in final if w > -math.inf}
        return ByteDFA._of(determinize(nfa), device, MAX_STATES)
    return ByteWFSA(_vector(initial, n), arcs, _vector(final, n), device=device)


@over_bytes.register(WFSA)
def _factor(fsa: WFSA, own: Potential) -> Any:
    """Return an automaton as tables on the device of `own`; as any potential if it has none."""
    try:
        return from_genlm(fsa, device=device_of_factor(own))
    except ConstraintError:
        return over_bytes.dispatch(object)(fsa, own)


def _spelled(bare: Any, number: defaultdict[Any, int]) -> Iterator[Arc]:
    """Iterate over the arcs by bytes; symbols of one state share their first bytes."""
    for source, symbol, target, weight in bare.arcs():
        text = _as_bytes(symbol)
        here: Any = source
        for k in range(1, len(text)):
            there = (source, text[:k], "inside")
            if there not in number:
                yield number[here], text[k - 1], number[there], 0.0
            here = there
        yield number[here], text[-1], number[target], _log(weight)


def _as_bytes(symbol: Any) -> bytes:
    if isinstance(symbol, str):
        symbol = symbol.encode()
    elif isinstance(symbol, int | np.integer) and 0 <= symbol < N_BYTES:
        symbol = bytes([symbol])
    if not isinstance(symbol, bytes) or not symbol:
        raise ConstraintError(
            f"a symbol must be a byte 0..255, a byte string or a str, got {symbol!r}"
        )
    return symbol


def _log(weight: Any) -> float:
    """Return the log weight behind a Log or Boolean weight."""
    score = weight.score
    if isinstance(score, bool | np.bool_):
        return 0.0 if score else -math.inf
    return float(score)


def _vector(entries: list[tuple[int, float]], n: int) -> list[float]:
    out = [-math.inf] * n
    for q, w in entries:
        out[q] = float(np.logaddexp(out[q], w))
    return out
