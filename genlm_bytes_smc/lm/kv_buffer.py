"""Keys and values of the tree cache on the device; the bookkeeping stays with the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from genlm_bytes_smc.lm.attention import Attention
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.devices import send

_LEAST_SLOTS = 64
_FIRST_SHARE = 8  # a GPU's buffer begins with this part of its limit, as growing it costs much


@dataclass
class _Layer:
    """Keys and values of one layer, float[1, heads, capacity, head_dim] once there are any."""

    keys: Any = None
    values: Any = None

    @property
    def slot_bytes(self) -> int:
        """Bytes that one slot takes in this layer."""
        if self.keys is None:
            return 0
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in (self.keys, self.values))


class KVBuffer:
    """One buffer a layer for keys and one for values, indexed by the slots of `TreeCache`.

    A forward appends its positions at the end and reads what its `Attention` says.

    Args:
        layers: number of layers that keep keys and values.

    Attributes:
        version: changes whenever the keys and values are put elsewhere in memory.
    """

    def __init__(self, layers: int) -> None:
        self.layers = [_Layer() for _ in range(layers)]
        self.version = 0
        self._capacity = self._first = self._count = 0
        self._attention: Attention | None = None
        self._index: torch.Tensor | None = None
        self._scratch: dict[tuple[str, torch.device], torch.Tensor] = {}

    def prepare(self, first: int, count: int, attention: Attention) -> None:
        """Say what the next forward writes (`count` slots from `first` on) and reads."""
        self._first, self._count, self._attention = first, count, attention
        index, keys = attention.index, self.keys
        if index is None or keys is None:
            self._index = None if index is None else torch.from_numpy(index)
        else:
            self._index = send(index, keys.device)

    def allot(self, heads: int, width: int, like: torch.Tensor) -> None:
        """Make the buffers, on the device and in the dtype of `like`, where there are none."""
        for layer in self.layers:
            if layer.keys is None:
                new = like.new_empty(2, 1, heads, self._capacity, width)
                layer.keys, layer.values = new[0], new[1]
                self.version += 1

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new positions' keys and values and return those that attention needs.

        Args:
            key_states, value_states: float[1, heads, T, head_dim], or [T, heads, 1, head_dim]
                where each position is a batch row.
            layer_idx: the layer.
            args, kwargs: taken, as transformers' caches take them.
        """
        layer = self.layers[layer_idx]
        if layer.keys is None:
            layer.keys = _empty(key_states, self._capacity)
            layer.values = _empty(value_states, self._capacity)
        return self._step("k", layer.keys, key_states), self._step("v", layer.values, value_states)

    def _step(self, side: str, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        attention, index = self._attention, self._index
        assert attention is not None
        if attention.layout == "rows":
            new = new.transpose(0, 2)
        buffer.narrow(2, self._first, self._count).copy_(new)
        if index is None:
            return buffer.narrow(2, attention.low, attention.high - attention.low)
        index = index.to(buffer.device)
        keys = self._gather(side, buffer[0], index.flatten())
        if attention.layout == "listed":
            return keys[None]
        heads, _, width = keys.shape
        return keys.view(heads, *index.shape, width).transpose(0, 1)

    def _gather(self, side: str, buffer: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """`buffer[:, index]` in memory that all layers use in turn."""
        heads, _, width = buffer.shape
        size = heads * len(index) * width
        place = self._scratch.get((side, buffer.device))
        if place is None or place.numel() < size or place.dtype != buffer.dtype:
            place = torch.empty(size, dtype=buffer.dtype, device=buffer.device)
            self._scratch[side, buffer.device] = place
        out = place[:size].view(heads, len(index), width)
        return torch.index_select(buffer, 1, index, out=out)

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
        each = [layer.slot_bytes for layer in self.layers]
        return sum(each) + max(each, default=0)

    @property
    def nbytes(self) -> int:
        """Memory taken by entries and by copies of them, in bytes."""
        copies = sum(x.numel() * x.element_size() for x in self._scratch.values())
        return copies + self._capacity * sum(layer.slot_bytes for layer in self.layers)

    # -- making room -------------------------------------------------------------------

    def reserve(self, slots: int, used: int, limit: int) -> None:
        """Make room for `slots` slots; keep the first `used`; grow by doubling up to `limit`."""
        if slots > self._capacity:
            keys = self.keys
            on_host = keys is None or keys.device.type == "cpu"
            least = _LEAST_SLOTS if on_host else max(_LEAST_SLOTS, limit // _FIRST_SHARE)
            self._resize(max(slots, min(max(2 * self._capacity, least), limit)), None, used)

    def compact(self, keep: IntArray) -> None:
        """Move the entries in slots `keep`, int64[m] ascending, to the front."""
        self._resize(self._capacity, torch.from_numpy(keep), 0)

    def clear(self) -> None:
        """Free the memory."""
        self._capacity = 0
        self.version += 1
        self._scratch.clear()
        for layer in self.layers:
            layer.keys = layer.values = None

    @torch.inference_mode()
    def _resize(self, capacity: int, keep: torch.Tensor | None, used: int) -> None:
        """Move to buffers of `capacity` slots with the entries `keep` (or the first `used`)."""
        self.version += capacity != self._capacity
        self._capacity = capacity
        self._scratch.clear()
        for layer in self.layers:
            if layer.keys is not None:
                layer.keys = _moved(layer.keys, capacity, keep, used)
                layer.values = _moved(layer.values, capacity, keep, used)


def _moved(old: torch.Tensor, capacity: int, keep: torch.Tensor | None, used: int) -> torch.Tensor:
    stay = old.narrow(2, 0, used) if keep is None else old.index_select(2, keep.to(old.device))
    new = old if capacity == old.shape[2] else _empty(old, capacity)
    new.narrow(2, 0, stay.shape[2]).copy_(stay)
    return new


def _empty(like: torch.Tensor, capacity: int) -> torch.Tensor:
    # Slots are read only after they were written, so nothing needs to be there yet.
    return like.new_empty((1, like.shape[1], capacity, like.shape[3]))


def transformers_buffer(layers: int) -> KVBuffer:
    """Return a `KVBuffer` that is the cache which transformers' modules take, too."""
    from transformers.cache_utils import Cache

    class TransformersBuffer(KVBuffer, Cache):  # type: ignore[misc]
        is_compileable = False
        # No layer is recurrent, absent or forgets: windows are in the masks, by depth.
        is_sliding = is_linear = is_dummy = (False,) * layers

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            """Return the number of keys that `update` will return, and the offset of the first."""
            return (0 if self._attention is None else self._attention.keys), 0

        def get_seq_length(self, layer_idx: int = 0) -> int:
            """Return the number of keys before the new positions."""
            return max(self.get_mask_sizes(0, layer_idx)[0] - self._count, 0)

        def get_max_length(self, layer_idx: int | None = None) -> int:
            """Return -1: there is no limit of its own."""
            return -1

        get_max_cache_shape = get_max_length  # its name in early versions of transformers 5

    return TransformersBuffer(layers)
