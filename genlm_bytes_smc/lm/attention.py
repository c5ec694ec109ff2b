"""Which entries the positions of one forward read, and their masks: host arithmetic.

The positions of a forward see their ancestors and themselves. There are three ways to lay
the keys out for that, and `attend` takes the cheapest:

``range``   one sequence of T positions against a stretch of the buffer as it lies, dead and
            foreign entries masked: nothing is copied.
``listed``  the same against the entries that some position needs, copied together: for a
            few contexts in a buffer full of others.
``rows``    each position a batch row with its own path, copied and padded: for many long
            contexts that share little, where a T x C mask would be nearly all `-inf`.

What decides are the costs of reading and copying a key (`AttentionCosts`): fixed figures, so that
equal runs choose alike and give equal digits on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.tree_cache import Segment, TreeCache

MaskArray = npt.NDArray[np.float32]
Layout = Literal["range", "listed", "rows"]


@dataclass(frozen=True)
class AttentionCosts:
    """Nanoseconds, for one layer; all grow with the model's width, and their ratios decide.

    Attributes:
        pair: one query against one key that other queries read too.
        lone_key: one key that one query alone reads.
        copy: copying one key and value together with others of a list.
        row_key: one key of a query that has keys of its own, copied and read.
    """

    pair: float
    lone_key: float
    copy: float
    row_key: float


ON_CPU = AttentionCosts(pair=18.0, lone_key=49.0, copy=65.0, row_key=130.0)
"""Of the bundled model's keys (4 heads of 64, float32) on one core, by `benchmarks.forward`. With
them SmolLM2's layouts are as good as with figures measured for its own keys (9 heads on 3)."""

ON_GPU = AttentionCosts(pair=0.16, lone_key=2.0, copy=4.0, row_key=6.0)
"""Not measured: 32 heads on 8, of 128, bfloat16, at 2 TB/s and 100 TFLOP/s."""


def costs_on(device: torch.device) -> AttentionCosts:
    """Return the costs on a device."""
    return ON_CPU if device.type == "cpu" else ON_GPU


@dataclass(frozen=True)
class Attention:
    """What the T positions of one forward read.

    Attributes:
        layout: how the keys lie (see the module's text).
        low, high: the slots that are read lie in `[low, high)`.
        index: slots int64[C] (``listed``) or int64[T, C] (``rows``), else None.
        full: 0 where a position sees a key and `-inf` elsewhere, float32[T, C]; None if the
            plain causal rule says the same.
        sliding: the same for layers with a sliding window; None where `full` serves.
    """

    layout: Layout
    low: int
    high: int
    index: IntArray | None
    full: MaskArray | None
    sliding: MaskArray | None

    @property
    def keys(self) -> int:
        """Number of keys each position is laid against (C)."""
        return self.high - self.low if self.index is None else int(self.index.shape[-1])


def attend(
    cache: TreeCache,
    segments: Sequence[Segment],
    depth: IntArray,
    *,
    window: int | None = None,
    always_mask: bool = False,
    layout: Layout | None = None,
    most_copied: int | None = None,
    costs: AttentionCosts = ON_CPU,
) -> Attention:
    """Lay out the keys of one forward whose positions take the slots from `cache.used` on.

    Args:
        cache: where the ancestors' entries are.
        segments: the branches of the forward.
        depth: tokens of each position's context, int64[T].
        window: in sliding layers a position sees this many tokens, itself included.
        always_mask: whether to spell out even the plain causal mask.
        layout: force one; None takes the cheapest.
        most_copied: the most entries that may be copied together.
        costs: of the device.
    """
    if window is not None and int(depth.max()) <= window:
        window = None
    plan = _Plan(cache, segments, depth)
    layout = layout or plan.cheapest(most_copied, costs)
    if layout == "rows":
        return plan.rows(window)
    return plan.shared(layout, window, always_mask)


class _Plan:
    """The sizes from which a layout is chosen, and the layouts themselves."""

    def __init__(self, cache: TreeCache, segments: Sequence[Segment], depth: IntArray) -> None:
        self.cache, self.segments, self.depth = cache, segments, depth
        self.first, self.positions = cache.used, len(depth)
        self.paths = [s.path for s in segments if len(s.path)]
        self.low = min((int(p[0]) for p in self.paths), default=self.first)
        self.high = self.first + self.positions
        self.longest = max((len(p) for p in self.paths), default=0)

    def cheapest(self, most_copied: int | None, costs: AttentionCosts) -> Layout:
        """Return the layout that costs least."""
        most = np.inf if most_copied is None else most_copied
        reach = self.high - self.low
        key = max(costs.lone_key, costs.pair * self.positions)
        whole: dict[Layout, float] = {"range": reach * key}
        if reach > 2 * (self.longest + self.positions):
            listed = self.positions + self._distinct()
            if listed <= most:
                whole["listed"] = listed * (costs.copy + key)
        if self._separable():
            each = self.longest + 1
            if self.positions * each <= most:
                whole["rows"] = self.positions * each * costs.row_key
        return min(whole, key=lambda name: whole[name])

    def _separable(self) -> bool:
        """Return whether no position is another's ancestor, so that each may be a batch row."""
        return self.positions > 1 and all(
            s.parent < 0 and s.stop == s.start + 1 for s in self.segments
        )

    def _distinct(self) -> int:
        return len(self.paths[0]) if len(self.paths) == 1 else int(self._seen().sum())

    def _seen(self) -> npt.NDArray[np.bool_]:
        """Mask over slots `[low, high)`: what some position needs."""
        seen = np.zeros(self.high - self.low, dtype=bool)
        seen[self.first - self.low :] = True
        for path in self.paths:
            seen[path - self.low] = True
        return seen

    def shared(self, layout: Layout, window: int | None, always_mask: bool) -> Attention:
        """Lay out one sequence of positions against keys that all may read: range or listed."""
        index, place, keys = None, None, self.high - self.low
        if layout == "listed":
            seen = self._seen()
            index, place = np.flatnonzero(seen) + self.low, np.cumsum(seen) - 1
            keys, known = len(index), index[: len(index) - self.positions]
            causal = self.positions == 1
        else:
            known = np.arange(self.low, self.first)
            whole = len(self.segments) == 1 and self.longest == self.first - self.low
            causal = whole and (self.positions == 1 or keys == self.positions)
        if causal and window is None and not always_mask:
            return Attention(layout, self.low, self.high, index, None, None)
        full = self._mask(keys, place)
        sliding = self._slide(full, known, window)
        return Attention(layout, self.low, self.high, index, full, sliding)

    def rows(self, window: int | None) -> Attention:
        """Lay out each position as a batch row with its own path."""
        index = np.empty((self.positions, self.longest + 1), dtype=np.int64)
        index[:] = np.arange(self.first, self.high)[:, None]
        full = np.full(index.shape, -np.inf, dtype=np.float32)
        full[:, -1] = 0.0
        for i, segment in enumerate(self.segments):
            index[i, : len(segment.path)] = segment.path
            full[i, : len(segment.path)] = 0.0
        known = np.minimum(index[:, :-1], self.first - 1)
        sliding = self._slide(full, known, window)
        return Attention("rows", self.low, self.high, index, full, sliding)

    def _slide(self, full: MaskArray, known: IntArray, window: int | None) -> MaskArray | None:
        """Return `full` without the keys `window` or more tokens above a position.

        The first keys are those in the slots `known`, int64[C'] or int64[T, C']; the positions'
        own come last.
        """
        if window is None:
            return None
        own = self.depth if known.ndim == 1 else self.depth[:, None]
        key_depth = np.concatenate([self.cache.depths(known), own], axis=-1)
        far = self.depth[:, None] - key_depth >= window
        return np.where(far, np.float32(-np.inf), full)

    def _mask(self, keys: int, place: IntArray | None) -> MaskArray:
        """0 at each position's ancestors and itself, -inf elsewhere: float32[T, keys].

        The last T keys are the positions themselves; `place` maps `slot - low` to a key
        (None: they are equal).
        """
        mask = np.full((self.positions, keys), -np.inf, dtype=np.float32)
        own = keys - self.positions
        for s in self.segments:
            if s.parent >= 0:
                mask[s.start : s.stop] = mask[s.parent]
            elif len(s.path):
                mask[s.start : s.stop, _columns(s.path, self.low, place)] = 0.0
            if s.stop == s.start + 1:
                mask[s.start, own + s.start] = 0.0
            else:
                block = mask[s.start : s.stop, own + s.start : own + s.stop]
                block[np.tri(s.stop - s.start, dtype=bool)] = 0.0
        return mask


def _columns(path: IntArray, low: int, place: IntArray | None) -> slice | IntArray:
    if place is not None:
        return place[path - low]
    first, last = int(path[0]) - low, int(path[-1]) - low
    if last - first + 1 == len(path):
        return slice(first, last + 1)
    return path - low
