"""What the host knows of states whose tensors are on another device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.weak import WeakIdKeyDictionary

from genlm_bytes_smc.beam.state import BeamState
from genlm_bytes_smc.lm.contexts import IntArray


class HostSide:
    """What the host knows of states' tensors; forgotten when a tensor dies.

    States are values: nobody writes into their tensors, and a state's `logw` is never
    combined with another one's `node`. That makes the tensors themselves the keys.

    Attributes:
        contexts: of `ctx` tensors, int64[N, C].
        nodes: of `logw` tensors, int64[N, C], -1 where the weight is -inf.
        log_z: of `logw` tensors, float64[N].
    """

    def __init__(self) -> None:
        self.contexts, self.nodes, self.log_z = (WeakIdKeyDictionary() for _ in range(3))

    def pairs(self, old: BeamState, new: BeamState) -> list[tuple[WeakIdKeyDictionary, Any, Any]]:
        """Return what is known on the host, and under which tensors of the two states."""
        return [
            (self.contexts, old.ctx, new.ctx),
            (self.nodes, old.logw, new.logw),
            (self.log_z, old.logw, new.logw),
        ]


def distinct(slots: IntArray) -> tuple[IntArray, IntArray]:
    """Return the distinct values and each one's place among them; small integers, not sorted."""
    seen = np.zeros(int(slots.max(initial=-1)) + 1, dtype=bool)
    seen[slots] = True
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[slots]


def widen(known: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Return an array of the host side with empty places up to `width` (totals as they are)."""
    if known.ndim == 1:
        return known
    return np.pad(known, ((0, 0), (0, width - known.shape[1])), constant_values=-1)
