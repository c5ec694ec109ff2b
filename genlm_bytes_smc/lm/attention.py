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
equal runs choose alike and give equal digests on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.tree_cache import Paths, TreeCache

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
    index: IntArray | None = None
    full: MaskArray | None = None
    sliding: MaskArray | None = None

    @property
    def keys(self) -> int:
        """Number of keys each position is laid against (C)."""
        return self.high - self.low if self.index is None else int(self.index.shape[-1])


def attend(
    cache: TreeCache,
    nodes: IntArray,
    fresh: int,
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
        nodes: the contexts of the forward, int64[T], as in a `Work`.
        fresh: how many of them, the first, have no entry yet.
        window: in sliding layers a position sees this many tokens, itself included.
        always_mask: whether to spell out even the plain causal mask.
        layout: force one; None takes the cheapest.
        most_copied: the most entries that may be copied together.
        costs: of the device.
    """
    depth, first, high = cache.tree.depth[nodes], cache.used, cache.used + len(nodes)
    if window is not None and int(depth.max()) <= window:
        window = None
    plain = window is None and not always_mask
    if plain and layout in (None, "range") and cache.is_one_text(nodes, fresh):
        return Attention("range", first, high)  # if long, its paths would take much memory
    paths = cache.paths(nodes, fresh)
    assert paths is not None
    slots = np.concatenate([paths.common, paths.own]).astype(np.int64)
    low = int(slots.min())
    seen = np.zeros(high - low, dtype=bool)
    seen[slots - low] = True
    layout = layout or _cheapest(paths, seen, most_copied, costs)
    index, keys, place = None, high - low, np.arange(high - low)
    if layout == "listed":
        index, place = np.flatnonzero(seen) + low, np.cumsum(seen) - 1
        keys = len(index)
    elif layout == "rows":
        keys = int(depth.max())
    if plain and layout != "rows" and len(nodes) == 1 and keys == depth[0]:
        return Attention(layout, low, high, index)
    # Each position sees the first entries, `common`, and some of its own: one a place of `own`.
    common, own = slots[: len(paths.common)], slots[len(paths.common) :]
    row = np.repeat(np.arange(len(nodes)), paths.length)
    if window is not None or layout == "rows":
        stops = np.cumsum(paths.length)
        above = np.arange(len(own)) + np.repeat(len(common) - stops + paths.length, paths.length)
    if layout == "rows":
        index = np.repeat(np.arange(first, high)[:, None], keys, axis=1)
        at, common_at = above.copy(), np.arange(len(common))
        at[stops - 1] = keys - 1  # the position itself comes last
        index[:, common_at], index[row, at] = common, own
    else:
        at, common_at = place[own - low], place[common - low]
    full = np.full((len(nodes), keys), -np.inf, dtype=np.float32)
    full[:, common_at] = full[row, at] = 0.0
    if window is None:
        return Attention(layout, low, high, index, full)
    near = depth[row] - above <= window
    far = depth[:, None] - np.arange(len(common)) > window
    sliding = np.full_like(full, -np.inf)
    sliding[row[near], at[near]] = 0.0
    sliding[:, common_at] = np.where(far, np.float32(-np.inf), np.float32(0.0))
    return Attention(layout, low, high, index, full, sliding)


def _cheapest(
    paths: Paths, seen: npt.NDArray[np.bool_], most_copied: int | None, costs: AttentionCosts
) -> Layout:
    """Return the layout that costs least; `seen`, bool[C]: which slots are needed of a stretch."""
    positions, reach = len(paths.depth), len(seen)
    starts = np.cumsum(paths.length) - paths.length
    new = np.add.reduceat(paths.own >= paths.first, starts)  # entries of this forward, on each path
    known = paths.depth - new
    longest = int(known.max())
    most = np.inf if most_copied is None else most_copied
    key = max(costs.lone_key, costs.pair * positions)
    whole: dict[Layout, float] = {"range": reach * key}
    if reach > 2 * (longest + positions):
        listed = int(seen.sum())
        if ((new == 1) & (known > 0)).sum() != 1:  # of several paths positions count twice
            listed += positions
        if listed <= most:
            whole["listed"] = listed * (costs.copy + key)
    each = longest + 1
    # Each may be a batch row if no position is another's ancestor.
    if positions > 1 and (new == 1).all() and positions * each <= most:
        whole["rows"] = positions * each * costs.row_key
    return min(whole, key=lambda name: whole[name])
