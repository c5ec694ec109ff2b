"""What a device does for N byte beams between two forwards of the language model: `Kernels`.

There is one implementation a device: `kernels_host` on a CPU, `kernels_torch` elsewhere. A kernel
set holds the trie's arrays and looks rows up in a `RowStore`; states go in and come out in its own
kind of arrays. Nothing here waits for the language model: a step for which rows are missing says
which, and is called again when they are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.rng import KeyArray
from genlm_bytes_smc.beam.rules import Rules
from genlm_bytes_smc.beam.state import Extensions, FloatArray, SharedLanes, State
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.rows import RowStore

NOTHING: IntArray = np.empty(0, dtype=np.int64)

Limits = tuple[int, int]


class Look(NamedTuple):
    """What is known of lanes before they read a symbol.

    Attributes:
        extended: the candidates and their admitted token-ending extensions; None: not yet known.
        dropped: float64[N], log mass of the extensions left out, nats.
        row: float64[N, 257], log probabilities of the next symbol, if asked for.
        missing: int64[m], contexts whose rows are missing; unless it is empty `row` says nothing.
        roots: what kernels keep of it for the next look.
    """

    extended: State | None
    dropped: FloatArray
    row: torch.Tensor | None = None
    missing: IntArray = NOTHING
    roots: Any = None


@dataclass
class Ahead:
    """What is known of lanes before they read on; found once, when first asked for."""

    look: Look | None = None


class Read(NamedTuple):
    """One symbol read in every lane.

    Attributes:
        state: the candidates, best first.
        log_z: float64[N], their weights, nats; -inf where none could read the symbol. Of a text
            that ended, its own.
        log_dropped: float64[N], log of all the mass dropped so far, nats.
        missing: int64[m], contexts whose rows are missing; unless it is empty the rest says
            nothing.
        look: of the new state, as far as it is known.
    """

    state: State
    log_z: FloatArray
    log_dropped: FloatArray
    missing: IntArray = NOTHING
    look: Look | None = None


class Texts(NamedTuple):
    """Texts that are known, a line each.

    Attributes:
        lines: uint8[N, L].
        lengths: int64[N].
        known: int64[N, L + 1], for each number of bytes a context that has read so many, -1 where
            none is known; filled in while they are read. An id may have been freed and be another
            context's by now: nothing but what is fetched early depends on it.
    """

    lines: npt.NDArray[np.uint8]
    lengths: IntArray
    known: IntArray

    @classmethod
    def of(cls, texts: list[bytes]) -> Texts:
        """Return the texts, of which nothing is known."""
        lengths = np.array([len(t) for t in texts], dtype=np.int64)
        longest = int(lengths.max(initial=0))
        flat = bytearray().join(t.ljust(longest, b"\0") for t in texts)
        lines = np.frombuffer(flat, dtype=np.uint8).reshape(len(texts), longest)
        return cls(lines, lengths, np.full((len(texts), longest + 1), -1, dtype=np.int64))


class Run(NamedTuple):
    """Texts read with the rows at hand.

    Attributes:
        state, log_z, log_dropped: after the last byte for which nothing was missing.
        read: how many bytes were read then, in all.
        missed: int64[m], contexts whose rows were missed from there on.
        at: int64[m], at which byte each was missed, ascending.
        ends: whether the likeliest symbol is then the end of the text, if such are followed.
    """

    state: State
    log_z: FloatArray
    log_dropped: FloatArray
    read: int
    missed: IntArray
    at: IntArray
    ends: bool = False


class Lanes(SharedLanes):
    """N lanes as kernels take them: see `ByteLanes`."""

    state: State
    log_dropped: FloatArray
    rules: Rules


class Kernels(Protocol):
    """Arithmetic of beams on one device.

    `cut` is a sorted int64 array of trie positions that are no text (end-of-sequence tokens).
    Every context of a state must have its row when a part of a step is called; whole steps say
    which rows are missing.
    """

    store: RowStore

    # -- whole steps -------------------------------------------------------------------

    def look(self, lanes: Lanes, known: Look | None, *, row: bool) -> Look:
        """Extend the candidates, unless `known` has them, and find their rows if asked to."""

    def step(self, lanes: Lanes, look: Look, symbols: IntArray) -> Read:
        """Read one symbol int64[N] a lane in the candidates that `look` has extended, and prune.

        256 ends a text, -1 reads nothing: both empty the lane.
        """

    def read(self, lanes: Lanes, byte: IntArray, *, prune: bool = False) -> Read:
        """Read one byte int64[N] a lane (-1 empties it), after pruning if told so; prune no more.

        With top-K pruning the threshold on extensions is taken against the candidates that can
        read the byte.
        """

    def prune(self, lanes: Lanes) -> Read:
        """Keep at most `rules.k` candidates a lane, best first; read nothing."""

    def run_texts(
        self, lanes: Lanes, texts: Texts, start: int, limits: Limits, *, by_steps: bool, sure: Any
    ) -> Run:
        """Read texts, one a lane, from byte `start` on with the rows at hand; see `texts_numba`.

        Args:
            limits: bytes to go on after the first missing row, and after the first guess.
            by_steps: whether to extend and prune as `step` does, or as `read` after pruning.
            sure: `deferred_nodes.Held`, extensions that are not thinned; or None.
        """

    def follow_likeliest(self, lanes: Lanes, steps: int) -> tuple[Run, bytes] | None:
        """Prune, take the likeliest byte and read it, up to `steps` times, in one lane.

        Returns how far that went until a row was missing, and the bytes; None where it is not
        done in one go.
        """

    # -- states ------------------------------------------------------------------------

    def single(self, context: int, logw: float, key: KeyArray) -> State:
        """One candidate a lane: `context`, at the root, of weight `logw`."""

    def contexts(self, state: State) -> IntArray:
        """Context ids on the host, any shape, -1 for empty places."""

    def nodes(self, state: State) -> IntArray:
        """Trie nodes on the host, int64[N, C], -1 for empty places."""

    def log_z(self, state: State) -> FloatArray:
        """Log of each lane's total weight, float64[N], on the host."""

    def gather(self, state: State, lanes: IntArray) -> State:
        """Return the lanes `lanes` int64[M], in that order, repeats allowed."""

    def cat(self, states: list[State]) -> State:
        """All lanes of several states."""

    # -- parts of steps, for what is seldom done ----------------------------------------

    def extensions(self, state: State, cut: IntArray) -> Extensions:
        """Every token-ending extension, none left out."""

    def extend(self, state: State, ext: Extensions, contexts: IntArray) -> State:
        """Append extensions, whose new contexts are given, as further candidates."""

    def advance(self, state: State, byte: IntArray, cut: IntArray) -> State:
        """Read one byte int64[N] a lane; -1 empties the lane. Keys stay as they are."""

    def reweigh(self, state: State, cut: IntArray) -> State:
        """Return the same candidates with their weights under another `cut`."""

    def select(self, state: State, k: int | None, log_threshold: float) -> tuple[State, FloatArray]:
        """Top-K and threshold pruning, which never drops a lane's best candidate, best first;
        and the log mass dropped, float64[N]."""


def children(kernels: Kernels, state: State, ext: Extensions) -> IntArray:
    """Return the contexts of the extensions of a state, int64[E]; new ones are made."""
    contexts = kernels.contexts(state)
    tree = kernels.store.engine.tree
    return tree.children(contexts[ext.lane, ext.cand], ext.token)


async def commit(kernels: Kernels, state: State, ext: Extensions) -> State:
    """Return `state` with the extensions as candidates, their rows fetched."""
    if len(ext.lane) == 0:
        return state
    new = children(kernels, state, ext)
    await kernels.store.ensure(np.concatenate([kernels.contexts(state).ravel(), new]))
    return kernels.extend(state, ext, new)


def put_lanes(kernels: Kernels, state: State, lanes: IntArray, new: State) -> State:
    """`state` with its lanes `lanes` int64[M] replaced by the M lanes of `new`, keys kept."""
    both = kernels.cat([state, new])
    index = np.arange(len(state.key))
    index[lanes] = len(state.key) + np.arange(len(lanes))
    return kernels.gather(both, index)._replace(key=state.key)
