"""Linear rows on the host, kept in the order of token ids.

Rows that were computed on a CPU are made linear by compiled loops (`rows_numba`), those of another
device before they leave it (`devices.linear_rows`). On CUDA they then go straight into the memory
that the host keeps them in, whose pages are locked for it (`SlotMemory`): a copy into ordinary
memory goes through a small buffer of the driver's, at a fortieth of the speed.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.fast_path import warn_lost
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.devices import Columns, fetched, linear_rows
from genlm_bytes_smc.lm.rows_numba import (
    FAN,
    LOWEST,
    UNBIAS,
    FloatArray,
    RowArrays,
    masked_total,
    take_32,
    take_64,
)
from genlm_bytes_smc.trie import TokenTrie

ROUNDING = 1e-4  # how far from one a float32 row over a large vocabulary may sum
EXACT_WIDTH = 1 << 14  # tokens; rows up to this wide are always kept in float64
_PIECE = 1 << 26  # bytes of pages that are locked together
_PORTABLE = 1  # for all contexts of CUDA: `cudaHostRegisterPortable`
_HEAVY = 8  # a node is heavy if one in this many tokens is below it


class HostRows:
    """Storage of a `RowStore` whose rows live on the host.

    A row is kept as it came, exponentiated: sums over the trie gather what they need. Rows of
    up to EXACT_WIDTH tokens are kept in float64. Wider ones that come in float32 are kept in
    float32 (each probability to 1e-7 of itself, less than the rounding of the row it came from;
    sums are taken in float64). The first row that comes in float64 turns the store to float64,
    and so does the first with a token below LOWEST, with a `FastPathWarning`.

    Args:
        trie: which tokens spell something, and where its nodes are.
        slots: number of rows to reserve; memory is taken as they are written.
        exact: begin in float64.
        device: where rows are computed.
    """

    def __init__(
        self, trie: TokenTrie, slots: int, exact: bool, device: torch.device | None = None
    ) -> None:
        self.trie, self.width = trie, len(trie.vocab)
        self._device = device or torch.device("cpu")
        self._memory = self._room(slots, exact)
        self._spelled = trie.position >= 0
        self._all_spelled = bool(self._spelled.all())
        heavy, nest, labels = _heavy_nodes(trie)
        self._rows = RowArrays(
            probs=self._memory.array, scale=np.ones(slots),
            roots=np.empty((slots, FAN * len(heavy))), summed=np.zeros(slots, dtype=bool),
            order=trie.order.astype(np.uint32), heavy=heavy, nest=nest, labels=labels,
            slot_of=np.zeros(1, dtype=np.int64),
        )  # fmt: skip
        self._columns: Columns | None = None  # on the device, once rows came from there
        self.used = 0  # the last slot written to; those beyond it never were

    def _room(self, slots: int, exact: bool) -> SlotMemory:
        dtype, lands = (np.float64, "cpu") if exact else (np.float32, self._device)
        return SlotMemory((slots, self.width), dtype, torch.device(lands))

    @property
    def exact(self) -> bool:
        """Return whether rows are kept in float64."""
        return bool(self._rows.probs.dtype == np.float64)

    def arrays(self, slot_of: IntArray) -> RowArrays:
        """Return what the kernels take."""
        if self._rows.slot_of is not slot_of:
            self._rows = self._rows._replace(slot_of=slot_of)
        return self._rows

    def take(self, slots: IntArray, rows: torch.Tensor) -> FloatArray:
        """Keep rows of log-probabilities float[B, >= V]; what each summed to, float64[B].

        A row over just the tokens that spell something is a distribution as it comes, and
        is left as it is unless its sum is off by more than rounding. A sum that is NaN,
        infinite or zero says that the row is no distribution.
        """
        if rows.device.type != "cpu":
            taken = self.take_linear(slots, rows)
            if taken is not None:
                return taken
            rows = fetched(rows.detach())
        logp = rows.detach().numpy() if rows.requires_grad else rows.numpy()
        if not self.exact and logp.dtype != np.float32:
            self._make_exact()
        self.used = max(self.used, *slots.tolist())
        take = take_64 if (exact := self.exact) else take_32
        total: FloatArray
        kept = self._rows
        total, low, odd = take(logp, slots, kept.probs, kept.scale, kept.summed, ROUNDING)
        # Not normalised (their sum in float32 ends early), or a token out of range.
        if not exact and (low or (odd and not np.isfinite(total).all())):
            if low or not np.isnan(total).all():
                self._make_exact()
                total = self.take(slots, rows)
                if np.isfinite(total).all():
                    warn_lost(
                        f"a row gives a token less than {LOWEST:g} nats, or is far from "
                        "normalised: rows are kept in float64 from here on, in twice the memory"
                    )
            return total
        if not self._all_spelled or logp.shape[1] > self.width:
            constant = kept.scale[slots]
            total = constant * [masked_total(kept.probs[s], self._spelled) for s in slots]
            kept.scale[slots] = _quotient(constant, total)
        elif odd:
            off = np.abs(total - 1.0) > ROUNDING
            kept.scale[slots[off]] = _quotient(kept.scale[slots[off]], total[off])
        return total

    def take_linear(self, slots: IntArray, rows: torch.Tensor) -> FloatArray | None:
        """As `take`, where the rows are made linear and summed by bytes on their device.

        Returns:
            None where `take` has to see them: one is no distribution, or they need float64.
        """
        # Metal has no float64.
        if self.exact or rows.dtype != torch.float32 or rows.device.type == "mps":
            return None
        if self._columns is None:
            self._columns = Columns.of(self._rows.labels, self._rows.nest, rows.device)
        probs, sums_there = linear_rows(rows, self._columns)
        self._memory.land(slots, probs)
        sums = fetched(sums_there).numpy()  # and wait for both
        total, unlikely, roots = UNBIAS * sums[:, 0], sums[:, 1], sums[:, 2:]
        if unlikely.any() or not np.isfinite(total).all():
            return None
        self.used = max(self.used, *slots.tolist())
        whole = self._all_spelled and rows.shape[1] == self.width
        off = np.abs(total - 1.0) > (ROUNDING if whole else -1.0)
        scale = np.where(off, _quotient(np.full(len(slots), UNBIAS), total), UNBIAS)
        with np.errstate(invalid="ignore"):  # a row of zeros, which the store refuses
            self._rows.roots[slots] = roots * scale[:, None]
        self._rows.scale[slots], self._rows.summed[slots] = scale, True
        return total

    def put(self, slots: IntArray, linear: torch.Tensor) -> FloatArray:
        """Keep rows of probabilities float64[B, T] in trie order, in an exact store.

        Returns:
            Their sums, float64[B].
        """
        self.used = max(self.used, *slots.tolist())
        p = linear.numpy()
        self._rows.probs[slots] = 0.0
        self._rows.probs[np.ix_(slots, self.trie.order)] = p
        total: FloatArray = p.sum(axis=1)
        self._rows.scale[slots] = _quotient(np.ones(len(slots)), total)
        self._rows.summed[slots] = False
        return total

    def enlarge(self, slots: int) -> None:
        """Make room for `slots` slots, if there is less; the rows stay where they were."""
        if slots <= len(self._rows.probs):
            return
        self._memory = self._room(slots, self.exact)
        grown = {"probs": self._memory.array}
        for name in ("scale", "roots", "summed"):
            old = getattr(self._rows, name)
            grown[name] = np.zeros((slots, *old.shape[1:]), dtype=old.dtype)
        written = slice(self.used + 1)
        for name, new in grown.items():
            new[written] = getattr(self._rows, name)[written]
        self._rows = self._rows._replace(**grown)

    def row_bytes(self) -> int:
        """Memory of one slot, in bytes."""
        return self.width * self._rows.probs.itemsize + int(self._rows.roots[0].nbytes) + 1

    def _make_exact(self) -> None:
        probs, written = self._rows.probs, slice(self.used + 1)
        self._memory = self._room(len(probs), True)
        self._memory.array[written] = probs[written]
        self._rows = self._rows._replace(probs=self._memory.array)


def _quotient(a: FloatArray, b: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return a / b


def _heavy_nodes(trie: TokenTrie) -> tuple[IntArray, IntArray, npt.NDArray[np.uint16]]:
    """Find the root and the nodes above an eighth of all tokens: `heavy`, `nest`, `labels`.

    What is above such a node is one too.
    """
    size = trie.hi - trie.lo
    big = (size * _HEAVY >= trie.n_tokens) & (size >= 512)
    big[0] = True
    found = np.flatnonzero(big)
    heavy = found[np.lexsort((found, trie.lo[found]))].astype(np.int64)  # depth first
    index = {node: i for i, node in enumerate(heavy.tolist())}
    nest = np.zeros((len(heavy), 3), dtype=np.int64)
    labels = np.full(len(trie.vocab), FAN * len(heavy), dtype=np.uint16)
    for i, node in enumerate(heavy.tolist()):
        below = (trie.lo[heavy] >= trie.lo[node]) & (trie.hi[heavy] <= trie.hi[node])
        nest[i] = index.get(int(trie.parent[node]), -1), trie.byte[node], i + below[i:].sum()
        labels[trie.order[trie.lo[node] : trie.lo[node] + trie.ends[node]]] = FAN * i + FAN - 1
        for child in range(int(trie.first_child[node]), int(trie.first_child[node + 1])):
            if child not in index:
                line = trie.order[trie.lo[child] : trie.hi[child]]
                labels[line] = FAN * i + int(trie.byte[child])
    return heavy, nest, labels


# -- their memory --------------------------------------------------------------------------


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
