"""What attention costs on a device, measured: the figures of `lm/devices.py` come from here.

`python -m benchmarks.forward --device cuda` prints them for the bundled model's keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from genlm_bytes_smc.lm.devices import AttentionCosts

_REPEATS = 5  # the fastest counts: whatever else happens only makes a run slower
_QUERIES = 32
_KEYS = 512, 4096  # a cost is the slope between the two, so that what a call costs drops out
_LEAST = 1e-3  # ns; of a slope that drowns in the clock


@dataclass(frozen=True)
class KeyShape:
    """Keys of one layer, and who reads them.

    Attributes:
        device, dtype: of the keys.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        width: of a head.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    width: int


@torch.inference_mode()
def measure(shape: KeyShape) -> AttentionCosts:
    """Measure the costs, on any device."""
    trial = _Trial(shape)
    return AttentionCosts(
        pair=trial.slope(lambda n: trial.attention(_QUERIES, n)) / _QUERIES,
        lone_key=trial.slope(lambda n: trial.attention(1, n)),
        copy=trial.slope(trial.copying),
        row_key=trial.slope(trial.rows),
    )


class _Trial:
    """What a layer does with up to `_KEYS[1]` keys, as the buffer and the decoder do it."""

    def __init__(self, shape: KeyShape) -> None:
        self.shape = shape
        self.keys = self._zeros(shape.kv_heads, _KEYS[1], shape.width)
        self.scratch = [self._zeros(self.keys.numel()) for _ in range(2)]

    def attention(self, queries: int, count: int) -> Callable[[], object]:
        """Return a run of queries of one sequence against `count` keys where they lie."""
        q, mask = self._queries(1, queries, count)
        keys = self.keys[None, :, :count]
        return lambda: scaled_dot_product_attention(q, keys, keys, attn_mask=mask)

    def copying(self, count: int) -> Callable[[], object]:
        """Return a run that copies `count` keys and values from where they lie."""
        index = torch.arange(count, device=self.shape.device)
        return lambda: [self._gather(out, index) for out in self.scratch]

    def rows(self, count: int) -> Callable[[], object]:
        """Return a run of queries that read `count` keys in all, each its own."""
        each = count // _QUERIES
        q, mask = self._queries(_QUERIES, 1, each)
        index = torch.arange(count, device=self.shape.device)

        def run() -> object:
            keys, values = (
                self._gather(out, index).view(-1, _QUERIES, each, self.shape.width).transpose(0, 1)
                for out in self.scratch
            )
            return scaled_dot_product_attention(q, keys, values, attn_mask=mask)

        return run

    def slope(self, make: Callable[[int], Callable[[], object]]) -> float:
        """Return what one key more costs, in ns."""
        few, many = _KEYS
        rise = _seconds(make(many), self.shape.device) - _seconds(make(few), self.shape.device)
        return max(_LEAST, 1e9 * rise / (many - few))

    def _gather(self, out: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        heads, width = self.shape.kv_heads, self.shape.width
        room = out[: heads * len(index) * width].view(heads, len(index), width)
        return torch.index_select(self.keys, 1, index, out=room)

    def _queries(self, rows: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Queries that share a key/value head stand below each other.
        stacked = queries * (self.shape.heads // self.shape.kv_heads)
        q = self._zeros(rows, self.shape.kv_heads, stacked, self.shape.width)
        return q, self._zeros(rows, 1, stacked, keys)

    def _zeros(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=self.shape.dtype, device=self.shape.device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes at best, the device's work included."""
    best = float("inf")
    run()
    for _ in range(_REPEATS):
        _wait_for(device)
        start = time.perf_counter()
        run()
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
