"""vLLM itself, run on the CPU with the bundled model: `make test-vllm`. Skipped without vLLM.

(Warnings are no errors there: vLLM's imports and start-up are full of them.) With
TRITON_INTERPRET=1 vLLM's second model runner runs instead of the first; see on_cpu.py.
"""

import importlib.util

import tests.vllm.on_cpu  # noqa: F401 - before anything imports vLLM

# isort: split
import pytest

from tests.offline.sitecustomize import ALLOWED

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _sockets():
    """vLLM finds out the machine's address by a socket, and its workers use that address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ALLOWED, "1")
        yield


@pytest.fixture(scope="session")
def engine():
    """The bundled model behind vLLM, in float32 on the CPU, with vLLM's own statistics."""
    from genlm_bytes_smc import load_model

    with load_model("tiny", backend="vllm", engine_opts={"disable_log_stats": False}) as engine:
        yield engine
