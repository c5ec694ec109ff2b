"""Small host arrays on their way to the device, without waiting for it.

`array.to(device)` from ordinary memory first waits until the device has done all it was given,
which costs more than the copy. From page-locked memory the copy takes its place in the queue.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_NOT_PINNED = ("cpu", "mps")


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
