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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam import kernels_triton as tk
from genlm_bytes_smc.beam.kernels_torch import TorchKernels
from genlm_bytes_smc.beam.rng import PRUNE, uniforms
from genlm_bytes_smc.beam.state import N_BYTES, Array, BeamState, FloatArray
from genlm_bytes_smc.beam.torch_parts import ChildMasses, Cut, most_of
from genlm_bytes_smc.fast_path import warn_lost
from genlm_bytes_smc.lm.contexts import IntArray

TOLERANCE = 1e-9
"""Largest difference from torch, nats, relative to the larger of one and the value."""

WIDEST = 1024

COLUMNS = N_BYTES + 1
T = TypeVar("T")

_BLOCK = 128
_ROW = 512  # a power of two that holds a row of 257


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
    """Launch a kernel, on the device of its first argument; nothing else launches any."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, enable_fp_fusion=False, **sizes)  # digits as torch has them


_judged: dict[tuple[str, torch.device], bool] = {}
"""Verbs that have been compared with torch on a device, and whether they may be used."""


class FusedKernels(TorchKernels):
    """`TorchKernels` in fewer launches, by Triton; made from the same arguments."""

    def _either(self, verb: str, fused: Callable[[], T], plain: Callable[[], T]) -> T:
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
        return self._either(
            "next_block",
            lambda: self._fused_block(state, cut),
            lambda: TorchKernels.next_block(self, state, cut),
        )

    def _fused_block(self, state: BeamState, cut: IntArray) -> torch.Tensor:
        sums, probs, mask = self.sums, self.store.probs, self.sums.mask(cut)
        nodes = self.nodes(state)
        slots = self._slots(state, np.arange(nodes.size))
        plan = sums.plan(nodes, slots)
        # Of each whose children are summed: node, slot, and where their masses begin.
        roots = [np.zeros_like(plan.rows), plan.rows, np.arange(len(plan.rows)) * sums.fan[0]]
        inner = [plan.node, slots[plan.inner], plan.begin]
        parents = np.hstack([roots, inner]).astype(np.int64)
        slot = np.full(nodes.size, -1)
        slot[plan.at_root] = slots[plan.at_root]
        # One small array to the device.
        sent = self._send(np.concatenate([parents.ravel(), plan.skip.ravel(), slot]))
        d_parents = sent[: parents.size].view(parents.shape)
        d_skip, d_slot = sent[parents.size :].view(2, *nodes.shape)
        fans = [int(sums.fan[0])] * len(plan.rows), sums.fan[plan.node].tolist()
        masses = self._child_masses(d_parents, fans, mask)
        out = self._empty(len(state.key), COLUMNS)
        positions = sums.d_lo if mask is None else mask.positions  # of the first, none is read
        launch(
            tk.next_block, (len(out), -(-COLUMNS // 64)),
            *_by_lane(state.node, state.logu, state.logw), nodes.shape[1], d_skip, d_slot,
            masses, sums.d_first, sums.d_byte, probs, probs.shape[1], positions, len(cut), out,
            CUT=mask is not None, BLOCK=64,
        )  # fmt: skip
        self._summed.append(ChildMasses(weakref.ref(state.logw), cut.tobytes(), masses, d_skip))
        return out

    def _child_masses(
        self, parents: torch.Tensor, fans: tuple[list[int], list[int]], mask: Cut | None
    ) -> torch.Tensor:
        """Masses of the children of `parents` [3, m], roots first; `fans` counts their children.

        Below the root of a large vocabulary one range can be half of it; inside a token most are
        a token or two.
        """
        sums, probs, roots = self.sums, self.store.probs, len(fans[0])
        masses, stride = self._empty(sum(map(sum, fans))), parents.shape[1]
        text = sums.d_lo if mask is None else mask.text
        parts = [
            (parents[:, :roots], fans[0], (1, 2048, 8)),
            (parents[:, roots:], fans[1], (8, 128, 4)),
        ]
        for part, fan, (children, length, warps) in parts:
            if fan:
                launch(
                    tk.child_masses, (len(fan), -(-max(fan) // children)), part, stride,
                    probs, probs.shape[1], sums.d_first, sums.d_lo, sums.d_length, text, masses,
                    CUT=mask is not None, CHILDREN=children, RANGE=length, num_warps=warps,
                )  # fmt: skip
        return masses

    def advance(self, state: BeamState, byte: IntArray, cut: IntArray) -> BeamState:
        """See `Kernels`. As many syncs as `contexts`."""
        if state.logw.numel() == 0:
            return super().advance(state, byte, cut)
        summed = self._masses_of(state, cut)
        return self._either(
            "advance" if summed is None else "advance_summed",
            lambda: (
                self._fused_advance(state, byte, cut)
                if summed is None
                else self._fused_look_up(state, byte, summed)
            ),
            lambda: TorchKernels.advance(self, state, byte, cut),
        )

    def _fused_look_up(self, state: BeamState, byte: IntArray, summed: ChildMasses) -> BeamState:
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
        return self._either(
            "extensions", fused, lambda: TorchKernels._ending_weights(self, state, index, where)
        )

    def select(
        self, state: BeamState, k: int | None, log_threshold: float
    ) -> tuple[BeamState, FloatArray]:
        """See `Kernels`. One sync."""
        if not 0 < state.logw.shape[1] <= WIDEST or len(state.key) == 0:
            return super().select(state, k, log_threshold)
        return self._either(
            "select",
            lambda: self._fused_pruning(tk.select, state, k, _bits(log_threshold), {}),
            lambda: TorchKernels.select(self, state, k, log_threshold),
        )

    def resample(self, state: BeamState, k: int | None) -> BeamState:
        """See `Kernels`. One sync."""
        if not 0 < state.logw.shape[1] <= WIDEST or len(state.key) == 0:
            return super().resample(state, k)

        def fused() -> BeamState:
            u = self._send(uniforms(state.key, PRUNE))
            return self._fused_pruning(tk.resample, state, k, u, {"TILE": 8})[0]

        return self._either("resample", fused, lambda: TorchKernels.resample(self, state, k))

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
        return self._either(
            f"normalise{log_z is None}", fused, lambda: TorchKernels.normalise(self, block, log_z)
        )

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
        return self._either(
            "reserve", fused, lambda: TorchKernels.reserve(self, row, proxy, rescue, share)
        )

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
        return self._either("gather", fused, lambda: TorchKernels._lanes(self, state, index, key))

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

        return self._either("extend", fused, lambda: TorchKernels._appended(self, state, new))

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
