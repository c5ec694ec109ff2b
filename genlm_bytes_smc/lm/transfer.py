"""Devices by name, small host arrays on their way to one, and threads of the CPU.

`array.to(device)` from ordinary memory first waits until the device has done all it was given,
which costs more than the copy. From page-locked memory the copy takes its place in the queue.

On a CPU, waking a pool of threads costs more than a small forward takes; where cores are busy, much
more: a 256-wide linear layer was seen to take 25 µs on one thread and 900 µs on two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_NOT_PINNED = ("cpu", "mps")
_SMALL_MODEL = 2e7  # parameters; a larger one waits for memory, which threads do help
_SMALL_JOB = 6e9  # floating-point operations, a tenth of a second on one core


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


@contextmanager
def fitting_threads(parameters: int, positions: int, device: torch.device) -> Iterator[None]:
    """Run a forward on one torch thread if it is a small job on a CPU.

    Args:
        parameters: of the model.
        positions: token positions of the forward.
        device: where it runs.
    """
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
