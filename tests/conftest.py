"""What several tests share: the bundled model, once a process."""

import pytest
import torch

from genlm_bytes_smc import load_model


@pytest.fixture(scope="session")
def tiny():
    """The bundled model as an engine, in float32 on the CPU."""
    return load_model("tiny", device="cpu", dtype=torch.float32)
