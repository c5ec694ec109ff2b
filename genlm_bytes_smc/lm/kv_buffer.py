"""Keys and values of the tree cache on the device.

One buffer a layer for keys and one for values, `[1, heads, capacity, head_dim]`, indexed by
the slots of `TreeCache`. A forward appends its positions at the end and reads what its
`Attention` says; the bookkeeping stays with the host.
"""

from __future__ import annotations

from typing import Any

import torch

from genlm_bytes_smc.lm.attention import Attention
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.transfer import send

_LEAST_SLOTS = 64


class _Access:
    """What the layers do in the forward at hand: shared by all of them."""

    def __init__(self) -> None:
        self.first = 0
        self.count = 0
        self.layout = "range"
        self.low = self.high = self.keys = 0
        self.index: torch.Tensor | None = None
        self.capacity = 0
        self.scratch: dict[tuple[str, torch.device], torch.Tensor] = {}


class TreeLayer:
    """Keys and values of one layer, float[1, heads, capacity, head_dim]."""

    def __init__(self, access: _Access) -> None:
        self.access = access
        self.keys: Any = None  # a tensor once there are any
        self.values: Any = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allot the memory, for keys and values like these."""
        self.keys = self._empty(key_states, self.access.capacity)
        self.values = self._empty(value_states, self.access.capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new positions' keys and values and return those that attention needs.

        Args:
            key_states, value_states: float[1, heads, T, head_dim], or [T, heads, 1, head_dim]
                where each position is a batch row.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._step("k", self.keys, key_states), self._step("v", self.values, value_states)

    def _step(self, side: str, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        access = self.access
        if access.layout == "rows":
            new = new.transpose(0, 2)
        buffer.narrow(2, access.first, access.count).copy_(new)
        if access.index is None:
            return buffer.narrow(2, access.low, access.high - access.low)
        index = access.index.to(buffer.device)
        keys = self._gather(side, buffer[0], index.flatten())
        if access.layout == "listed":
            return keys[None]
        heads, _, width = keys.shape
        return keys.view(heads, *index.shape, width).transpose(0, 1)

    def _gather(self, side: str, buffer: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """`buffer[:, index]` in memory that all layers use in turn."""
        heads, _, width = buffer.shape
        size = heads * len(index) * width
        place = self.access.scratch.get((side, buffer.device))
        if place is None or place.numel() < size or place.dtype != buffer.dtype:
            place = torch.empty(size, dtype=buffer.dtype, device=buffer.device)
            self.access.scratch[side, buffer.device] = place
        out = place[:size].view(heads, len(index), width)
        return torch.index_select(buffer, 1, index, out=out)

    def resize(self, capacity: int, keep: torch.Tensor | None, used: int) -> None:
        """Move to buffers of `capacity` slots with the entries `keep` (or the first `used`)."""
        if not self.is_initialized:
            return
        for side in ("keys", "values"):
            old = getattr(self, side)
            stay = (
                old.narrow(2, 0, used) if keep is None else old.index_select(2, keep.to(old.device))
            )
            new = old if capacity == old.shape[2] else self._empty(old, capacity)
            new.narrow(2, 0, stay.shape[2]).copy_(stay)
            setattr(self, side, new)

    @property
    def slot_bytes(self) -> int:
        """Bytes that one slot takes in this layer."""
        if not self.is_initialized:
            return 0
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in (self.keys, self.values))

    @staticmethod
    def _empty(like: torch.Tensor, capacity: int) -> torch.Tensor:
        # Slots are read only after they were written, so nothing needs to be there yet.
        return like.new_empty((1, like.shape[1], capacity, like.shape[3]))


class KVBuffer:
    """The buffers of all layers; `TransformersCache` is one that a transformers model takes.

    Args:
        layers: number of layers that keep keys and values.
    """

    def __init__(self, layers: int) -> None:
        self._access = _Access()
        self.layers = self._new_layers(layers)

    def _new_layers(self, count: int) -> list[TreeLayer]:
        return [TreeLayer(self._access) for _ in range(count)]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the layer's `update`."""
        return self.layers[layer_idx].update(key_states, value_states)

    def prepare(self, first: int, count: int, attention: Attention) -> None:
        """Say what the next forward writes (`count` slots from `first` on) and reads."""
        access = self._access
        access.first, access.count, access.layout = first, count, attention.layout
        access.low, access.high, access.keys = attention.low, attention.high, attention.keys
        access.index = None if attention.index is None else self._to_device(attention.index)

    def _to_device(self, index: IntArray) -> torch.Tensor:
        keys = self.keys
        return torch.from_numpy(index) if keys is None else send(index, keys.device)

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of the first layer, [1, heads, capacity, head_dim]; None before there are any."""
        keys: torch.Tensor | None = self.layers[0].keys
        return keys

    @property
    def slot_cost(self) -> int:
        """Bytes that one slot takes over all layers (0 before the first forward).

        One layer's share comes on top, for the copies made while reading and growing.
        """
        each: list[int] = [layer.slot_bytes for layer in self.layers]
        return sum(each) + max(each, default=0)

    @property
    def nbytes(self) -> int:
        """Memory taken by entries and by copies of them, in bytes."""
        copies: int = sum(x.numel() * x.element_size() for x in self._access.scratch.values())
        each: list[int] = [layer.slot_bytes for layer in self.layers]
        return copies + self._access.capacity * sum(each)

    def reserve(self, slots: int, used: int, limit: int) -> None:
        """Make room for `slots` slots; keep the first `used`; grow by doubling up to `limit`."""
        capacity = self._access.capacity
        if slots > capacity:
            grown = min(max(2 * capacity, _LEAST_SLOTS), limit)
            self._resize(max(slots, grown), None, used)

    def compact(self, keep: IntArray) -> None:
        """Move the entries in slots `keep`, int64[m] ascending, to the front."""
        self._resize(self._access.capacity, torch.from_numpy(keep), 0)

    def clear(self) -> None:
        """Free the memory."""
        self._access.capacity = 0
        self._access.scratch.clear()
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    @torch.inference_mode()
    def _resize(self, capacity: int, keep: torch.Tensor | None, used: int) -> None:
        self._access.capacity = capacity
        self._access.scratch.clear()
        for layer in self.layers:
            layer.resize(capacity, keep, used)
