"""Loading by name, start tokens, and the errors a user meets there."""

from types import SimpleNamespace

import pytest
import torch

from genlm_bytes_smc.fast_path import FastPathWarning
from genlm_bytes_smc.lm import load
from genlm_bytes_smc.lm.load import as_engine, load_model
from genlm_bytes_smc.lm.start import start_tokens
from tests.lm.families import distance, make_tokenizer, whole_rows


@pytest.fixture(scope="module")
def directory(tmp_path_factory, gpt2, tokenizer):
    path = tmp_path_factory.mktemp("models") / "small"
    gpt2.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("as_text", [True, False])
def test_a_directory(directory, gpt2, as_text):
    engine = load_model(str(directory) if as_text else directory, device="cpu", limit_bytes=9999)
    assert engine.cached
    assert engine.start == (1,)
    assert engine.limit_bytes == 9999
    contexts = [[1, 5], [1, 5, 6]]
    rows = engine.batch_next_token_logprobs_sync(contexts)
    assert distance(rows, whole_rows(gpt2, contexts)) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_start_and_engine_opts(directory, dtype):
    opts = {"attn_implementation": "eager"}
    with pytest.warns(FastPathWarning, match="'modules', .* attn_implementation='eager'"):
        engine = load_model(directory, dtype=dtype, start=[1, 2], engine_opts=opts, device="cpu")
    assert engine.model.dtype == torch.bfloat16
    assert engine.model.config._attn_implementation == "eager"
    assert engine.start == (1, 2)
    assert engine.next_token_logprobs_sync([1, 5]).dtype == torch.float32


def test_the_bundled_model(capfd):
    engine = load_model("tiny", device="cpu")
    assert engine.cached
    row = engine.next_token_logprobs_sync([*engine.start, *engine.tokenizer.encode("The ")])
    assert float(row.exp().sum()) == pytest.approx(1.0, abs=1e-4)
    assert capfd.readouterr() == ("", "")


def test_loaded_models_are_taken_as_they_are(engine):
    assert load_model(engine) is engine
    assert as_engine(engine) is engine
    with pytest.raises(ValueError, match="TreeTransformer is loaded already"):
        load_model(engine, device="cpu")
    with pytest.raises(TypeError, match="got NoneType"):
        load_model(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tgi"}, "unknown backend 'tgi'; known: hf, vllm, mlx, sgl"),
        ({"dtype": "int3"}, "unknown dtype 'int3'; known: auto, float64, float32"),
        ({"dtype": torch.int8}, "unknown dtype torch.int8"),
        ({"device": "abacus"}, "unknown device 'abacus'; on this machine: cpu"),
        ({"device": "cuda:99"}, "unknown device 'cuda:99'; on this machine: cpu"),
        ({"device": "cpu:1"}, "unknown device 'cpu:1'"),
        ({"backend": "vllm", "device": "cpu"}, "device and limit_bytes apply to backend 'hf'"),
        ({"backend": "mlx", "limit_bytes": 3}, "device and limit_bytes apply to backend 'hf'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        load_model("tiny", **options)


@pytest.mark.parametrize("backend", ["vllm", "mlx", "sgl"])
def test_a_missing_package_names_the_extra(backend, monkeypatch):
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf'pip install "genlm-bytes-smc\[{backend}\]"'):
        load_model("some/model", backend)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/place", "~/nowhere/at/all", "a/path/too/deep"]
)
def test_missing_directories(name):
    with pytest.raises(FileNotFoundError, match="no such model directory") as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_unknown_names_are_one_line_and_no_traceback_of_the_hub(monkeypatch):
    monkeypatch.setattr(load, "_hub_in_reach", lambda: False)
    with pytest.raises(FileNotFoundError, match="cannot load model 'nobody/nothing'") as error:
        load_model("nobody/nothing")
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ValueError, match="cannot load the model in"):
        load_model(tmp_path)


# -- start tokens ----------------------------------------------------------------------


def test_start_is_what_the_user_gives_then_bos(tokenizer):
    assert start_tokens(tokenizer) == (1,)
    assert start_tokens(tokenizer, 7) == (7,)
    assert start_tokens(tokenizer, [1, 7]) == (1, 7)
    assert start_tokens(SimpleNamespace(bos_token_id=0, eos_token_id=5)) == (0,)


def test_without_bos_the_document_separator_begins_a_text():
    qwen = make_tokenizer(bos_token=None)
    assert start_tokens(qwen) == (2,)
    qwen.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|endoftext|>"]})
    assert start_tokens(qwen) == (qwen.convert_tokens_to_ids("<|endoftext|>"),)
    padded = SimpleNamespace(bos_token_id=None, eos_token_id=None, pad_token_id=4)
    assert start_tokens(padded) == (4,)


@pytest.mark.parametrize(
    ("start", "error"),
    [([], ValueError), (-1, ValueError), ([1, -2], ValueError), ("abc", TypeError)],
)
def test_starts_that_cannot_be(tokenizer, start, error):
    with pytest.raises(error, match="start must be"):
        start_tokens(tokenizer, start)
    with pytest.raises(TypeError, match="start must be"):
        start_tokens(tokenizer, 1.5)


def test_nothing_to_begin_with():
    for tokenizer in (None, SimpleNamespace(bos_token_id=None)):
        with pytest.raises(ValueError, match="start="):
            start_tokens(tokenizer)
