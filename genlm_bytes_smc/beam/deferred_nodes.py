"""The contexts of N lanes with deferred pruning, as arrays (see `deferred_numba`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.deferred_numba import ABOVE, CTX, NODE, TEXT
from genlm_bytes_smc.lm.contexts import IntArray

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
