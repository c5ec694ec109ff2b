"""Nondeterministic automata, and the deterministic ones that they become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from genlm_bytes_smc.constraints.automata import loops_numba as compiled
from genlm_bytes_smc.constraints.automata.table import (
    MAX_STATES,
    MOST,
    Deadline,
    OutgrownError,
    SparseTable,
    Table,
    empty_language,
    grouped,
    minimal_of_arcs,
    too_large,
)
from genlm_bytes_smc.constraints.base import IntArray

_SLICE = 20_000_000  # members between two looks at the clock


@dataclass
class Nfa:
    """A nondeterministic automaton, grown state by state. State 0 is the start.

    A label is a sequence of symbols; an arc carries the number of a label, so that many arcs
    share one.

    Attributes:
        labels: the symbols of each label.
        n_states: how many states there are.
        silent: (state, state) of each silent step.
        arcs: (state, label, state) of each arc.
        accept: the states that accept.
        limit: most states of the minimal automaton; four times as many are allowed here.
    """

    labels: Sequence[Sequence[int]] = ()
    n_states: int = 0
    silent: list[tuple[int, int]] = field(default_factory=list)
    arcs: list[tuple[int, int, int]] = field(default_factory=list)
    accept: set[int] = field(default_factory=set)
    limit: int = MAX_STATES

    def state(self) -> int:
        """Add a state, and return its number.

        Raises:
            ConstraintError: there are four times `limit` states already.
        """
        if self.n_states >= 4 * self.limit:
            raise too_large(self.limit)
        self.n_states += 1
        return self.n_states - 1


def determinize(nfa: Nfa, deadline: Deadline | None = None) -> Table:
    """Return the minimal automaton of the same language.

    The states that no text finishes are left out first, so every subset that is numbered can
    finish. There may be four times as many subsets as states in the end (a prefix tree has
    many more than the automaton of its words).

    Raises:
        ConstraintError: the language is empty, more than `nfa.limit` states are needed, or the
            construction takes too much time or memory.
    """
    deadline = deadline or Deadline()
    arrays = _arrays(nfa)
    n_symbols = int(arrays.symbols.max(initial=-1)) + 1
    found = _room(len(arrays.accept))
    while (code := compiled.subsets(arrays, found, n_symbols, _SLICE)) != compiled.DONE:
        deadline.check()
        if found.counts[0] > 4 * nfa.limit:
            raise too_large(nfa.limit)
        if code != compiled.SLICE:
            found = _enlarged(found, code)
    states, arcs = found.counts[:2].tolist()
    if states > 4 * nfa.limit:
        raise too_large(nfa.limit)
    deterministic = SparseTable(
        found.source[:arcs].astype(np.int64),
        found.symbol[:arcs].astype(np.int64),
        found.arc_target[:arcs].astype(np.int64),
        found.accept[:states],
        n_symbols,
    )
    return minimal_of_arcs(deterministic, nfa.limit)


def _arrays(nfa: Nfa) -> compiled.NfaArrays:
    """Return the states that can finish, as flat arrays."""
    n = nfa.n_states
    silent_source, silent = _flat(nfa.silent).reshape(-1, 2).T
    source, label, target = _flat(nfa.arcs).reshape(-1, 3).T
    accept = np.zeros(n, dtype=np.bool_)
    accept[list(nfa.accept)] = True
    symbols_of = np.array([len(symbols) for symbols in nfa.labels], dtype=np.int64)
    reads = symbols_of[label] > 0
    source, label, target = source[reads], label[reads], target[reads]

    backwards = np.concatenate([silent, target]), np.concatenate([silent_source, source])
    useful = compiled.reach(*grouped(*backwards, n), np.flatnonzero(accept))
    if not useful[0]:
        raise empty_language()
    step, arc = useful[silent], useful[target]  # what leads to a useful state comes from one
    name = np.cumsum(useful) - 1
    silent_offset, silent = grouped(name[silent_source[step]], name[silent[step]], useful.sum())
    source, label, target = name[source[arc]], label[arc], name[target[arc]]
    arc_offset, order = grouped(source, np.arange(len(source)), useful.sum())
    label, target = label[order], target[order]
    before = np.append(0, np.cumsum(symbols_of[label]))
    return compiled.NfaArrays(
        silent_offset,
        silent,
        arc_offset,
        label,
        target,
        np.append(0, np.cumsum(symbols_of)),
        _flat(nfa.labels),
        before[arc_offset[1:]] - before[arc_offset[:-1]],
        accept[useful],
        np.random.default_rng(0).integers(2**64, size=useful.sum(), dtype=np.uint64),
    )


def _flat(lists: Iterable[Sequence[int]]) -> IntArray:
    return np.fromiter(chain.from_iterable(lists), dtype=np.int64)


def _room(n: int) -> compiled.Subsets:
    """Make room for the first subsets of an automaton of `n` states."""
    return compiled.Subsets(
        members=np.empty(2 * n, dtype=np.int32),
        offset=np.zeros(1025, dtype=np.int64),
        hashes=np.empty(1024, dtype=np.uint64),
        accept=np.empty(1024, dtype=np.bool_),
        source=np.empty(1024, dtype=np.int32),
        symbol=np.empty(1024, dtype=np.int32),
        arc_target=np.empty(1024, dtype=np.int32),
        slots=np.empty(4096, dtype=np.int32),
        cells=np.empty((2, 1024), dtype=np.int64),
        counts=np.zeros(4, dtype=np.int64),
    )


def _enlarged(found: compiled.Subsets, what: int) -> compiled.Subsets:
    """Return a copy with at least twice as much room in the arrays that lack it."""
    wanted = int(found.counts[3])
    if wanted > MOST:
        raise OutgrownError(
            f"the construction of the automaton goes over more than {MOST} members of subsets or "
            "arcs, which takes too much memory; write a smaller constraint"
        )
    fields = {
        compiled.MEMBERS: ("members",),
        compiled.STATES: ("offset", "hashes", "accept", "slots"),
        compiled.ARCS: ("source", "symbol", "arc_target"),
        compiled.CELLS: ("cells",),
    }[what]
    larger = {}
    for name in fields:
        old = getattr(found, name)
        more = list(old.shape)
        more[-1] = max(len(old) if name == "slots" else wanted, old.shape[-1])
        larger[name] = np.concatenate([old, np.zeros(more, dtype=old.dtype)], axis=-1)
    return found._replace(**larger)
