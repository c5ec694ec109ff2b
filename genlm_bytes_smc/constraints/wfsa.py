"""Weighted byte automata: a text weighs the sum over its paths. Automata of genlm-control.

With log weights I of starting, w of each arc and F of ending, a text s has weight
`sum over paths of I + w + ... + w + F`, and a prefix the sum over all texts that begin with
it. Weights are **pushed** when the automaton is made (Mohri 2009): with b(q) the total weight
of what can follow state q, an arc q -> r becomes w + b(r) - b(q). What a prefix needs to keep
is then one vector over states (`forward`), whose sum is the prefix weight, and the weights of
what may follow it are one product with a table:

    forward(s)[q]  float64[S]       log weight of the paths that read s and stand in q, + b(q)
    emit           float64[S, 257]  log weight of reading each byte, or ending, in q; sums to 0

All sums are taken in log space, so that no weight underflows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from genlm.control import BoolFSA
from genlm.control.potential.base import Potential
from genlm.control.potential.built_in.wfsa import WFSA

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES, N_SYMBOLS, device_of_factor, over_bytes
from genlm_bytes_smc.constraints.automata import Nfa, determinize, ragged
from genlm_bytes_smc.constraints.base import (
    BoolArray,
    ConstraintError,
    FloatArray,
    IntArray,
)
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.constraints.tree import MAX_SNAPSHOTS, TreeConstraint

Arc = tuple[int, int, int, float]
_SAFE = 1e-200
MOST_STATES = 4096


class ByteWFSA(TreeConstraint):
    """A weighted finite automaton over bytes.

    Args:
        initial: float[S], log weight of starting in each state (-inf: it does not).
        transitions: arcs (state, byte, state, log weight); several between the same two
            states on the same byte add up.
        final: float[S], log weight of ending in each state.
        device: where vectors live and weights are returned (None: the CPU).
        max_states: forward vectors held between calls, 8 S bytes each.

    Attributes:
        n_states: states of the automaton, those that lead nowhere not counted.
        log_total: log weight of all texts together; the log prefix weight of the empty text.

    Raises:
        ConstraintError: wrong shapes, states or bytes out of range, NaN or +inf weights, no
            text of positive weight, or a total weight that is infinite (it then has no prefix
            weights).
    """

    _transient = TreeConstraint._transient | {"_vectors", "_spare"}

    def __init__(
        self,
        initial: npt.ArrayLike,
        transitions: Iterable[Arc],
        final: npt.ArrayLike,
        *,
        device: torch.device | str | None = None,
        max_states: int = MAX_SNAPSHOTS,
    ) -> None:
        super().__init__(device, max_states)
        start, arcs, weight, end = _checked(initial, transitions, final)
        after = total_weights(arcs[:, 0], arcs[:, 2], weight, end)
        live = np.isfinite(after)
        if not np.isfinite(start[live]).any():
            raise ConstraintError("no text has a weight above zero")
        name = np.cumsum(live) - 1  # states that lead nowhere are left out
        useful = live[arcs[:, 0]] & live[arcs[:, 2]] & np.isfinite(weight)
        arcs, weight = arcs[useful], weight[useful]
        pushed = weight + after[arcs[:, 2]] - after[arcs[:, 0]]
        self.n_states = int(live.sum())
        emit = np.full((self.n_states, N_SYMBOLS), -np.inf)
        source, byte, target = name[arcs[:, 0]], arcs[:, 1], name[arcs[:, 2]]
        np.logaddexp.at(emit, (source, byte), pushed)
        emit[:, EOS_COLUMN] = end[live] - after[live]
        # Arcs by (byte, state): those of a pair are a range of the arrays below.
        order = np.lexsort((source, byte))
        self._offset = np.searchsorted(byte[order], np.arange(N_BYTES + 1))
        self._source, self._target = source[order], target[order]
        self._arc_weight = torch.from_numpy(pushed[order]).to(self.device)
        self._emit = torch.from_numpy(emit).to(self.device)
        self._reads = np.isfinite(emit[:, :N_BYTES])
        self._start = torch.from_numpy((start + after)[live]).to(self.device)
        self.log_total = float(torch.logsumexp(self._start, 0))

    def pushed(self) -> tuple[IntArray, IntArray, IntArray, FloatArray, FloatArray, FloatArray]:
        """Return the automaton with its weights pushed, on the host.

        Returns:
            source, byte, target int64[E] and log weight float64[E] of each arc; log weight of
            ending in each state and of starting in it, float64[S]. Arcs out of a state and its
            end add up to one.
        """
        byte = np.repeat(np.arange(N_BYTES), np.diff(self._offset))
        end = self._emit[:, EOS_COLUMN].cpu().numpy()
        weight = self._arc_weight.cpu().numpy()
        return self._source, byte, self._target, weight, end, self._start.cpu().numpy()

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Log share of the paths that stand in each state: float64[n, S], summing to one a lane.

        All -inf for a dead lane.
        """
        return self._by_node(
            state, lambda nodes: torch.log_softmax(self._forward(nodes), 1), self.n_states
        )

    # -- states ------------------------------------------------------------------------

    def log_prefix(self, state: torch.Tensor) -> torch.Tensor:
        """Log weight of all texts that begin so: int64[n] -> float64[n]."""
        return self._by_node(state, lambda nodes: torch.logsumexp(self._forward(nodes), 1))

    def _rows(self, nodes: IntArray) -> torch.Tensor:
        forward = self._forward(nodes)
        forward = forward - torch.logsumexp(forward, 1, keepdim=True)
        mass = forward.exp() @ self._emit.exp()
        rows = mass.log()
        # Sums in which terms may have underflowed are taken again in log space.
        possible = torch.isfinite(forward).double() @ torch.isfinite(self._emit).double()
        small = torch.nonzero(((mass < _SAFE) & (possible > 0)).any(1)).squeeze(1)
        for some in torch.split(small, max(1, 2**22 // self._emit.numel())):
            rows[some] = torch.logsumexp(forward[some, :, None] + self._emit, 1)
        return rows

    def _admitted(self, nodes: IntArray, symbols: IntArray) -> BoolArray:
        held = torch.isfinite(self._forward(nodes)).cpu().numpy()
        admitted: BoolArray = (held & self._reads[:, symbols].T).any(axis=1)
        return admitted

    # -- forward vectors: a snapshot is a row of one table -------------------------------

    def _forget(self) -> None:
        super()._forget()
        self._vectors = torch.empty(0, dtype=torch.float64, device=self.device)
        self._spare: list[int] = []  # rows that are free

    def _forward(self, nodes: IntArray) -> torch.Tensor:
        """Return the forward vectors of live nodes, float64[m, S], which are then held.

        They are made from those of the nearest ancestors that are held.
        """
        held, tree, wanted = self._snapshots, self.tree, nodes.tolist()
        if 0 not in held:
            held[0] = self._store(self._start[None])[0]
        missing: defaultdict[int, set[int]] = defaultdict(set)  # depth -> nodes
        for node in wanted:
            while node not in held and node not in missing[depth := int(tree.depth[node])]:
                missing[depth].add(node)
                node = int(tree.parent[node])
        for depth in sorted(missing):
            fresh = sorted(missing[depth])
            above = [held[p] for p in tree.parent[fresh].tolist()]
            held.update(zip(fresh, self._extend(above, tree.token[fresh]), strict=True))
            self.reads += len(fresh)
            for passed in missing.get(depth - 1, set()).difference(wanted):
                self._discard(held.pop(passed))
        for node in wanted:
            held.move_to_end(node)
        return self._vectors[torch.tensor([held[n] for n in wanted], device=self.device)]

    def _extend(self, rows: Sequence[int], read: IntArray) -> list[int]:
        """Return the rows of the vectors after one admitted byte each."""
        before = self._vectors[torch.tensor(rows, device=self.device)]
        first, stop = self._offset[read], self._offset[read + 1]
        arc = ragged(first, stop)
        lane = np.repeat(np.arange(len(read)), stop - first)
        at = torch.from_numpy(lane * self.n_states + self._target[arc]).to(self.device)
        came = torch.from_numpy(lane * self.n_states + self._source[arc]).to(self.device)
        weight = self._arc_weight[torch.from_numpy(arc).to(self.device)]
        return self._store(_scatter_logsumexp(before.reshape(-1)[came] + weight, at, before.shape))

    def _store(self, vectors: torch.Tensor) -> list[int]:
        short = len(vectors) - len(self._spare)
        if short > 0:
            n = len(self._vectors)
            more = vectors.new_empty((max(short, n, 16), self.n_states))
            self._vectors = torch.cat([self._vectors, more])
            self._spare += range(n, len(self._vectors))
        rows = [self._spare.pop() for _ in range(len(vectors))]
        self._vectors[torch.tensor(rows, device=self.device)] = vectors
        return rows

    def _discard(self, snapshot: int) -> None:
        self._spare.append(snapshot)

    def _facts(self) -> dict[str, str]:
        arcs = {"states": str(self.n_states), "arcs": str(len(self._source))}
        return {**arcs, "log_total": f"{self.log_total:.6g}"}


def _scatter_logsumexp(
    values: torch.Tensor, at: torch.Tensor, shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    """Log-sum-exp of the values that share a place: [m], int64[m] -> float64 of `shape`."""
    size = int(np.prod(shape))
    top = values.new_full((size,), -torch.inf).scatter_reduce_(0, at, values, "amax")
    shift = torch.where(torch.isfinite(top), top, 0.0)
    total = values.new_zeros(size).index_add_(0, at, (values - shift[at]).exp())
    return (total.log() + shift).reshape(shape)


def _checked(
    initial: npt.ArrayLike, transitions: Iterable[Arc], final: npt.ArrayLike
) -> tuple[FloatArray, IntArray, FloatArray, FloatArray]:
    """Return initial float[S], arcs int[E, 3], their log weights float[E], and final float[S]."""
    start, end = np.asarray(initial, dtype=np.float64), np.asarray(final, dtype=np.float64)
    if start.ndim != 1 or start.shape != end.shape or not len(start):
        raise ConstraintError(
            "initial and final must be log weights of the same states, [S] each, "
            f"got shapes {list(start.shape)} and {list(end.shape)}"
        )
    listed = list(transitions)
    if any(len(arc) != 4 for arc in listed):
        odd = next(arc for arc in listed if len(arc) != 4)
        raise ConstraintError(f"an arc is (state, byte, state, log weight), got {odd!r}")
    arcs = np.array([arc[:3] for arc in listed], dtype=np.int64).reshape(-1, 3)
    weight = np.array([arc[3] for arc in listed], dtype=np.float64)
    high = np.array([len(start), N_BYTES, len(start)])
    if ((arcs < 0) | (arcs >= high)).any():
        odd = listed[int(np.flatnonzero(((arcs < 0) | (arcs >= high)).any(axis=1))[0])]
        raise ConstraintError(
            f"arcs go between states 0..{len(start) - 1} on bytes 0..255, got {odd!r}"
        )
    for what, values in (("initial", start), ("transitions", weight), ("final", end)):
        if np.isnan(values).any() or (values == np.inf).any():
            raise ConstraintError(f"{what} must be log weights below +inf, got NaN or +inf in it")
    return start, arcs, weight, end


def total_weights(
    source: IntArray, target: IntArray, weight: FloatArray, final: FloatArray
) -> FloatArray:
    """Log weight of all paths from each state to an end, float64[S]; -inf where none is.

    The sums solve b = A b + F. Both sides are first divided by the weight of each state's
    best path (found by relaxing arcs, Bellman 1958), so that what is solved is near 1 whatever
    the scale of the weights, and what underflows in it is relatively nothing.

    Args:
        source, target: int64[E], the ends of each arc.
        weight: float64[E], its log weight.
        final: float64[S], log weight of ending.

    Raises:
        ConstraintError: a total is infinite, or there are more than 4096 states.
    """
    n = len(final)
    if n > MOST_STATES:
        raise ConstraintError(f"at most {MOST_STATES} weighted states are supported, got {n}")
    best = final.copy()
    for _ in range(n):
        before = best.copy()
        np.maximum.at(best, source, weight + before[target])
        if (best == before).all():
            break
    else:
        raise _infinite()
    ends = np.isfinite(best)
    used = ends[source] & ends[target] & np.isfinite(weight)
    source, target, weight = source[used], target[used], weight[used]
    name = np.cumsum(ends) - 1
    step = np.zeros((int(ends.sum()),) * 2)
    scaled = np.exp(weight + best[target] - best[source])
    np.add.at(step, (name[source], name[target]), scaled)
    last = np.exp(final[ends] - best[ends])
    try:
        total = np.linalg.solve(np.eye(len(step)) - step, last)
    except np.linalg.LinAlgError:
        raise _infinite() from None
    # A positive solution exists exactly where the series converges: every state here reaches
    # an end, so a step then loses weight somewhere on the way (Perron and Frobenius).
    if not (total > 0).all() or not np.isfinite(total).all():
        raise _infinite()
    out = np.full(n, -np.inf)
    out[ends] = best[ends] + np.log(total)
    return out


def _infinite() -> ConstraintError:
    return ConstraintError(
        "the weights of all texts add up to infinity (a cycle returns with weight one or more), "
        "so prefixes have no weight; scale the weights down"
    )


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
        nfa = Nfa(n_states=n + 1)
        nfa.silent = [(0, q + 1) for q, w in initial if w > -math.inf]
        nfa.arcs = [(q + 1, byte, r + 1) for q, byte, r, w in arcs if w > -math.inf]
        nfa.accept = {q + 1 for q, w in final if w > -math.inf}
        return ByteDFA._of(determinize(nfa), device)
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
