"""A device that is not there: what the host waits for is counted, what mixes devices fails.

Tensors "on" it are wrappers around CPU tensors that say they are on the `meta` device. Work on
them is done on the CPU, so results are right; a copy from it to the host, or one to it that
does not say `non_blocking`, is what would make the host wait for a GPU, and is counted.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

FAR = torch.device("meta")
_TO_HOST = {torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy}
_TO_HOST |= {torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__}
_SIZED_BY_VALUE = ("nonzero", "masked_select", "unique", "equal", "_local_scalar_dense")


class Far(torch.Tensor):
    """A CPU tensor that stands for one on another device: it does not mix with CPU tensors."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Far:
        out = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=FAR,
        )  # fmt: skip
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            here = isinstance(x, torch.Tensor) and not isinstance(x, cls)
            assert not (here and x.dim()), f"{func} mixes devices"
            return x.held if isinstance(x, cls) else x

        name = func.overloadpacket.__name__
        assert not any(word in name for word in _SIZED_BY_VALUE), f"{name} waits for its values"
        if name.startswith("repeat_interleave"):
            assert (kwargs or {}).get("output_size") is not None, f"{name} waits for its size"
        kwargs = {k: torch.device("cpu") if v == FAR else v for k, v in (kwargs or {}).items()}
        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, out)


class FarDevice(TorchFunctionMode):
    """Inside, `FAR` is a device.

    Attributes:
        waits: how often the host would have waited for the device, by place in the package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How often in all."""
        return sum(self.waits.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func is torch.Tensor.pin_memory:
            return first
        if func is torch.where and isinstance(first, Far):
            args = (first, *map(_filled, args[1:], reversed(args[1:])))
        if func is torch.Tensor.__setitem__ and isinstance(first, Far):
            args = (first, args[1], _filled(args[2], first))
        if func in _TO_HOST and isinstance(first, Far):
            self._wait()
            return first.held if func is torch.Tensor.cpu else func(first.held, *args[1:])
        if func is torch.Tensor.to and FAR in (*args[1:], kwargs.get("device")):
            return self._sent(func, args, kwargs)
        if kwargs.get("device") == FAR:
            if func in (torch.tensor, torch.as_tensor) and not isinstance(first, Far):
                self._wait()
            if isinstance(first, Far):
                return first
            return Far(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)

    def _sent(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        here = [a for a in args[1:] if a != FAR]
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        quiet = kwargs.pop("non_blocking", False)
        held = args[0].held if isinstance(args[0], Far) else args[0]
        if not isinstance(args[0], Far) and not quiet:
            self._wait()
        return Far(func(held, *here, **kwargs) if here or kwargs else held)

    def _wait(self) -> None:
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if "genlm_bytes_smc" in path.parts:
                self.waits[f"{path.stem}.{frame.name}"] += 1
                return
        self.waits["elsewhere"] += 1


def _filled(x: Any, other: Any) -> Any:
    """A number among the arguments of `where` as a tensor; on `meta` torch would lose its value."""
    if isinstance(x, torch.Tensor):
        return x
    dtype = other.dtype if isinstance(other, torch.Tensor) else torch.get_default_dtype()
    return Far(torch.scalar_tensor(x, dtype=dtype))
