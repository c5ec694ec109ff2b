"""The `KVBuffer` as the cache that transformers' modules take."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, CacheLayerMixin

from genlm_bytes_smc.lm.kv_buffer import KVBuffer, TreeLayer


class _CacheLayer(TreeLayer, CacheLayerMixin):  # type: ignore[misc]
    """One layer with what transformers asks of it."""

    is_sliding = False  # windows are in the masks, by depth; the buffer keeps everything

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return the number of keys that `update` will return, and the offset of the first."""
        return self.access.keys, 0

    def get_seq_length(self) -> int:
        """Return the number of keys before the new positions."""
        return max(self.access.keys - self.access.count, 0)

    def get_max_length(self) -> int:
        """Return -1: there is no limit of its own."""
        return -1

    get_max_cache_shape = get_max_length  # its name in early versions of transformers 5


# What a version of transformers may ask for beside these, only its own modules call, and a small
# tree is tried before they are trusted; a forward that is written out needs none of it.
_CacheLayer.__abstractmethods__ = frozenset()


class TransformersCache(KVBuffer, Cache):  # type: ignore[misc]
    """The buffers of all layers, as the cache that a transformers model is given.

    Args:
        layers: number of layers that keep keys and values.
    """

    def __init__(self, layers: int) -> None:
        KVBuffer.__init__(self, layers)
        Cache.__init__(self, layers=self.layers)
        self._flags = [False] * layers

    def _new_layers(self, count: int) -> list[TreeLayer]:
        return [_CacheLayer(self._access) for _ in range(count)]

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops old entries."""
        return self._flags

    @property
    def is_linear(self) -> list[bool]:
        """No layer is recurrent."""
        return self._flags

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer is real."""
        return self._flags
