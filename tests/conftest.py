"""What all tests share: no network, and the bundled model, once a process."""

import tests.offline  # noqa: F401 - before anything can open a socket

# isort: split
import pytest
import torch

from genlm_bytes_smc import load_model

# One thread: the models here are tiny, and a pool of threads on a busy machine costs more
# than it gives.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """The bundled model as an engine, in float32 on the CPU."""
    return load_model("tiny", device="cpu", dtype=torch.float32)
