"""The contexts of N lanes with deferred pruning, as arrays (see `deferred_numba`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.deferred_numba import (
    ABOVE,
    CTX,
    FLIGHT,
    NODE,
    OWN,
    PARENT,
    POS,
    TEXT,
    TOKEN,
    WEIGHT,
)
from genlm_bytes_smc.beam.state import HostState
from genlm_bytes_smc.lm.contexts import ContextTree, IntArray

FloatArray = npt.NDArray[np.float64]


@dataclass(eq=False)
class Nodes:
    """The nodes of N lanes, see `deferred_numba`; the methods change them in place.

    Attributes:
        ints, floats: int64[N, C, 6] and float64[N, C, 4].
        count, length: int64[N], nodes and bytes of each lane.
        text: uint8[N, TEXT], byte i of a lane at i % TEXT.
    """

    ints: IntArray
    floats: FloatArray
    count: IntArray
    length: IntArray
    text: npt.NDArray[np.uint8]

    @classmethod
    def first(cls, n: int, context: int) -> Nodes:
        """Return the nodes of n lanes that have read nothing after `context`."""
        ints = np.full((n, 16, 6), -1, dtype=np.int64)
        ints[:, 0] = [context, -1, -1, 0, -1, 0]
        floats = np.zeros((n, 16, 4))
        floats[:, 0] = 1.0
        one = np.ones(n, dtype=np.int64)
        return cls(ints, floats, one, one - 1, np.zeros((n, TEXT), dtype=np.uint8))

    @classmethod
    def of_ends(
        cls, n: int, lanes: IntArray, contexts: IntArray, token: int, own: FloatArray
    ) -> Nodes:
        """Return the nodes of n lanes in which `token` has just ended after each of m contexts.

        Args:
            n: number of lanes.
            lanes: int64[m], ascending.
            contexts: int64[m].
            token: the same for all.
            own: float64[m], their weights over the scale of their lane.
        """
        nodes = cls.first(n, 0)
        nodes.count[:] = 0
        nodes.make_room(int(np.bincount(lanes, minlength=1).max(initial=0)))
        at = np.arange(len(lanes)) - np.searchsorted(lanes, lanes)
        nodes.ints[lanes, at] = [-1, -1, token, 0, -1, -1]
        nodes.ints[lanes, at, ABOVE] = contexts
        nodes.floats[lanes, at] = [1.0, 0.0, 0.0, 0.0]
        nodes.floats[lanes, at, OWN] = own
        nodes.count += np.bincount(lanes, minlength=n)
        return nodes

    def candidates(self, tree: ContextTree, log_scale: FloatArray) -> HostState:
        """Return the tokens in flight and the contexts that end with the text as a beam's state.

        Args:
            tree: of the contexts; new ones may be made.
            log_scale: float64[N], log of what the weights are in units of, nats.
        """
        ints = self.ints.copy()
        end = self.used & (ints[:, :, POS] == self.length[:, None])
        new = end & (ints[:, :, CTX] < 0)
        with tree.one_thread:
            ints[new, CTX] = tree.children(ints[new, ABOVE], ints[new, TOKEN])
        shown = end | self.live
        with np.errstate(divide="ignore"):
            logu = np.log(np.where(end, self.floats[:, :, OWN], self.floats[:, :, WEIGHT]))
            flight = np.log(np.where(end, 1.0, self.floats[:, :, FLIGHT]))
        logu = np.where(shown, logu, -np.inf) + log_scale[:, None]
        logw = logu + flight
        return HostState.of(
            ctx=np.where(shown, ints[:, :, CTX], -1),
            node=np.where(shown, np.where(end, 0, ints[:, :, NODE]), -1),
            logu=logu,
            logw=logw,
            key=np.zeros(len(logw), dtype=np.uint64),
        )

    def in_flight(self, tree: ContextTree, log_scale: FloatArray) -> HostState:
        """Return what other prunings take for candidates: tokens in flight, or ending here.

        A context that ends with the text is part of the token in flight that ends there.

        Args:
            tree, log_scale: see `candidates`.
        """
        ints, floats = self.ints.copy(), self.floats
        end = self.used & (ints[:, :, POS] == self.length[:, None])
        flying = self.live & ~end
        parent = np.maximum(ints[:, :, PARENT], 0)
        part = end & (ints[:, :, PARENT] >= 0) & np.take_along_axis(flying, parent, axis=1)
        weight = np.where(flying, floats[:, :, WEIGHT] * floats[:, :, FLIGHT], 0.0)
        lanes, places = np.nonzero(part)
        np.add.at(weight, (lanes, parent[lanes, places]), floats[lanes, places, OWN])
        alone = end & ~part
        weight = np.where(alone, floats[:, :, OWN], weight)
        new = alone & (ints[:, :, CTX] < 0)
        with tree.one_thread:
            ints[new, CTX] = tree.children(ints[new, ABOVE], ints[new, TOKEN])
        shown = weight > 0
        with np.errstate(divide="ignore"):
            logu = np.log(np.where(alone, floats[:, :, OWN], floats[:, :, WEIGHT]))
            logw = np.log(weight) + log_scale[:, None]
        return HostState.of(
            ctx=np.where(shown, ints[:, :, CTX], -1),
            node=np.where(shown, np.where(alone, 0, ints[:, :, NODE]), -1),
            logu=np.where(shown, logu, -np.inf) + log_scale[:, None],
            logw=logw,
            key=np.zeros(len(logw), dtype=np.uint64),
        )

    def take(self, lanes: IntArray) -> Nodes:
        """Return a copy of some lanes."""
        most = int(self.count[lanes].max(initial=1))
        return Nodes(
            self.ints[lanes, :most],
            self.floats[lanes, :most],
            self.count[lanes],
            self.length[lanes],
            self.text[lanes],
        )

    @property
    def used(self) -> npt.NDArray[np.bool_]:
        """Places that hold a node, bool[N, C]."""
        used: npt.NDArray[np.bool_] = np.arange(self.ints.shape[1]) < self.count[:, None]
        return used

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """Nodes with a row and a token in flight, bool[N, C]."""
        live: npt.NDArray[np.bool_] = self.used & (self.ints[:, :, NODE] >= 0)
        return live

    def contexts(self) -> IntArray:
        """Return the ids of all contexts that the nodes name, int64[m]."""
        named = self.ints[self.used][:, [CTX, ABOVE]].ravel()
        return named[named >= 0]

    def put(self, lanes: IntArray, new: Nodes) -> Nodes:
        """Return a copy with the lanes `lanes` replaced by those of `new`."""
        if len(lanes) == len(self.count):
            return new
        out = self.take(np.arange(len(self.count)))
        out.make_room(new.ints.shape[1] - int(out.count.max(initial=0)))
        out.ints[lanes, : new.ints.shape[1]] = new.ints
        out.floats[lanes, : new.floats.shape[1]] = new.floats
        out.count[lanes], out.length[lanes], out.text[lanes] = new.count, new.length, new.text
        return out

    @classmethod
    def cat(cls, parts: list[Nodes]) -> Nodes:
        """Return the lanes of several."""
        room = max(x.ints.shape[1] for x in parts)
        wide = [((0, 0), (0, room - x.ints.shape[1]), (0, 0)) for x in parts]
        pairs = list(zip(parts, wide, strict=True))
        return cls(
            np.concatenate([np.pad(x.ints, w, constant_values=-1) for x, w in pairs]),
            np.concatenate([np.pad(x.floats, w) for x, w in pairs]),
            np.concatenate([x.count for x in parts]),
            np.concatenate([x.length for x in parts]),
            np.concatenate([x.text for x in parts]),
        )

    def make_room(self, more: int) -> None:
        """Make places for `more` further nodes a lane."""
        lacking = int(self.count.max(initial=0)) + more - self.ints.shape[1]
        if lacking > 0:
            wide = ((0, 0), (0, lacking + 16), (0, 0))
            self.ints = np.pad(self.ints, wide, constant_values=-1)
            self.floats = np.pad(self.floats, wide)
