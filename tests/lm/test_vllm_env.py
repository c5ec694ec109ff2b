"""What vLLM is told by the environment holds while it is needed, and no longer."""

import os
import random
import runpy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from tqdm import tqdm

from genlm_bytes_smc import load_model
from genlm_bytes_smc.lm import vllm_env as env
from genlm_bytes_smc.lm.vllm_env import Setting, process_kept


@pytest.fixture
def variables(monkeypatch):
    monkeypatch.setenv("TOLD_BEFORE", "1")
    monkeypatch.setenv("KEPT", "mine")
    monkeypatch.setenv("THEIRS", "1")
    monkeypatch.setenv("CHOSEN", "0")
    monkeypatch.delenv("NEW", raising=False)
    monkeypatch.delenv("FALLBACK", raising=False)
    names = "TOLD_BEFORE", "KEPT", "NEW", "FALLBACK", "THEIRS", "CHOSEN"
    return lambda: {k: os.environ.get(k) for k in names}


def test_variables_hold_until_the_last_lets_go(variables, monkeypatch):
    before, threads = variables(), torch.set_num_threads
    setting = Setting(
        {"TOLD_BEFORE": "0", "NEW": "0"},
        {"KEPT": "theirs", "FALLBACK": "1"},
        {"THEIRS": "1", "CHOSEN": "1"},
    )
    setting.hold()
    inside = {"TOLD_BEFORE": "0", "KEPT": "mine", "NEW": "0", "FALLBACK": "1"}
    inside |= {"THEIRS": None, "CHOSEN": "0"}
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


@pytest.fixture
def an_installed_vllm(monkeypatch, tmp_path):
    """Stands in vLLM's place among the modules: a folder whose contents a test chooses."""
    vllm = ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None, is_package=True)
    vllm.__spec__.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for name in (*env.ALWAYS, *env.UNLESS_SET, *env.AWAY):  # to be put back after the test
        monkeypatch.setenv(name, "1")  # genlm-backend, as it is imported, and a worker
    return tmp_path


@pytest.mark.parametrize("processors", [False, True], ids=["none", "processors"])
def test_a_worker_allows_the_second_runner_where_it_has_logits_processors(
    processors, an_installed_vllm, monkeypatch
):
    folder = an_installed_vllm / "v1" / "worker" / "gpu" / "sample"
    (folder / "logits_processor" if processors else folder).mkdir(parents=True)
    runpy.run_path(env.__file__)
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == (None if processors else "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # a user's choice stays
    runpy.run_path(env.__file__)
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_only_a_worker_sets_them_on_import(an_installed_vllm, monkeypatch):
    monkeypatch.delenv("GENLM_BYTES_SMC_VLLM")
    runpy.run_path(env.__file__)
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"


def test_without_vllm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "genlm-bytes-smc\[vllm\]"'):
        load_model("tiny", backend="vllm")
