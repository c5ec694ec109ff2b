"""One forward over part of a context tree: host plans in, logits out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.lm.architecture import Architecture
from genlm_bytes_smc.lm.attention import Attention, Layout, MaskArray, attend
from genlm_bytes_smc.lm.contexts import ContextTree, IntArray
from genlm_bytes_smc.lm.kv_buffer import KVBuffer
from genlm_bytes_smc.lm.transfer import send
from genlm_bytes_smc.lm.tree_cache import TreeCache


class TreeForward:
    """A transformers model with the keys and values of a context tree.

    Args:
        model: a transformers causal language model.
        architecture: how it is to be run.
        tree: the contexts.
        limit_bytes: most memory for keys and values.

    Attributes:
        cache: which contexts have entries.
        limit_slots: the most entries; unknown, and unlimited, before the first forward.
        layout: force one way of laying out keys (see `attend`); None takes the cheapest.
    """

    def __init__(
        self, model: Any, architecture: Architecture, tree: ContextTree, limit_bytes: int
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.tree = tree
        self.limit_bytes = limit_bytes
        self.limit_slots: int | None = None
        self.layout: Layout | None = None
        self.cache = TreeCache(tree)
        self._buffer = KVBuffer(architecture.layers)
        weight = model.get_input_embeddings().weight
        self._device, self._dtype = weight.device, weight.dtype

    @property
    def nbytes(self) -> int:
        """Memory that keys and values take, in bytes, room for growth and copies included."""
        return self._buffer.nbytes

    def make_room(self, wanted: IntArray, more: int) -> int:
        """Have room for `more` entries beside those of `wanted` and their ancestors.

        Returns:
            How many entries were dropped that had to make way.

        Raises:
            MemoryError: there cannot be that much room within the limit.
        """
        limit = _UNLIMITED if self.limit_slots is None else self.limit_slots
        keep = self.cache.room(wanted, more, limit)
        dropped = 0
        if keep is not None:
            dropped = self.cache.compact(keep)
            self._buffer.compact(keep)
        self._buffer.reserve(self.cache.used + more, self.cache.used, limit)
        self.cache.touch(wanted)
        return dropped

    @torch.inference_mode()
    def run(self, nodes: list[int], fresh: int, asked: IntArray) -> torch.Tensor:
        """Run contexts' last tokens through the model; the first `fresh` get entries.

        Args:
            nodes: T contexts, as in a `Work` (or a stretch of one).
            fresh: how many of them have no entry yet.
            asked: positions in `nodes` whose rows are wanted, int64[R].

        Returns:
            Logits float[R, width] in the model's dtype, an inference tensor.
        """
        ids = np.array(nodes, dtype=np.int64)
        depth = self.tree.depth[ids]
        attention = attend(
            self.cache,
            self.cache.segments(nodes, fresh),
            depth,
            window=self.architecture.sliding,
            always_mask=self.architecture.eager,
            layout=self.layout,
            most_copied=self.limit_slots,
        )
        batched = attention.layout == "rows"
        inputs = self._inputs(self.tree.token[ids], depth - 1, batched)
        in_order = len(asked) == len(nodes) and bool((asked == np.arange(len(asked))).all())
        if not in_order and not batched and self.architecture.row_index:
            inputs["logits_to_keep"] = send(asked, self._device)
            in_order = True
        self._buffer.prepare(self.cache.used, len(nodes), attention)
        logits: torch.Tensor = self.model(
            attention_mask=self._masks(attention),
            past_key_values=self._buffer,
            use_cache=True,
            **inputs,
        ).logits
        self.cache.append(ids[:fresh])
        if self.limit_slots is None:
            self.limit_slots = self.limit_bytes // max(1, self._buffer.slot_cost)
        logits = logits[:, 0] if batched else logits[0]
        return logits if in_order else logits[send(asked, logits.device)]

    def clear(self) -> None:
        """Drop all entries and free their memory."""
        self.cache.clear()
        self._buffer.clear()

    def _inputs(self, tokens: IntArray, positions: IntArray, batched: bool) -> dict[str, Any]:
        both = send(np.stack([tokens, positions]), self._device)
        shape = (-1, 1) if batched else (1, -1)
        return {"input_ids": both[0].view(shape), "position_ids": both[1].view(shape)}

    def _masks(self, attention: Attention) -> Any:
        """What the model takes as its mask: None, one 4-D tensor, or one for each kind of layer."""
        if attention.full is None:
            return None
        batched = attention.layout == "rows"
        narrow = attention.full if attention.sliding is None else attention.sliding
        sliding = self._mask(narrow, batched)
        if not self.architecture.mixed:
            return sliding
        full = sliding if attention.sliding is None else self._mask(attention.full, batched)
        return {"full_attention": full, "sliding_attention": sliding}

    def _mask(self, mask: MaskArray, batched: bool) -> torch.Tensor:
        out = send(mask, self._device).to(self._dtype)
        return out[:, None, None] if batched else out[None, None]


_UNLIMITED = 1 << 40
