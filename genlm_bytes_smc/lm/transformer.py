"""Rows of a Hugging Face transformer with one key/value entry a context: tree attention.

All contexts asked for at once are computed by one forward, whatever they share: their new
tokens stand in one packed sequence, a 4-D mask lets each see its ancestors, and position
ids are depths. The prompt of a thousand lanes is computed and stored once, and a fork copies
nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.lm.architecture import Architecture
from genlm_bytes_smc.lm.attention import Attention, Layout, MaskArray, attend
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.kv_buffer import KVBuffer
from genlm_bytes_smc.lm.plain import batches, plain_logits
from genlm_bytes_smc.lm.rows import BadRowError
from genlm_bytes_smc.lm.start import start_tokens
from genlm_bytes_smc.lm.tree_cache import TreeCache, Work

logger = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 1 << 30


class TreeTransformer(RowEngine):
    """Next-token rows of a transformers causal language model.

    The model is put in evaluation mode. Models whose keys and values cannot be shared in a
    tree (recurrent ones, or with an attention that takes no mask) are found out when the
    engine is made, by their configuration and by comparing a small tree with a whole
    forward; they are then run by whole forwards, which is slower and gives the same rows.
    `cached` says which.

    Args:
        model: a transformers model with a language-modelling head.
        tokenizer: its tokenizer.
        limit_bytes: most memory for keys and values. What exceeds it is dropped (unreachable
            contexts first, then the least recently used) and computed again when needed.
            None: 1 GiB.
        start: token ids that contexts begin with; None chooses as `start_tokens` does.
        device: where to move the model; None leaves it where it is.

    Attributes:
        cached: whether keys and values are kept.
        logit_bytes: most memory for the logits of one forward; larger requests take several
            forwards.
        mask_bytes: the same for the attention mask.

    Raises:
        ValueError: the model's rows are narrower than the tokenizer's vocabulary, or nothing
            can begin a text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        limit_bytes: int | None = None,
        start: int | Sequence[int] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if limit_bytes is not None and limit_bytes < 1:
            raise ValueError(f"limit_bytes must be positive or None, got {limit_bytes}")
        self.model = model if device is None else model.to(device)
        self.model.eval()
        self._architecture = Architecture.of(self.model)
        self._input_device = self.model.get_input_embeddings().weight.device
        with torch.inference_mode():
            sample = plain_logits(self.model, self._architecture, [[0]])
        super().__init__(
            tokenizer,
            device=sample.device,
            width=int(sample.shape[1]),
            window=self._architecture.window,
            start=start_tokens(tokenizer, start),
        )
        if sample.shape[1] < len(self.byte_vocab):
            raise ValueError(
                f"the model returns rows of width {sample.shape[1]}, but its tokenizer has token "
                f"ids up to {len(self.byte_vocab) - 1}; rows may be wider (padding), not narrower"
            )
        self.limit_bytes = DEFAULT_LIMIT_BYTES if limit_bytes is None else limit_bytes
        self.logit_bytes = 1 << 30
        self.mask_bytes = 1 << 28
        self._mask_dtype = sample.dtype
        self._row_bytes = int(sample.shape[1]) * (sample.element_size() + 4)
        self._cache = TreeCache(self.tree)
        self._buffer = KVBuffer(self._architecture.layers)
        self._layout: Layout | None = None
        self._limit_slots = 1 << 20
        refusal = self._architecture.refusal or self._probe()
        self.cached = refusal is None
        if refusal is not None:
            logger.info("%s runs without a cache: %s", type(self.model).__name__, refusal)
        self.clear_cache()
        self.tree.collect()
        self.counts.reset()

    # -- rows --------------------------------------------------------------------------

    def evaluate(self, nodes: IntArray) -> torch.Tensor:
        """Rows of distinct contexts: float32[B, width] log-probabilities in nats.

        Raises:
            BadRowError: the model returned NaN or +inf.
        """
        nodes = np.asarray(nodes, dtype=np.int64)
        if len(nodes) == 0:
            return torch.empty((0, self.width or 0), device=self.device)
        reach = self._architecture.reach
        if not self.cached:
            rows = self._plain(nodes)
        elif reach is None or not (deep := self.tree.depth[nodes] > reach).any():
            rows = self._tree(nodes)
        else:
            rows = self._join(nodes, deep)
        self._check_rows(rows, nodes)
        self.counts.rows += len(nodes)
        return rows

    def _join(self, nodes: IntArray, deep: np.ndarray[Any, np.dtype[np.bool_]]) -> torch.Tensor:
        """Rows of contexts on both sides of the architecture's `reach`."""
        rows = torch.empty((len(nodes), self.width or 0), device=self.device)
        for part, compute in ((~deep, self._tree), (deep, self._plain)):
            if part.any():
                rows[torch.as_tensor(part, device=self.device)] = compute(nodes[part])
        return rows

    def _tree(self, nodes: IntArray) -> torch.Tensor:
        """Rows of contexts through the tree cache."""
        work = self._cache.work(nodes)
        try:
            keep = self._cache.room(nodes, len(work.nodes), self._limit_slots)
        except MemoryError:
            if len(nodes) == 1:
                return self._plain(nodes)
            half = len(nodes) // 2
            return torch.cat([self._tree(nodes[:half]), self._tree(nodes[half:])])
        if keep is not None:
            self.counts.evicted += self._cache.compact(keep)
            self._buffer.compact(keep)
        self._cache.touch(nodes)
        most = self._cache.used + len(work.nodes)
        self._buffer.reserve(most, self._cache.used, self._limit_slots)
        position = {node: i for i, node in enumerate(work.nodes)}
        asked = np.array([position[n] for n in nodes.tolist()], dtype=np.int64)
        parts = list(self._parts(work, asked))
        if len(parts) == 1:
            return _log_softmax(self._forward(work.nodes, work.fresh, asked))
        rows = torch.empty((len(nodes), self.width or 0), device=self.device)
        for first, stop in parts:
            here = np.flatnonzero((asked >= first) & (asked < stop))
            fresh = max(0, min(stop, work.fresh) - first)
            logits = self._forward(work.nodes[first:stop], fresh, asked[here] - first)
            if len(here):
                rows[torch.as_tensor(here, device=self.device)] = _log_softmax(logits)
        return rows

    def _parts(self, work: Work, asked: IntArray) -> Iterator[tuple[int, int]]:
        """Cut the positions into forwards whose logits and masks stay within the limits."""
        total = len(work.nodes)
        most_rows = max(1, self.logit_bytes // self._row_bytes)
        most = total
        if not self._architecture.row_index:
            most = most_rows
        pair = 4 * (self._architecture.heads if self._architecture.eager else 1)
        chain = self._cache.used == 0 and not self._architecture.eager
        if not chain:
            most = min(most, max(1, self.mask_bytes // (pair * (self._cache.used + total))))
        if total <= most and len(asked) <= most_rows:
            yield 0, total
            return
        wanted = np.zeros(total, dtype=np.int64)
        wanted[asked] = 1
        rows = np.concatenate([[0], np.cumsum(wanted)])
        first = 0
        while first < total:
            by_rows = int(np.searchsorted(rows, rows[first] + most_rows, side="right")) - 1
            stop = min(total, first + most, max(by_rows, first + 1))
            yield first, stop
            first = stop

    # -- one forward -------------------------------------------------------------------

    @torch.inference_mode()
    def _forward(self, nodes: list[int], fresh: int, asked: IntArray) -> torch.Tensor:
        """Run positions through the model and give the first `fresh` of them entries.

        Returns:
            Logits of the positions `asked`, float[R, width] in the model's dtype.
        """
        ids = np.array(nodes, dtype=np.int64)
        depth = self.tree.depth[ids]
        attention = attend(
            self._cache,
            self._cache.segments(nodes, fresh),
            depth,
            window=self._architecture.sliding,
            always_mask=self._architecture.eager,
            layout=self._layout,
            most_copied=self._limit_slots,
        )
        self._buffer.prepare(self._cache.used, len(nodes), attention)
        batched = attention.layout == "rows"
        inputs = self._inputs(self.tree.token[ids], depth - 1, batched)
        in_order = len(asked) == len(nodes) and bool((asked == np.arange(len(asked))).all())
        if not in_order and not batched and self._architecture.row_index:
            inputs["logits_to_keep"] = torch.as_tensor(asked, device=self._input_device)
            in_order = True
        logits: torch.Tensor = self.model(
            attention_mask=self._masks(attention),
            past_key_values=self._buffer,
            use_cache=True,
            **inputs,
        ).logits
        self._cache.append(ids[:fresh])
        self.counts.forwards += 1
        self.counts.positions += len(nodes)
        logits = logits[:, 0] if batched else logits[0]
        return logits if in_order else logits[torch.as_tensor(asked, device=logits.device)]

    def _inputs(self, tokens: IntArray, positions: IntArray, batched: bool) -> dict[str, Any]:
        both = torch.from_numpy(np.stack([tokens, positions])).to(self._input_device)
        shape = (-1, 1) if batched else (1, -1)
        return {"input_ids": both[0].view(shape), "position_ids": both[1].view(shape)}

    def _masks(self, attention: Attention) -> Any:
        """What the model takes as its mask: None, one 4-D tensor, or one for each kind of layer."""
        if attention.full is None:
            return None
        batched = attention.layout == "rows"
        narrow = attention.full if attention.sliding is None else attention.sliding
        sliding = self._mask(narrow, batched)
        if not self._architecture.mixed:
            return sliding
        full = sliding if attention.sliding is None else self._mask(attention.full, batched)
        return {"full_attention": full, "sliding_attention": sliding}

    def _mask(self, mask: MaskArray, batched: bool) -> torch.Tensor:
        out = torch.from_numpy(mask).to(self._input_device, self._mask_dtype)
        return out[:, None, None] if batched else out[None, None]

    def _plain(self, nodes: IntArray) -> torch.Tensor:
        """Rows by whole forwards."""
        contexts = [self.tree.tokens(n) for n in nodes.tolist()]
        rows = torch.empty((len(nodes), self.width or 0), device=self.device)
        most_rows = max(1, self.logit_bytes // self._row_bytes)
        for batch in batches([len(c) for c in contexts], self._architecture, most_rows):
            with torch.inference_mode():
                chosen = [contexts[i] for i in batch]
                logits = plain_logits(self.model, self._architecture, chosen)
            rows[torch.as_tensor(batch, device=self.device)] = _log_softmax(logits)
            self.counts.forwards += 1
            self.counts.positions += sum(map(len, chosen))
        return rows

    def _check_rows(self, rows: torch.Tensor, nodes: IntArray) -> None:
        # One bad logit makes the whole row NaN, so one column tells.
        bad = torch.isnan(rows[:, 0])
        if bool(bad.any()):
            lengths = sorted(set(self.tree.depth[nodes[bad.cpu().numpy()]].tolist()))
            raise BadRowError(
                f"the model returned NaN or +inf in {int(bad.sum())} of {len(rows)} rows (contexts "
                f"of {', '.join(map(str, lengths))} tokens); try another dtype"
            )

    # -- making and ending -------------------------------------------------------------

    def _probe(self) -> str | None:
        """Why the cache cannot be trusted with this model, or None if a small tree comes right."""
        a, b, c, d = (i % (self.width or 1) for i in range(4))
        steps: list[tuple[Layout, list[list[int]]]] = [
            ("range", [[a, b], [a, c]]),  # a fork
            ("listed", [[a, b, d]]),  # an entry between it and its parent left out
            ("range", [[a, b, d, c]]),  # or masked
            ("rows", [[a, c, d], [a, c, b]]),
        ]
        nodes = [np.array([self.tree.insert(t) for t in tokens]) for _, tokens in steps]
        rows = []
        try:
            for (self._layout, _), asked in zip(steps, nodes, strict=True):
                rows.append(self._tree(asked))
            self._limit_slots = self.limit_bytes // max(1, self._buffer.slot_bytes)
        except Exception as error:  # whatever the model raises, whole forwards remain
            logger.debug("the tree probe failed", exc_info=True)
            return f"a small tree of contexts failed ({type(error).__name__}: {error})"
        finally:
            self._layout = None
        if _agree(torch.cat(rows), self._plain(np.concatenate(nodes)), self._mask_dtype):
            return None
        return "a small tree of contexts gave other rows than whole forwards"

    def clear_cache(self) -> None:
        """Drop all keys and values and free their memory; rows come out the same."""
        self._cache.clear()
        self._buffer.clear()

    def close(self) -> None:
        """Free what the engine holds beside the model. It can still be used afterwards."""
        self.clear_cache()

    cleanup = close


def _agree(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two blocks of rows are the same distributions, up to rounding in `dtype`."""
    apart = float(0.5 * (a.exp() - b.exp()).abs().sum(dim=1).max())
    return apart < (1e-4 if dtype in (torch.float32, torch.float64) else 0.05)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    # Outside inference mode, so that callers may do with rows what they like.
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)
