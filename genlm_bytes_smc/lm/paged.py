"""The layers of a decoder on a GPU: keys are read where they lie, and forwards are replayed.

A decode forward of a small model starts some twenty operations a layer, and starting one takes the
host longer than the GPU needs to do it. Recorded once for a number of positions (a CUDA graph),
a forward is started by one call. For that nothing in it may depend on the contexts: which entries
each position sees stands in one array on the device (`paged_triton`), and numbers of positions
are rounded up to one of `SIZES`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.lm import paged_triton as pt
from genlm_bytes_smc.lm.decoder import Attend, Decoder
from genlm_bytes_smc.lm.kv_buffer import KVBuffer
from genlm_bytes_smc.lm.tree_cache import MOST_ENTRIES, MOST_POSITIONS, Paths

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, MOST_POSITIONS)
"""Positions of a recorded forward."""

_PROGRAMS = 264  # twice the multiprocessors of a large GPU: so many programs keep it busy
_MOST_PARTS = 32
_KEY_BYTES = 128  # of one column of the keys that a program reads at once


class PagedForward:
    """A decoder's layers over the entries of a `KVBuffer`.

    Args:
        decoder: the model, written out.
        buffer: its keys and values.
        window: tokens that a position of a sliding layer sees, itself included; None: all.
        mixed: whether only layers of kind "sliding_attention" slide.
        recording: whether to record forwards and replay them (on a CUDA device only).

    Attributes:
        recording: may be changed.
    """

    def __init__(
        self, decoder: Decoder, buffer: KVBuffer, window: int | None, mixed: bool, recording: bool
    ) -> None:
        self.decoder, self.buffer = decoder, buffer
        self.window, self.mixed = window, mixed
        self.device = decoder.embedding.device
        self.recording, self._cuda = recording, self.device.type == "cuda"
        size = pt.HEAD + pt.COLUMNS * SIZES[-1] + MOST_ENTRIES
        self.plan = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._staging = torch.empty(size, dtype=torch.int32, pin_memory=self._cuda)
        self._host = self._staging.numpy()
        self._sent: Any = None  # when the staging area may be written to again
        self._seen: set[int] = set()
        self._recorded: dict[int, tuple[Any, torch.Tensor]] = {}
        self._version = -1
        self._pool: Any = None

    def __call__(self, paths: Paths) -> torch.Tensor:
        """Compute what leaves the last layer, float[T, d]; to be used before the next call."""
        count = len(paths.length)
        size = SIZES[bisect_left(SIZES, count)]
        decoder = self.decoder
        with torch.cuda.device(self.device) if self._cuda else nullcontext():
            self.buffer.allot(decoder.kv_heads, decoder.width, decoder.embedding)
            self._send(paths, size)
            if not (self.recording and self._cuda):
                return self._layers(size)[:count]
            if self.buffer.version != self._version:  # keys and values are elsewhere now
                self._recorded.clear()
                self._seen.clear()
                self._pool = None  # which went with the last recording that used it
                self._version = self.buffer.version
            if size not in self._seen:  # kernels are compiled, libraries take their memory
                self._seen.add(size)
                return self._layers(size)[:count]
            if size not in self._recorded:
                self._recorded[size] = self._record(size)
            graph, out = self._recorded[size]
            graph.replay()
            return out[:count]

    def _record(self, size: int) -> tuple[Any, torch.Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = self._layers(size)
        return graph, out

    def _layers(self, size: int) -> torch.Tensor:
        columns = self.plan[pt.HEAD : pt.HEAD + pt.COLUMNS * size].view(pt.COLUMNS, size).long()
        attend = _PagedAttend(self, size)
        return self.decoder.body(columns[pt.TOKEN], columns[pt.POSITION], attend)

    def _send(self, paths: Paths, size: int) -> None:
        """Write the plan of a forward to the device, behind what it does now."""
        if self._sent is not None:
            self._sent.synchronize()
        count, common = len(paths.length), len(paths.common)
        base = pt.HEAD + pt.COLUMNS * size
        end = base + common + len(paths.own)
        host = self._host[:end]
        host[0], host[1] = common, count
        columns = host[pt.HEAD : base].reshape(pt.COLUMNS, size)
        columns[:, count:] = 0
        depth = paths.depth
        columns[pt.TOKEN, :count] = paths.token
        columns[pt.POSITION, :count] = depth - 1
        columns[pt.SLOT, :count] = paths.first + np.arange(count)
        columns[pt.FIRST, :count] = base + common + paths.length.cumsum() - paths.length
        columns[pt.LENGTH, :count] = paths.length
        low = 0 if self.window is None else np.maximum(depth - self.window, 0)
        columns[pt.LOW, :count] = low
        host[base : base + common] = paths.common
        host[base + common : end] = paths.own
        self.plan[:end].copy_(self._staging[:end], non_blocking=True)
        if self._cuda:
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()


class _PagedAttend(Attend):
    """Attention of one forward of `size` positions; see `decoder.Attend`."""

    def __init__(self, forward: PagedForward, size: int) -> None:
        self.forward, self.size = forward, size
        decoder = forward.decoder
        heads, self.kv, self.width = decoder.heads, decoder.kv_heads, decoder.width
        group = heads // self.kv
        self.block = max(16, _power_of_two(self.width))
        self.rows = min(64, max(16, _power_of_two(size * group)))
        self.group_rows = max(16, _power_of_two(group))
        blocks = -(-size * group // self.rows)
        self.parts = min(_MOST_PARTS, max(1, _PROGRAMS // (blocks * self.kv)))
        self.own_parts = min(8, max(1, _PROGRAMS // (size * self.kv)))
        every = self.parts + self.own_parts
        shape, device = (every, size, heads), forward.device
        self.tops, self.totals = torch.empty((2, *shape), dtype=torch.float32, device=device)
        self.sums = torch.empty((*shape, self.width), dtype=torch.float32, device=device)
        self.keys = _KEY_BYTES // forward.decoder.embedding.element_size()
        self.sizes = {"HEADS": heads, "KV": self.kv, "D": self.width}

    def layer(self, kind: str, i: int, qkv: torch.Tensor, turn: Any, scale: float) -> torch.Tensor:
        """See `Attend`."""
        slides = self.forward.window is not None and (
            not self.forward.mixed or kind == "sliding_attention"
        )
        size, heads, plan = self.size, self.sizes["HEADS"], self.forward.plan
        keys, values = self.forward.buffer.layers[i]
        kept = keys, values, keys.stride(1), plan
        cos, sin = (qkv, qkv) if turn is None else turn
        copied = heads * (turn is not None) + 2 * self.kv
        _launch(pt.keep, (size, copied))(
            qkv, cos, sin, sin.stride(0), *kept, size, **self.sizes,
            HALF=_power_of_two(self.width // 2), TURNS=turn is not None, num_warps=1,
        )  # fmt: skip
        parts = self.tops, self.totals, self.sums
        like = {**self.sizes, "BD": self.block, "BN": self.keys, "SLIDES": slides}
        blocks = -(-size * (heads // self.kv) // self.rows)
        _launch(pt.own, (size, self.kv, self.own_parts))(
            qkv, *kept, *parts, scale, size, **like, BM=self.group_rows, PARTS=self.own_parts
        )
        after = [x[self.own_parts :] for x in parts]
        _launch(pt.shared, (blocks, self.kv, self.parts))(
            qkv, *kept, *after, scale, size, **like, BM=self.rows, PARTS=self.parts
        )
        out = qkv.new_empty(size, heads * self.width)
        every = self.parts + self.own_parts
        _launch(pt.combine, (size, heads))(
            *parts, out, size, HEADS=heads, D=self.width, BD=self.block, PARTS=every,
            BP=_power_of_two(every), num_warps=4,
        )  # fmt: skip
        return out

    def gate(self, both: torch.Tensor, act: Any) -> torch.Tensor:
        """See `Attend`."""
        if type(act).__name__ not in ("SiLU", "SiLUActivation"):
            return super().gate(both, act)
        inner = both.shape[1] // 2
        out = both.new_empty(len(both), inner)
        _launch(pt.gated, (len(both), -(-inner // 1024)))(both, out, inner, BLOCK=1024)
        return out


def _launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """Return what launches a kernel with its arguments."""
    # Said, because Triton warns that its default will change.
    return partial(kernel[grid], enable_fp_fusion=True)


def _power_of_two(n: int) -> int:
    """Return the first power of two that is not below `n`."""
    return 1 << (max(1, n) - 1).bit_length()
