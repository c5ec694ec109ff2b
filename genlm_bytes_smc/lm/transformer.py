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

from genlm_bytes_smc.fast_path import Way, warn_lost
from genlm_bytes_smc.lm.bundled import BundledGPT2
from genlm_bytes_smc.lm.contexts import IntArray, start_tokens
from genlm_bytes_smc.lm.devices import fitting_threads, send
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.tree_cache import Layout, Paths, Work
from genlm_bytes_smc.lm.tree_forward import Architecture, TreeForward

logger = logging.getLogger(__name__)

DEFAULT_LIMIT_BYTES = 1 << 30
_MOST_POSITIONS = 1 << 15  # of one padded batch


class TreeTransformer(RowEngine):
    """Next-token rows of a transformers causal language model.

    The model is put in evaluation mode. Models whose keys and values cannot be shared in a
    tree (recurrent ones, or with an attention that takes no mask) are found out when the
    engine is made, by their configuration and by comparing a small tree with whole
    forwards; they are then run by whole forwards, which is slower and gives the same rows.
    `forward` says which forward runs and why. If that is a slower one than models of its family
    should have, the engine warns once (`FastPathWarning`).

    If the model's weights change (an adapter, training), call `clear_cache`.

    Args:
        model: a transformers model with a language-modelling head.
        tokenizer: its tokenizer.
        limit_bytes: most memory for keys and values. What exceeds it is dropped (unreachable
            contexts first, then the least recently used) and computed again when needed.
            None: 1 GiB, or a quarter of the free memory of a CUDA device if that is more.
        start: token ids that contexts begin with; None chooses as `start_tokens` does.
        device: where to move the model; None leaves it where it is.

    Attributes:
        base: what the rows are computed by: `model`, or the bundled one without transformers'
            modules.
        logit_bytes: most memory for the logits of one forward; larger requests take several
            forwards.
        mask_bytes: the same for the attention mask.
        pack_bytes: on a CPU, most memory for a second copy of the weights that makes forwards
            over few tokens about twice as fast (1 GiB; larger models have none). A new
            value is heeded from the next `clear_cache` on.

    Raises:
        ValueError: the model's rows are narrower than the tokenizer's vocabulary, nothing can
            begin a text, or positions of the model see later ones.
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
        self.base = model if device is None else model.to(device)
        self._parameters = sum(p.numel() for p in model.parameters())
        self.base.eval()
        self._architecture = Architecture(self.base)
        with torch.inference_mode():
            sample = plain_logits(self.base, self._architecture, [[0]])
        width = int(sample.shape[1])
        super().__init__(
            tokenizer,
            device=sample.device,
            width=width,
            window=self._architecture.window,
            start=start_tokens(tokenizer, start, width),
        )
        _ = self.vocab  # refused here if rows are narrower, or spellings unknown
        if limit_bytes is None:
            limit_bytes = DEFAULT_LIMIT_BYTES
            if self.device.type == "cuda":
                free = torch.cuda.mem_get_info(self.device)[0]
                limit_bytes = max(limit_bytes, free // 4)
                self.request_bytes = min(1 << 30, max(self.request_bytes, free // 16))
        self.limit_bytes = limit_bytes
        self.logit_bytes = 1 << 30
        self.mask_bytes = 1 << 28
        self.pack_bytes = 1 << 30
        self._width = self.input_size = width
        self._evicted = 0
        self._row_bytes = width * (sample.element_size() + 4)
        self._forward = TreeForward(self.base, self._architecture, self.tree, self.limit_bytes)
        self._told_forward, self._told_room = False, True
        self._choose(sample.dtype)
        self._told_room = False
        self._tell_forward()
        self.clear_cache()  # and write the forward out anew, should its modules be changed by then
        self.tree.collect()
        self.counts.reset()

    @property
    def forward(self) -> Way:
        """Which forward runs at this moment; its `reason` says why, and `lost` whether models of
        its family should have a faster one.

        - "written out": the model's weights in a forward of our own (`decoder_of`), the fastest;
        - "modules": the model's own modules, with keys and values kept in a tree;
        - "whole": its own modules over whole contexts, nothing kept.
        """
        return self._forward.way

    @property
    def cached(self) -> bool:
        """Return whether keys and values are kept."""
        return self._forward.refusal is None or self._forward.decoder is not None

    @property
    def model(self) -> Any:
        """The transformers model. The bundled one is put into transformers' modules, which take
        seconds to import, when this is first read; rows come from them from then on."""
        if isinstance(self.base, BundledGPT2):
            self.base = self.base.in_transformers()
            self._architecture = Architecture(self.base)
            self._forward.replace(self.base, self._architecture)
        return self.base

    # -- rows --------------------------------------------------------------------------

    def evaluate(self, nodes: IntArray) -> torch.Tensor:
        """Rows of distinct contexts: float32[B, width] log-probabilities in nats.

        Raises:
            BadRowError: the model returned NaN or +inf.
        """
        if self._forward.decoder is None:
            self._tell_forward()
        reach = self._architecture.reach
        if not self.cached:
            rows = self._plain(nodes)
        elif reach is None or not (deep := self.tree.depth[nodes] > reach).any():
            rows = self._tree(nodes)
        else:
            rows = self._empty(len(nodes))
            for part, compute in ((~deep, self._tree), (deep, self._plain)):
                if part.any():
                    rows[send(np.flatnonzero(part), self.device)] = compute(nodes[part])
        self._refuse_nan(rows, nodes)
        self.counts.rows += len(nodes)
        return rows

    def _tree(self, nodes: IntArray) -> torch.Tensor:
        """Rows of contexts through the tree cache."""
        work, most = self._forward.cache.work(nodes), self._forward.most_positions
        if most is not None and most < len(nodes) == len(work.nodes):
            parts = [self._tree(nodes[i : i + most]) for i in range(0, len(nodes), most)]
            return torch.cat(parts)
        try:
            evicted = self._forward.make_room(nodes, len(work.nodes))
        except MemoryError:
            if len(nodes) == 1:
                if not self._told_room:
                    self._told_room = True
                    warn_lost(
                        f"a context of {self.tree.depth[nodes[0]]} tokens does not fit into "
                        f"limit_bytes={self.limit_bytes:,} of keys and values: it is computed as "
                        "a whole each time it is asked for; load the model with a larger "
                        "limit_bytes"
                    )
                return self._plain(nodes)
            half = len(nodes) // 2
            return torch.cat([self._tree(nodes[:half]), self._tree(nodes[half:])])
        self.counts.evicted += evicted
        self._evicted += evicted
        position = {node: i for i, node in enumerate(work.nodes)}
        asked = np.array([position[n] for n in nodes.tolist()], dtype=np.int64)
        few = len(asked) <= self._most_rows
        paths = self._forward.paths(work.nodes, work.fresh) if few else None
        cuts = list(self._parts(work, asked)) if paths is None else [(0, len(work.nodes))]
        if len(cuts) == 1:
            return self._part(work, *cuts[0], asked, paths)
        rows = self._empty(len(nodes))
        for first, stop in cuts:
            here = np.flatnonzero((asked >= first) & (asked < stop))
            rows[send(here, self.device)] = self._part(work, first, stop, asked[here])
        return rows

    def _part(
        self, work: Work, first: int, stop: int, asked: IntArray, paths: Paths | None = None
    ) -> torch.Tensor:
        """Rows of the positions `asked` from one forward over `[first, stop)`."""
        fresh = max(0, min(stop, work.fresh) - first)
        with fitting_threads(self._parameters, stop - first, self.device):
            logits = self._forward.run(work.nodes[first:stop], fresh, asked - first, paths)
            self.counts.forwards += 1
            self.counts.positions += stop - first
            return _log_softmax(logits)

    def _parts(self, work: Work, asked: IntArray) -> Iterator[tuple[int, int]]:
        """Cut the positions into forwards whose logits and masks stay within the limits."""
        total, used = len(work.nodes), self._forward.cache.used
        eager = self._architecture.eager
        most_rows = self._most_rows
        most = total if self._architecture.row_index else most_rows
        chain = used == 0 and self.tree.depth[work.nodes[-1]] == total
        if eager or not chain:
            # Eager attention keeps its weights, one number for each head.
            pair = 4 * (self._architecture.heads if eager else 1)
            most = min(most, max(1, self.mask_bytes // (pair * (used + total))))
        if total <= most and len(asked) <= most_rows:
            yield 0, total
            return
        wanted = np.zeros(total + 1, dtype=np.int64)
        wanted[asked + 1] = 1
        rows = np.cumsum(wanted)
        first = 0
        while first < total:
            by_rows = int(np.searchsorted(rows, rows[first] + most_rows, side="right")) - 1
            stop = min(total, first + most, max(by_rows, first + 1))
            yield first, stop
            first = stop

    def _plain(self, nodes: IntArray) -> torch.Tensor:
        """Rows of contexts by whole forwards."""
        contexts = [self.tree.tokens(n) for n in nodes.tolist()]
        rows = self._empty(len(nodes))
        lengths = [len(c) for c in contexts]
        for batch in batches(lengths, self._architecture, self._most_rows):
            chosen = [contexts[i] for i in batch]
            with torch.inference_mode():
                logits = plain_logits(self.base, self._architecture, chosen)
            rows[send(np.array(batch), self.device)] = _log_softmax(logits)
            self.counts.forwards += 1
            self.counts.positions += sum(map(len, chosen))
        return rows

    @property
    def _most_rows(self) -> int:
        return max(1, self.logit_bytes // self._row_bytes)

    def _empty(self, rows: int) -> torch.Tensor:
        return torch.empty((rows, self._width), device=self.device)

    # -- making and ending -------------------------------------------------------------

    def _choose(self, dtype: torch.dtype) -> None:
        """Choose the fastest forward whose rows come right."""
        forward = self._forward
        if forward.decoder is not None:
            forward.doubt = self._probe(dtype)
            if forward.doubt is not None:
                forward.clear()  # of keys that would spoil the next probe
            elif forward.paging and (reason := self._probe(dtype, paged=True)):
                forward.paging = False
                forward.clear()
                warn_lost(f"keys are copied in every forward, which is slower, as {reason}")
        if forward.decoder is None and forward.refusal is None:
            reason = self._probe(dtype)
            forward.refusal = None if reason is None else Way("whole", reason, lost=True)

    def _tell_forward(self) -> None:
        """Warn, once, if a slower forward runs than models of this family should have."""
        if not self._told_forward and (way := self.forward).lost:
            self._told_forward = True
            warn_lost(
                f"{type(self.base).__name__} runs more slowly than it should: its forward is "
                f"{way!r}, as {way.reason}"
            )

    def _probe(self, dtype: torch.dtype, *, paged: bool = False) -> str | None:
        """Why the cache cannot be trusted with this model, or None if a small tree comes right.

        Rows come in `dtype`; with `paged` keys are read where they lie, by `lm.paged`.
        """
        a, b, c, d = (i % self._width for i in range(4))
        steps: list[tuple[Layout, list[list[int]]]] = [
            ("range", [[a, b], [a, c]]),  # a fork
            ("listed", [[a, b, d]]),  # an entry between it and its parent left out
            ("range", [[a, b, d, c]]),  # or masked
            ("rows", [[a, c, d], [a, c, b]]),
        ]
        if paged:  # once more in between: the second forward of a size is recorded
            self._forward.cache.clear()
            steps.insert(2, ("range", [[a, b, b]]))
        nodes = [np.array([self.tree.insert(t) for t in tokens]) for _, tokens in steps]
        rows = []
        try:
            for (layout, _), asked in zip(steps, nodes, strict=True):
                self._forward.layout = "paged" if paged else layout
                rows.append(self._tree(asked))
        except Exception as error:  # whatever the model raises, whole forwards remain
            logger.debug("the tree probe failed", exc_info=True)
            return f"a small tree of contexts failed ({type(error).__name__}: {error})"
        finally:
            self._forward.layout = None
        if _agree(torch.cat(rows), self._plain(np.concatenate(nodes)), dtype):
            return None
        return "a small tree of contexts gave other rows than whole forwards"

    def _clear_cache(self) -> None:
        """Drop all keys and values, free their memory, and read the model's weights anew."""
        self._forward.pack_bytes = self.pack_bytes
        self._forward.clear()

    def memory(self) -> dict[str, int]:
        """Entries held, bytes allotted to keys and values, and entries evicted so far."""
        return {
            "entries": len(self._forward.cache),
            "bytes": self._forward.nbytes,
            "evicted": self._evicted,
        }

    # it holds the model beside, and can still be used afterwards
    _close = _clear_cache


def _agree(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether two blocks of rows are the same distributions, up to rounding in `dtype`."""
    apart = float(0.5 * (a.exp() - b.exp()).abs().sum(dim=1).max())
    return apart < (1e-4 if dtype in (torch.float32, torch.float64) else 0.05)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    # Outside inference mode, so that callers may do with rows what they like.
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


# -- without any cache: the slow way that every model allows -----------------------------


def plain_logits(
    model: Any, architecture: Architecture, contexts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return logits after each context, none empty, from one forward, padded on the right:
    float[B, width], in the model's dtype."""
    lengths = [len(c) for c in contexts]
    longest, device = max(lengths), model.get_input_embeddings().weight.device
    padded = [[*c, *([0] * (longest - len(c)))] for c in contexts]
    inputs: dict[str, Any] = {"input_ids": torch.tensor(padded, device=device), "use_cache": False}
    if architecture.masks_padding:
        inputs["attention_mask"] = torch.tensor(
            [[1] * n + [0] * (longest - n) for n in lengths], device=device
        )
    ends = sorted(set(lengths))
    if architecture.row_index:
        inputs["logits_to_keep"] = torch.tensor([n - 1 for n in ends], device=device)
        at = {n: i for i, n in enumerate(ends)}
    else:
        at = {n: n - 1 for n in ends}
    logits: torch.Tensor = model(**inputs).logits
    return logits[range(len(lengths)), [at[n] for n in lengths]]


def batches(
    lengths: Sequence[int], architecture: Architecture, most_rows: int
) -> Iterator[list[int]]:
    """Cut contexts, longest first, into forwards whose logits and padding stay bounded.

    Args:
        lengths: tokens of each context.
        architecture: of the model.
        most_rows: rows of logits that one forward may make.

    Yields:
        Indices into `lengths`.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch:
            size = len(batch) + 1
            longest = lengths[batch[0]]
            distinct = len({lengths[j] for j in batch} | {lengths[i]})
            rows = size * (distinct if architecture.row_index else longest)
            if rows > most_rows or size * longest > _MOST_POSITIONS:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch
