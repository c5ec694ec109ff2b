"""Sizes of weights told before loading, and models that do not fit."""

import json
import struct

import pytest
import torch

from genlm_bytes_smc import ModelTooLargeError, load_model
from genlm_bytes_smc.lm import files
from genlm_bytes_smc.lm.files import check_fits, check_fits_vllm, free_bytes, weight_bytes
from tests.lm.families import make_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, gpt2, tokenizer):
    path = tmp_path_factory.mktemp("sizes") / "model"
    gpt2.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def huge(tmp_path, saved):
    """A directory whose safetensors file claims 400 TB, without having them."""
    for file in saved.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    entry = {"dtype": "BF16", "shape": [10**7, 2 * 10**7], "data_offsets": [0, 4 * 10**14]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "wte.weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return tmp_path


def test_sizes_are_those_of_the_loaded_model(saved, gpt2):
    tied = {id(p): p for p in gpt2.parameters()}.values()
    count = sum(p.numel() for p in tied)
    assert weight_bytes(str(saved), None) == 4 * count
    assert weight_bytes(str(saved), torch.bfloat16) == 2 * count
    assert weight_bytes(str(saved), torch.float64) == 8 * count


def test_without_safetensors_the_configuration_tells(tmp_path, gpt2):
    gpt2.config.save_pretrained(tmp_path)
    count = sum(p.numel() for p in {id(p): p for p in gpt2.parameters()}.values())
    assert weight_bytes(str(tmp_path), torch.float32) == 4 * count
    assert weight_bytes(str(tmp_path), torch.float16) == 2 * count


def test_what_is_unknown_is_not_claimed(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    assert weight_bytes(str(tmp_path), None) is None
    assert weight_bytes("nobody/nothing", None) is None
    check_fits(str(tmp_path), None, free=1, where="here")
    check_fits("nobody/nothing", None, free=None, where="here")
    assert free_bytes(torch.device("mps")) is None


def test_quantised_weights_count_as_stored(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert weight_bytes(str(tmp_path), torch.float64) == weight_bytes(str(saved), None)


def test_a_model_too_large_is_refused_before_loading(huge, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("it was loaded")

    monkeypatch.setattr("genlm_bytes_smc.lm.load._load_hf", never)
    assert 0 < free_bytes(CPU) < 4e14
    with pytest.raises(ModelTooLargeError, match=r"take 372529\.0 GiB, and cpu has .* free"):
        load_model(huge, device="cpu")
    with pytest.raises(MemoryError, match=r"take 745058\.1 GiB"):
        load_model(huge, device="cpu", dtype="float32")
    with pytest.raises(AssertionError, match="loaded"):  # transformers may put it elsewhere
        load_model(huge, device="cpu", engine_opts={"device_map": "auto"})


def test_devices_share_the_weights_and_processes_of_one_cpu_do_not(saved, monkeypatch):
    need = weight_bytes(str(saved), None)
    with pytest.raises(ModelTooLargeError, match=r"take 0\.1 MiB, and a GPU has"):
        check_fits(str(saved), None, free=need - 1, where="a GPU")
    check_fits(str(saved), None, free=need // 2 + 1, where="a GPU", parts=2)
    with pytest.raises(ModelTooLargeError, match=r"0\.1 MiB / 2, and .* free; do without"):
        check_fits(str(saved), None, free=need // 2 - 1, where="it", parts=2, advice="do without")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(files, "free_bytes", lambda device: need // 2 + 1)
    with pytest.raises(ModelTooLargeError, match="the CPU has"):
        check_fits_vllm(str(saved), None, {"tensor_parallel_size": 2})
    check_fits_vllm(str(saved), None, {"quantization": "fp8"})


def test_a_broken_file_is_said_to_be_one(tmp_path, saved):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match="is no safetensors file"):
        weight_bytes(str(tmp_path), None)


def test_a_file_without_weights_is_refused(tmp_path, saved):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="hold no weights"):
        load_model(tmp_path, device="cpu")


def test_families_are_sized_alike(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    want = sum(p.numel() * 4 for p in model.parameters())
    assert weight_bytes(str(tmp_path), None) == want
