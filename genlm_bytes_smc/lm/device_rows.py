"""Rows made linear on the device that computed them, and brought into the host's memory.

Taking the exponentials of a row and summing it by bytes costs one core of the host a hundred times
what it costs a GPU. So both are done before rows leave the device (`linear_rows`), by operations of
torch's that give the same on every device. On CUDA rows then go straight into the memory that the
host keeps them in, whose pages are locked for it (`SlotMemory`): a copy into ordinary memory goes
through a small buffer of the driver's, at a fortieth of the speed.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.fast_path import warn_lost
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.lm.rows_numba import DOUBLINGS, FAN, LEAST, LOWEST

_PART = 64  # columns of one label that are added up first
_AT_ONCE = 1 << 24  # entries that are made linear together, at some 40 bytes each on the way
_PIECE = 1 << 26  # bytes of pages that are locked together
_PORTABLE = 1  # for all contexts of CUDA: `cudaHostRegisterPortable`


class Columns(NamedTuple):
    """How the columns of rows are summed, on a device.

    Attributes:
        width: V, how many columns there are, but for padding.
        order: int64[P * 64], the columns of tokens that spell something, sorted by their label
            (see `RowArrays.labels`), in P parts of 64 that have one label each.
        gaps: bool[P * 64], where a part has fewer columns.
        below: float64[P, H * 257], one where the tokens of a part are below a byte after a heavy
            node, else zero.
    """

    width: int
    order: torch.Tensor
    gaps: torch.Tensor
    below: torch.Tensor

    @classmethod
    def of(cls, labels: npt.NDArray[np.uint16], nest: IntArray, device: torch.device) -> Columns:
        """Return what `RowArrays` says of a trie, on a device."""
        n_labels = FAN * len(nest)
        columns = np.argsort(labels, kind="stable")
        columns = columns[labels[columns] < n_labels]
        used, begin, counts = np.unique(labels[columns], return_index=True, return_counts=True)
        parts = -(-counts // _PART)
        first = _PART * (np.cumsum(parts) - parts)
        places = np.arange(len(columns)) + np.repeat(first - begin, counts)
        order = np.zeros(_PART * int(parts.sum()), dtype=np.int64)
        gaps = np.ones(len(order), dtype=bool)
        order[places], gaps[places] = columns, False
        below = np.zeros((len(used), n_labels))
        for i, label in enumerate(used.tolist()):
            while label >= 0:
                below[i, label] = 1.0
                above, byte, _ = nest[label // FAN].tolist()
                label = FAN * above + byte if above >= 0 else -1
        below = np.repeat(below, parts, axis=0)
        return cls(len(labels), *(send(a, device) for a in (order, gaps, below)))


def linear_rows(rows: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """Make rows float32[B, >= V] of log-probabilities linear where they are.

    The same is summed in the same order each time.

    Returns:
        Probabilities times 2**115, float32[B, V]; and sums over them, not rescaled,
        float64[B, 2 + H * 257]: of all tokens that spell something; then 1 if some token is
        possible but too unlikely for float32, else 0; then `RowArrays.roots`.
    """
    step = max(1, _AT_ONCE // columns.width)
    parts = [_linear(rows[i : i + step], columns) for i in range(0, len(rows), step)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([probs for probs, _ in parts]), torch.cat([sums for _, sums in parts])


def _linear(rows: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    logp = rows.detach()[:, : columns.width]
    probs = logp.double().exp_().mul_(2.0**DOUBLINGS).float()
    unlikely = ((logp < LOWEST) & (logp > LEAST)).any(dim=1, keepdim=True)
    values = probs.index_select(1, columns.order).double().masked_fill_(columns.gaps, 0.0)
    parts = values.view(len(rows), -1, _PART).sum(dim=2)
    total = parts.sum(dim=1, keepdim=True)
    return probs, torch.cat([total, unlikely.double(), parts @ columns.below], dim=1)


def fetched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in the host's memory; what was queued on the device before is done then."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    out.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return out


class SlotMemory:
    """Memory for S rows on the host, taken as rows are written to it.

    Where rows come from a CUDA device its pages are locked for that, some 64 MiB at a time when a
    slot there is first landed on. If that fails, copies are slow, with one `FastPathWarning`.

    Args:
        shape: (S, V).
        dtype: of the entries.
        device: where rows come from.

    Attributes:
        array: dtype[S, V].
    """

    def __init__(self, shape: tuple[int, int], dtype: Any, device: torch.device) -> None:
        self._device = device
        self._pieces = [0]  # bytes at which pieces end; those up to the last one are locked
        if device.type != "cuda":
            self.array: npt.NDArray[Any] = np.empty(shape, dtype=dtype)
            return
        size = shape[0] * shape[1] * np.dtype(dtype).itemsize
        raw = np.empty(size + 2 * mmap.PAGESIZE, dtype=np.uint8)
        self._begin = -(-raw.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        skip = self._begin - raw.ctypes.data
        self.array = raw[skip : skip + size].view(dtype).reshape(shape)
        self._failed = False
        weakref.finalize(self, _unlock, raw, self._begin, self._pieces)

    def land(self, slots: IntArray, rows: torch.Tensor) -> None:
        """Copy rows dtype[B, V] from the device into slots int64[B].

        On CUDA the copies are queued: the rows are there once the device has been waited for.
        """
        if self._device.type != "cuda":
            self.array[slots] = rows.cpu().numpy()
            return
        width, itemsize = self.array.shape[1], self.array.itemsize
        self._lock((int(slots.max()) + 1) * width * itemsize)
        source, out = rows.contiguous().view(-1), torch.from_numpy(self.array).view(-1)
        for at, start, count in runs(slots, width, _PIECE // itemsize):
            out[start : start + count].copy_(source[at : at + count], non_blocking=True)

    def _lock(self, end: int) -> None:
        """Lock the pages below `end` bytes."""
        whole = -(-self.array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        while self._pieces[-1] < end and not self._failed:
            start = self._pieces[-1]
            size = min(_PIECE, whole - start)
            with torch.cuda.device(self._device):
                code = int(_runtime().cudaHostRegister(self._begin + start, size, _PORTABLE))
            if code == 0:
                self._pieces.append(start + size)
                continue
            self._failed = True
            with suppress(RuntimeError):  # the next kernel is told of the error: let it be this one
                torch.zeros(1, device=self._device)
            warn_lost(
                f"memory for rows cannot be page-locked (CUDA's error {code}): rows are "
                "copied from the GPU at a fraction of the speed"
            )


def _unlock(raw: npt.NDArray[np.uint8], begin: int, pieces: list[int]) -> None:
    """Unlock pieces of memory, which `raw` has kept alive until now."""
    for start in pieces[:-1]:
        _runtime().cudaHostUnregister(begin + start)


def _runtime() -> Any:
    """Return CUDA's runtime, as torch gives it."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def runs(slots: IntArray, width: int, piece: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fewest copies that bring rows into slots; none goes beyond a multiple of `piece`.

    CUDA refuses a copy to pages that were locked apart.

    Args:
        slots: int64[B], the slot of each row.
        width: entries of a row.
        piece: entries.

    Yields:
        First entry among the rows, first entry among the slots, number of entries.
    """
    breaks = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    for first, end in pairwise(breaks):
        start = int(slots[first]) * width
        stop = start + (end - first) * width
        edges: Sequence[int] = [start, *range((start // piece + 1) * piece, stop, piece), stop]
        for a, b in pairwise(edges):
            yield first * width + a - start, a, b - a
