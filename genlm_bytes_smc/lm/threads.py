"""One thread for small jobs: waking a pool costs more than a small forward takes.

On a machine whose cores are busy the cost is no longer microseconds: a 256-wide linear layer
was seen to take 25 µs on one thread and 900 µs on two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SMALL_MODEL = 2e7  # parameters; a larger one waits for memory, which threads do help
_SMALL_JOB = 6e9  # floating-point operations, a tenth of a second on one core


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
