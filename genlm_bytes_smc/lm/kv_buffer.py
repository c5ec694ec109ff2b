"""Keys and values of the tree cache on the device; the bookkeeping stays with the host."""

from __future__ import annotations

from typing import Any

import torch

from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.lm.tree_cache import Attention

_LEAST_SLOTS = 64
_FIRST_SHARE = 8  # a GPU's buffer begins with this part of its limit, as growing it costs much


class KVBuffer:
    """One buffer a layer for keys and one for values, indexed by the slots of `TreeCache`.

    A forward appends its positions at the end and reads what its `Attention` says.

    Args:
        layers: number of layers that keep keys and values.

    Attributes:
        layers: keys and values of each, float[1, heads, capacity, head_dim], once there are any.
        version: changes whenever the keys and values are put elsewhere in memory.
    """

    def __init__(self, layers: int) -> None:
        self.layers: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self.version = 0
        self._capacity = 0
        self._attention: Attention | None = None
        self._index: torch.Tensor | None = None
        self._scratch: dict[tuple[str, torch.device], torch.Tensor] = {}

    def prepare(self, attention: Attention) -> None:
        """Say what the next forward writes and reads."""
        self._attention = attention
        keys, index = self.keys, attention.index
        device = torch.device("cpu") if keys is None else keys.device
        self._index = None if index is None else send(index, device)

    def allot(self, heads: int, width: int, like: torch.Tensor) -> None:
        """Make the buffers, on the device and in the dtype of `like`, where there are none."""
        for layer in self.layers:
            if not layer:
                layer += like.new_empty(2, 1, heads, self._capacity, width)
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
        if not layer:
            layer += [_empty(new, self._capacity) for new in (key_states, value_states)]
        return self._step("k", layer[0], key_states), self._step("v", layer[1], value_states)

    def _step(self, side: str, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        attention, index = self._attention, self._index
        assert attention is not None
        if attention.layout == "rows":
            new = new.transpose(0, 2)
        buffer[:, :, attention.first : attention.high].copy_(new)
        if index is None:
            return buffer[:, :, attention.low : attention.high]
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
        return next(iter(self.layers[0]), None)

    @property
    def slot_cost(self) -> int:
        """Bytes that one slot takes over all layers (0 before the first forward).

        One layer's share comes on top, for the copies made while reading and growing.
        """
        each = self._slot_bytes()
        return sum(each) + max(each, default=0)

    @property
    def nbytes(self) -> int:
        """Memory taken by entries and by copies of them, in bytes."""
        copies = sum(x.numel() * x.element_size() for x in self._scratch.values())
        return copies + self._capacity * sum(self._slot_bytes())

    def _slot_bytes(self) -> list[int]:
        """Return the bytes that one slot takes in each layer."""
        return [
            sum(x.shape[1] * x.shape[3] * x.element_size() for x in layer) for layer in self.layers
        ]

    # -- making room -------------------------------------------------------------------

    def reserve(self, slots: int, used: int, limit: int) -> None:
        """Make room for `slots` slots; keep the first `used`; grow by doubling up to `limit`."""
        if slots > self._capacity:
            keys = self.keys
            on_host = keys is None or keys.device.type == "cpu"
            least = _LEAST_SLOTS if on_host else max(_LEAST_SLOTS, limit // _FIRST_SHARE)
            self._resize(max(slots, min(max(2 * self._capacity, least), limit)), slice(used))

    def compact(self, keep: IntArray) -> None:
        """Move the entries in slots `keep`, int64[m] ascending, to the front."""
        self._resize(self._capacity, torch.from_numpy(keep))

    def clear(self) -> None:
        """Free the memory."""
        self._capacity = 0
        self.version += 1
        self._scratch.clear()
        for layer in self.layers:
            layer.clear()

    @torch.inference_mode()
    def _resize(self, capacity: int, keep: slice | torch.Tensor) -> None:
        """Move to buffers of `capacity` slots, with the entries in the slots `keep` first."""
        self.version += capacity != self._capacity
        self._capacity = capacity
        self._scratch.clear()
        for layer in self.layers:
            for i, old in enumerate(layer):  # the old one is freed before the next one is made
                stay = old[:, :, keep]
                layer[i] = old if capacity == old.shape[2] else _empty(old, capacity)
                layer[i].narrow(2, 0, stay.shape[2]).copy_(stay)


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
            at = self._attention
            return 0 if at is None else max(at.keys - (at.high - at.first), 0)

        def get_max_length(self, layer_idx: int | None = None) -> int:
            """Return -1: there is no limit of its own."""
            return -1

        get_max_cache_shape = get_max_length  # its name in early versions of transformers 5

    return TransformersBuffer(layers)
