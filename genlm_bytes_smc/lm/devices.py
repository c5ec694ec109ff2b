"""What depends on the device: its name, copies, costs; packed weights of a CPU; linear rows.

`array.to(device)` from ordinary memory first waits until the device has done all it was given,
which costs more than the copy. From page-locked memory the copy takes its place in the queue.

On a CPU, waking a pool of threads costs more than a small forward takes; where cores are busy, much
more: a 256-wide linear layer was seen to take 25 µs on one thread and 900 µs on two. And a matrix
product of a handful of positions with a large weight spends most of its time laying the weight out
anew for the processor's vector units. oneDNN can keep that layout: for 2 to 32 positions of a
256-wide model a product then takes half the time, and the language-modelling head a third; a
768-wide model's products take a third throughout.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import linear, pad

from genlm_bytes_smc.fast_path import Way
from genlm_bytes_smc.lm.contexts_numba import IntArray
from genlm_bytes_smc.lm.rows_numba import DOUBLINGS, FAN, LEAST, LOWEST

_NOT_PINNED = ("cpu", "mps")
_SMALL_MODEL = 2e7  # parameters; a larger one waits for memory, which threads do help
_SMALL_JOB = 6e9  # floating-point operations, a tenth of a second on one core
_CONV_HOMES = ("transformers.pytorch_utils", "genlm_bytes_smc.lm.bundled")
_PACKABLE = (torch.float32, torch.bfloat16)
# oneDNN compiles a product for each number of positions, and keeps nearly a megabyte for it. So
# only these numbers occur, and more positions than the last go the usual way.
_POSITIONS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_PART = 64  # columns of one label that are added up first
_AT_ONCE = 1 << 24  # entries that are made linear together, at some 40 bytes each on the way
_SMALL_WEIGHT = 1 << 19  # elements; below it, the call itself costs one position more than it saves


def device_of(device: Any, *, known: bool = False) -> torch.device:
    """Return the device of a name, as torch has it.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, or what else `torch.device` takes.
        known: refuse other kinds of devices than these.

    Raises:
        ValueError: there is no such device on this machine.
    """
    here = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    with suppress(RuntimeError, TypeError):
        out = torch.device(device)
        if (out.index or 0) < here.get(out.type, 0) or not (known or out.type in here):
            return out
    names = [f"{name}:{i}" if i else name for name, n in here.items() for i in range(n)]
    raise ValueError(f"unknown device {str(device)!r}; on this machine: {', '.join(names)}")


def send(array: npt.NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`array`, of any shape and dtype, on `device`.

    The host's copy may be changed or freed right away, unless the device is the CPU: then it
    is the same memory.
    """
    if isinstance(array, torch.Tensor):
        tensor = array
    else:
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if device.type == "cpu":
        return tensor
    if tensor.device.type == "cpu" and device.type not in _NOT_PINNED:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in the host's memory; what was queued on the device before is done then."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    out.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return out


@dataclass(frozen=True)
class AttentionCosts:
    """Nanoseconds, for one layer, by which `tree_cache.attend` chooses how keys are laid out.

    All grow with the model's width, and their ratios decide. Fixed figures, so that equal runs
    choose alike and give equal digests on any machine.

    Attributes:
        pair: one query against one key that other queries read too.
        lone_key: one key that one query alone reads.
        copy: copying one key and value together with others of a list.
        row_key: one key of a query that has keys of its own, copied and read.
    """

    pair: float
    lone_key: float
    copy: float
    row_key: float


ON_CPU = AttentionCosts(pair=18.0, lone_key=49.0, copy=65.0, row_key=130.0)
"""Of the bundled model's keys (4 heads of 64, float32) on one core, by `benchmarks.forward`. With
them SmolLM2's layouts are as good as with figures measured for its own keys (9 heads on 3)."""

ON_GPU = AttentionCosts(pair=0.16, lone_key=2.0, copy=4.0, row_key=6.0)
"""Not measured: 32 heads on 8, of 128, bfloat16, at 2 TB/s and 100 TFLOP/s."""


def costs_on(device: torch.device) -> AttentionCosts:
    """Return the costs on a device."""
    return ON_CPU if device.type == "cpu" else ON_GPU


@contextmanager
def fitting_threads(parameters: int, positions: int, device: torch.device) -> Iterator[None]:
    """Run a forward of a model of so many parameters on one torch thread if it is a small job
    on a CPU."""
    threads = torch.get_num_threads()
    small = parameters <= _SMALL_MODEL and 2.0 * parameters * positions <= _SMALL_JOB
    if device.type != "cpu" or threads == 1 or not small:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Linear:
    """One or several linear layers that read the same input, side by side.

    Made outside inference mode, as oneDNN refuses weights made inside.

    Args:
        layers: `nn.Linear` or transformers' `Conv1D`, of equal input width.
        packed: whether to keep a copy of the weights in oneDNN's layout; see `layout`.
    """

    def __init__(self, layers: Sequence[Any], packed: bool) -> None:
        weights = [m.weight.detach().T if _is_conv(m) else m.weight.detach() for m in layers]
        biases = [None if m.bias is None else m.bias.detach() for m in layers]
        self._plain = list(zip(weights, biases, strict=True))
        self._packed: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        if packed:
            whole = weights[0] if len(weights) == 1 else torch.cat(weights)
            if any(b is not None for b in biases):
                pairs = zip(biases, weights, strict=True)
                self._bias = torch.cat([w.new_zeros(len(w)) if b is None else b for b, w in pairs])
            self._packed = _reorder(whole.contiguous())
            self._lone = whole.numel() < _SMALL_WEIGHT and whole.dtype == torch.float32
            if len(weights) > 1 and self._lone:
                self._plain = [(whole, self._bias)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layers' outputs side by side: float[T, in] to float[T, out]."""
        count = x.shape[0]
        if self._packed is not None and count <= _POSITIONS[-1] and not (self._lone and count == 1):
            room = _POSITIONS[bisect_left(_POSITIONS, count)]
            if room == count:
                return _apply(x, self._packed, self._bias)
            return _apply(pad(x, (0, 0, 0, room - count)), self._packed, self._bias)[:count]
        if len(self._plain) == 1:
            return linear(x, *self._plain[0])
        sizes = [len(w) for w, _ in self._plain]
        out = x.new_empty(count, sum(sizes))
        for part, (w, b) in zip(torch.split(out, sizes, dim=1), self._plain, strict=True):
            if b is None:
                torch.mm(x, w.T, out=part)
            else:
                torch.addmm(b, x, w.T, out=part)
        return out

    def onto(self, x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """Return `x`, float[T, out], plus the layer's output for `inner`, float[T, in].

        On a GPU `x` is written on: the product adds to it, which saves an operation.
        """
        (weight, bias), *others = self._plain
        if x.is_cuda and bias is None and not others:
            return x.addmm_(inner, weight.T)
        return x + self(inner)


def is_linear(module: Any) -> bool:
    """Return whether `Linear` computes what `module` does: no adapter, no quantised weights."""
    return type(module) is nn.Linear or _is_conv(module)


def _is_conv(module: Any) -> bool:
    """Whether this is transformers' `Conv1D`, or the bundled model's (weights transposed)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ in _CONV_HOMES


def layout(weight: torch.Tensor) -> Way:
    """Return how to keep such weights: "packed" where oneDNN can and it pays, else "plain"."""
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.device.type != "cpu" or weight.dtype not in _PACKABLE:
        return Way(
            "plain",
            f"packing is for float32 and bfloat16 on a CPU, not {dtype} on a "
            f"{weight.device.type} device",
        )
    return _tried(weight.dtype)


# The operators that `torch.compile` uses for frozen weights on a CPU.
def _reorder(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]


def _apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def _tried(dtype: torch.dtype) -> Way:
    """Return whether this build of torch has them for the processor, tried on a small product."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return Way("plain", "this build of torch has no oneDNN")
    x, weight = torch.eye(3, 4, dtype=dtype), torch.arange(8, dtype=dtype).view(2, 4)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return Way("plain", "the processor has no bfloat16 products")
        if torch.allclose(_apply(x, _reorder(weight), None), linear(x, weight)):
            return Way("packed", "laid out by oneDNN")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return Way("plain", f"oneDNN's products fail ({type(error).__name__}: {error})", lost=True)
    return Way("plain", "oneDNN's products come out wrong", lost=True)


# -- rows made linear on the device that computed them -------------------------------------
# Taking the exponentials of a row and summing it by bytes costs one core of the host a hundred
# times what it costs a GPU. torch's operations give the same on every device.


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
