"""What vLLM is told by the environment holds while it is needed, and no longer."""

import os
import random
import runpy

import numpy as np
import pytest
import torch
from tqdm import tqdm

from genlm_bytes_smc import load_model
from genlm_bytes_smc.lm.vllm import env
from genlm_bytes_smc.lm.vllm.env import ALWAYS, Setting, process_kept


@pytest.fixture
def variables(monkeypatch):
    monkeypatch.setenv("TOLD_BEFORE", "1")
    monkeypatch.setenv("KEPT", "mine")
    monkeypatch.delenv("NEW", raising=False)
    monkeypatch.delenv("FALLBACK", raising=False)
    return lambda: {k: os.environ.get(k) for k in ("TOLD_BEFORE", "KEPT", "NEW", "FALLBACK")}


def test_variables_hold_until_the_last_lets_go(variables, monkeypatch):
    before, threads = variables(), torch.set_num_threads
    setting = Setting({"TOLD_BEFORE": "0", "NEW": "0"}, {"KEPT": "theirs", "FALLBACK": "1"})
    setting.hold()
    inside = {"TOLD_BEFORE": "0", "KEPT": "mine", "NEW": "0", "FALLBACK": "1"}
    assert variables() == inside
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # as vLLM does on a CPU
    setting.hold()
    assert setting.release() is False
    assert variables() == inside
    assert setting.release() is True
    assert variables() == before
    assert torch.set_num_threads is threads
    assert setting.holders == 0


def test_generators_and_progress_bars_are_left_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    want = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    interval = tqdm.monitor_interval
    with process_kept():
        assert tqdm.monitor_interval == 0
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == want
    assert tqdm.monitor_interval == interval


@pytest.mark.parametrize("told", [{}, ALWAYS], ids=["on its own", "in a worker"])
def test_a_worker_sets_again_what_genlm_backend_sets_otherwise(told, monkeypatch):
    monkeypatch.delenv("GENLM_BYTES_SMC_VLLM", raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # genlm-backend, as it is imported
    runpy.run_path(env.__file__)
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == ("0" if told else "1")


def test_without_vllm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "genlm-bytes-smc\[vllm\]"'):
        load_model("tiny", backend="vllm")
