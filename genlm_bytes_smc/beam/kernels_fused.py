"""The beam's verbs with their device arithmetic fused into a few launches.

`FusedKernels` is `TorchKernels` with the verbs that launch most overridden by Triton kernels
(`kernels_triton`). What a torch operation costs the host, some 5 to 10 us, is most of a particle
step's time outside the model once the model is small or the particles are many, and a fused
verb takes two or three launches. Plans, the host's side and waits for the device stay as they are.

The torch version is the oracle, and what is left when something goes wrong:

- the first time a verb runs on a device, it is compared with torch on the data at hand (once a
  process); beyond `TOLERANCE` it says so, once, and torch does the work from then on;
- the same if a kernel cannot be compiled or launched;
- a lane of more than `WIDEST` candidates is pruned by torch, as no block sorts it.

`GENLM_BYTES_SMC_FUSED=0` in the environment leaves all of it out.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam import kernels_triton as tk
from genlm_bytes_smc.beam.host_side import distinct
from genlm_bytes_smc.beam.kernels import FloatArray
from genlm_bytes_smc.beam.kernels_torch import TorchKernels, most_of
from genlm_bytes_smc.beam.range_sums import FLAT_LIMIT, Cut
from genlm_bytes_smc.beam.rng import PRUNE, uniforms
from genlm_bytes_smc.beam.state import Array, BeamState
from genlm_bytes_smc.beam.symbols import N_BYTES
from genlm_bytes_smc.fast_path import warn_lost
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.rows import RowStore

TOLERANCE = 1e-9
"""Largest difference from torch, nats, relative to the larger of one and the value."""

WIDEST = 1024

COLUMNS = N_BYTES + 1
_BLOCK = 128
_ROW = 512  # a power of two that holds a row of 257


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
    """Launch a kernel, on the device of its first argument; nothing else launches any."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, enable_fp_fusion=False, **sizes)  # digits as torch has them


_judged: dict[tuple[str, torch.device], bool] = {}
"""Verbs that have been compared with torch on a device, and whether they may be used."""


class _Summed(NamedTuple):
    """What `next_block` summed up for a state, for the `advance` that may follow.

    Attributes:
        logw: of the state, which names it.
        cut: the cut it was summed under, as bytes.
        masses: float64[G], of all children of all candidates, of each distinct row once.
        skip: int64[N, C], what to add to a child's node to find it in `masses`.
    """

    logw: weakref.ref[torch.Tensor]
    cut: bytes
    masses: torch.Tensor
    skip: torch.Tensor


class _Plan(NamedTuple):
    """Whose children `next_block` sums, on the device.

    Attributes:
        parents: int64[3, m]: node, slot, and where its children's masses begin; the roots of
            distinct rows first, then the candidates inside a token.
        roots: how many are roots.
        widest: most children of one that is none.
        total: children of them all.
        skip: int64[N, C], what to add to a child's node to find its mass.
        slot: int64[N, C], the slot of a candidate at the root; -1 for the others.
    """

    parents: torch.Tensor
    roots: int
    widest: int
    total: int
    skip: torch.Tensor
    slot: torch.Tensor


class FusedKernels(TorchKernels):
    """`TorchKernels` in fewer launches, by Triton.

    Args:
        store: the rows.
        flat_limit: how many probabilities torch gathers at once, where torch is used.
    """

    def __init__(self, store: RowStore, flat_limit: int = FLAT_LIMIT) -> None:
        super().__init__(store, flat_limit)
        self._fused_sums: deque[_Summed] = deque(maxlen=2)

    def _either(self, verb: str, fused: Callable[[], Any], plain: Callable[[], Any]) -> Any:
        """Call `fused` if it may be used; compare its first answer with torch's."""
        name = (verb, self.device)
        trusted = _judged.get(name)
        if trusted is False:
            return plain()
        try:
            out = fused()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _refuse(name, f"failed ({type(error).__name__}: {error})")
            return plain()
        if trusted is None:
            want = plain()
            apart = _apart(out, want)
            if not apart <= TOLERANCE:
                _refuse(name, f"differs from torch by {apart:.1e}")
                return want
            _judged[name] = True
        return out

    # -- verbs -------------------------------------------------------------------------

    def next_block(self, state: BeamState, cut: IntArray) -> torch.Tensor:
        """See `Kernels`. As many syncs as `nodes`."""
        if state.logw.numel() == 0:
            return super().next_block(state, cut)
        block: torch.Tensor = self._either(
            "next_block",
            lambda: self._fused_block(state, cut),
            lambda: TorchKernels.next_block(self, state, cut),
        )
        return block

    def _fused_block(self, state: BeamState, cut: IntArray) -> torch.Tensor:
        plan = self._plan(state)
        sums, probs, mask = self.sums, self.store.probs, self.sums.mask(cut)
        masses = self._child_masses(plan, probs, mask)
        out = self._empty(len(state.key), COLUMNS)
        positions = sums.d_lo if mask is None else mask.positions  # of the first, none is read
        launch(
            tk.next_block, (len(out), -(-COLUMNS // 64)),
            *_by_lane(state.node, state.logu, state.logw), plan.skip.shape[1], plan.skip,
            plan.slot, masses, sums.d_first, sums.d_byte, probs, probs.shape[1], positions,
            len(cut), out, CUT=mask is not None, BLOCK=64,
        )  # fmt: skip
        self._fused_sums.append(_Summed(weakref.ref(state.logw), cut.tobytes(), masses, plan.skip))
        return out

    def _plan(self, state: BeamState) -> _Plan:
        """One small array to the device."""
        nodes, sums = self.nodes(state), self.sums
        flat = nodes.ravel()
        at = np.flatnonzero(flat == 0)
        slots = self._slots(state, at)
        rows, row_of = distinct(slots)
        fan_of_root = int(sums.fan[0])
        inner = np.flatnonzero(flat > 0)
        inner = inner[sums.fan[flat[inner]] > 0]
        x = flat[inner]
        fan = sums.fan[x]
        begin = len(rows) * fan_of_root + fan.cumsum() - fan
        places = np.zeros((2, nodes.size), dtype=np.int64)
        places[1] = -1
        places[:, at] = row_of * fan_of_root - sums.first[0], slots
        places[0, inner] = begin - sums.first[x]
        m = len(rows) + len(x)
        parents = np.zeros((3, m), dtype=np.int64)
        parents[1:, : len(rows)] = rows, np.arange(len(rows)) * fan_of_root
        parents[:, len(rows) :] = x, self._slots(state, inner), begin
        sent = self._send(np.concatenate([parents.ravel(), places.ravel()]))
        skip, slot = sent[3 * m :].view(2, *nodes.shape)
        total = len(rows) * fan_of_root + int(fan.sum())
        widest = int(fan.max(initial=0))
        return _Plan(sent[: 3 * m].view(3, m), len(rows), widest, total, skip, slot)

    def _child_masses(self, plan: _Plan, probs: torch.Tensor, mask: Cut | None) -> torch.Tensor:
        """float64[G]. Below the root of a large vocabulary one range can be half of it; inside
        a token most are a token or two."""
        masses, sums, stride = self._empty(plan.total), self.sums, plan.parents.shape[1]
        text = sums.d_lo if mask is None else mask.text
        parts = [
            (plan.parents[:, : plan.roots], int(sums.fan[0]), (1, 2048, 8)),
            (plan.parents[:, plan.roots :], plan.widest, (8, 128, 4)),
        ]
        for parents, most, (children, length, warps) in parts:
            if parents.shape[1]:
                launch(
                    tk.child_masses, (parents.shape[1], -(-most // children)), parents, stride,
                    probs, probs.shape[1], sums.d_first, sums.d_lo, sums.d_length, text, masses,
                    CUT=mask is not None, CHILDREN=children, RANGE=length, num_warps=warps,
                )  # fmt: skip
        return masses

    def advance(self, state: BeamState, byte: IntArray, cut: IntArray) -> BeamState:
        """See `Kernels`. As many syncs as `contexts`."""
        if state.logw.numel() == 0:
            return super().advance(state, byte, cut)
        named = cut.tobytes()
        for summed in self._fused_sums:
            if summed.logw() is state.logw and summed.cut == named:
                return self._advanced("advance_summed", state, byte, cut, summed)
        return self._advanced("advance", state, byte, cut, None)

    def _advanced(
        self, verb: str, state: BeamState, byte: IntArray, cut: IntArray, summed: _Summed | None
    ) -> BeamState:
        out: BeamState = self._either(
            verb,
            lambda: (
                self._fused_advance(state, byte, cut)
                if summed is None
                else self._fused_look_up(state, byte, summed)
            ),
            lambda: TorchKernels.advance(self, state, byte, cut),
        )
        return out

    def _fused_look_up(self, state: BeamState, byte: IntArray, summed: _Summed) -> BeamState:
        n, width = state.logw.shape
        node, logw = self._empty(n, width, dtype=torch.int64), self._empty(n, width)
        launch(
            tk.advance_summed, (-(-n * width // _BLOCK),),
            *_by_lane(state.node, state.logu, state.logw), width, n * width, summed.skip,
            self._send(byte), summed.masses, self.sums.d_first, self.sums.d_byte, node, logw,
            BLOCK=_BLOCK,
        )  # fmt: skip
        return BeamState(state.ctx, node, state.logu, logw, state.key)

    def _fused_advance(self, state: BeamState, byte: IntArray, cut: IntArray) -> BeamState:
        n, width = state.logw.shape
        sums, probs, mask = self.sums, self.store.probs, self.sums.mask(cut)
        slots = self.store.slot_of[self.contexts(state)]
        sent = self._send(np.concatenate([byte, slots.ravel()]))
        node, logw = self._empty(n, width, dtype=torch.int64), self._empty(n, width)
        launch(
            tk.advance, (n * width,), *_by_lane(state.node, state.logu, state.logw), width,
            sent[:n], sent[n:], sums.d_first, sums.d_byte, sums.d_lo, sums.d_length, probs,
            probs.shape[1], sums.d_lo if mask is None else mask.text, node, logw,
            CUT=mask is not None, RANGE=1024,
        )  # fmt: skip
        return BeamState(state.ctx, node, state.logu, logw, state.key)

    def _ending_weights(
        self, state: BeamState, index: torch.Tensor, where: torch.Tensor
    ) -> torch.Tensor:
        def fused() -> torch.Tensor:
            out, width = self._empty(len(index)), state.logu.shape[1]
            launch(
                tk.ending_weights, (-(-len(out) // _BLOCK),), index, where, len(out),
                *_by_lane(state.logu), width, self.store.probs, out, BLOCK=_BLOCK,
            )  # fmt: skip
            return out

        if len(index) == 0:
            return super()._ending_weights(state, index, where)
        weights: torch.Tensor = self._either(
            "extensions", fused, lambda: TorchKernels._ending_weights(self, state, index, where)
        )
        return weights

    def select(
        self, state: BeamState, k: int | None, log_threshold: float
    ) -> tuple[BeamState, FloatArray]:
        """See `Kernels`. One sync."""
        if not 0 < state.logw.shape[1] <= WIDEST or len(state.key) == 0:
            return super().select(state, k, log_threshold)
        out: tuple[BeamState, FloatArray] = self._either(
            "select",
            lambda: self._fused_pruning(tk.select, state, k, _bits(log_threshold), {}),
            lambda: TorchKernels.select(self, state, k, log_threshold),
        )
        return out

    def resample(self, state: BeamState, k: int | None) -> BeamState:
        """See `Kernels`. One sync."""
        if not 0 < state.logw.shape[1] <= WIDEST or len(state.key) == 0:
            return super().resample(state, k)

        def fused() -> BeamState:
            u = self._send(uniforms(state.key, PRUNE))
            return self._fused_pruning(tk.resample, state, k, u, {"TILE": 8})[0]

        out: BeamState = self._either(
            "resample", fused, lambda: TorchKernels.resample(self, state, k)
        )
        return out

    def _fused_pruning(
        self, kernel: Any, state: BeamState, k: int | None, by: Any, sizes: dict[str, int]
    ) -> tuple[BeamState, FloatArray]:
        n, width = state.logw.shape
        most, block = most_of(state, k), max(16, 1 << (width - 1).bit_length())
        ranked, order = self._empty(n, width), self._empty(n, width, dtype=torch.int64)
        launch(tk.rank, (n,), *_by_lane(state.logw), width, ranked, order, WIDTH=block, TILE=16)
        out, weights = self._state(n, most)
        packed = self._empty(n, 2 * most + 2, dtype=torch.int64)
        launch(
            kernel, (n,), ranked, order, width, most, by,
            *_by_lane(state.ctx, state.node, state.logu), out, weights, packed, WIDTH=block,
            **sizes,
        )  # fmt: skip
        return self._received(_joined(out, weights, state.key), packed)

    def normalise(self, block: torch.Tensor, log_z: FloatArray | None) -> torch.Tensor:
        """See `Kernels`. No sync."""

        def fused() -> torch.Tensor:
            rows = block.contiguous()
            total = rows if log_z is None else self._send(log_z)
            out = torch.empty_like(rows)
            launch(tk.normalise, (len(out),), rows, total, out, CUT=log_z is None, BLOCK=_ROW)
            return out

        if len(block) == 0:
            return super().normalise(block, log_z)
        out: torch.Tensor = self._either(
            f"normalise{log_z is None}", fused, lambda: TorchKernels.normalise(self, block, log_z)
        )
        return out

    def reserve(
        self, row: torch.Tensor, proxy: torch.Tensor, rescue: npt.NDArray[np.bool_], share: float
    ) -> torch.Tensor:
        """See `Kernels`. No sync."""

        def fused() -> torch.Tensor:
            out, marked = self._empty(len(row), COLUMNS), self._send(rescue)
            launch(
                tk.reserve, (len(out),), row.contiguous(), proxy.contiguous(), marked,
                _bits(np.log(share)), _bits(np.log1p(-share)), out, BLOCK=_ROW,
            )  # fmt: skip
            return out

        if len(row) == 0:
            return super().reserve(row, proxy, rescue, share)
        out: torch.Tensor = self._either(
            "reserve", fused, lambda: TorchKernels.reserve(self, row, proxy, rescue, share)
        )
        return out

    def _lanes(self, state: BeamState, index: torch.Tensor, key: Array) -> BeamState:
        def fused() -> BeamState:
            n, width = len(index), state.logw.shape[1]
            out, weights = self._state(n, width)
            launch(
                tk.gather, (n, -(-width // _BLOCK)), index, width, *_by_lane(*state[:4]), out,
                weights, BLOCK=_BLOCK,
            )  # fmt: skip
            return _joined(out, weights, key)

        if len(index) == 0 or state.logw.numel() == 0:
            return super()._lanes(state, index, key)
        lanes: BeamState = self._either(
            "gather", fused, lambda: TorchKernels._lanes(self, state, index, key)
        )
        return lanes

    def _appended(self, state: BeamState, new: torch.Tensor) -> BeamState:
        def fused() -> BeamState:
            n, width = state.logw.shape
            both = width + new.shape[2]
            out, weights = self._state(n, both)
            launch(
                tk.extend, (n, -(-both // _BLOCK)), new, new.shape[2], width,
                *_by_lane(*state[:4]), out, weights, BLOCK=_BLOCK,
            )  # fmt: skip
            return _joined(out, weights, state.key)

        grown: BeamState = self._either(
            "extend", fused, lambda: TorchKernels._appended(self, state, new)
        )
        return grown

    # -- arrays ------------------------------------------------------------------------

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def _state(self, n: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for a state: ctx and node int64[2, N, C], logu and logw float64[2, N, C]."""
        return self._empty(2, n, width, dtype=torch.int64), self._empty(2, n, width)


def _joined(out: torch.Tensor, weights: torch.Tensor, key: Array) -> BeamState:
    return BeamState(out[0], out[1], weights[0], weights[1], key)


def _by_lane(*tensors: torch.Tensor) -> Iterator[Any]:
    """Each of some [N, C] with the distance between its lanes; candidates lie side by side."""
    for tensor in tensors:
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            tensor = tensor.contiguous()
        yield tensor
        yield tensor.stride(0)


def _bits(x: float) -> int:
    """Return a float64 as Triton's kernels take it."""
    return int(np.float64(x).view(np.int64))


def _refuse(name: tuple[str, torch.device], why: str) -> None:
    _judged[name] = False
    warn_lost(
        f"the fused kernel of {name[0]!r} on {name[1]} {why}; torch does its work from here on "
        f"(GENLM_BYTES_SMC_FUSED=0 leaves out all of them)"
    )


def _apart(got: Any, want: Any) -> float:
    """Largest difference, relative to the larger of one and the value; inf where ints differ."""
    if isinstance(want, tuple):
        return max(_apart(a, b) for a, b in zip(got, want, strict=True))
    a, b = (x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (got, want))
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf
    differ = a != b
    if not differ.any():
        return 0.0
    if a.dtype.kind != "f":
        return np.inf
    a, b = a[differ], b[differ]
    return float((np.abs(a - b) / np.maximum(1, np.abs(b))).max())
