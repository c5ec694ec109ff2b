"""vLLM itself, run on the CPU with the bundled model: `make test-vllm`. Skipped without vLLM.

(Warnings are no errors there: vLLM's imports and start-up are full of them.)
"""

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def engine():
    """The bundled model behind vLLM, in float32 on the CPU, with vLLM's own statistics."""
    from genlm_bytes_smc import load_model

    with load_model("tiny", backend="vllm", engine_opts={"disable_log_stats": False}) as engine:
        yield engine
