"""Loading by name, start tokens, and the errors a user meets there."""

import io
import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2LMHeadModel, dynamic_module_utils

from genlm_bytes_smc.cli import main
from genlm_bytes_smc.cli.options import JobOptions
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.fast_path import FastPathWarning
from genlm_bytes_smc.lm import load
from genlm_bytes_smc.lm.contexts import start_tokens
from genlm_bytes_smc.lm.files import weight_bytes
from genlm_bytes_smc.lm.load import as_engine, load_model
from genlm_bytes_smc.lookahead import Lookahead
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


def test_the_bundled_model_is_put_into_transformers_modules_when_asked_for():
    state = torch.get_rng_state()
    engine = load_model("tiny", device="cpu")
    base, contexts = engine.base, [[1, 5], [1, 5, 6], [7]]
    assert not isinstance(base, GPT2LMHeadModel) and engine._forward.decoder is not None
    assert torch.equal(torch.get_rng_state(), state)
    rows = [engine.batch_next_token_logprobs_sync(contexts)]
    for direct in (False, True, False):
        engine._forward.direct = direct
        engine.clear_cache()
        rows.append(engine.batch_next_token_logprobs_sync(contexts))
        model = engine.model  # from here on by transformers' modules
    assert type(model) is GPT2LMHeadModel and engine.base is model
    assert list(map(id, model.parameters())) == list(map(id, base.parameters()))
    for found in rows:
        assert distance(found, whole_rows(model, contexts)) < 1e-4


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_the_bundled_model_in_other_dtypes(dtype):
    engine = load_model("tiny", device="cpu", dtype=dtype)
    base, want = engine.base, getattr(torch, dtype)
    assert {p.dtype for p in base.parameters()} == {engine.model.dtype} == {want}


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
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
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


CODE = """
from pathlib import Path
Path({!r}).touch()
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class Config(GPT2Config):
    model_type = "own"
class Model(GPT2LMHeadModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def changed(path, **values):
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def with_code(tmp_path, directory, monkeypatch):
    """A model whose directory brings the code of its classes, and a file that the code makes."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "model"
    shutil.copytree(directory, path)
    (path / "code.py").write_text(CODE.format(str(tmp_path / "ran")))
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    changed(path / "config.json", model_type="own", auto_map=names)
    names = {"AutoTokenizer": [None, "code.Tokenizer"]}
    changed(path / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=names)
    return path, tmp_path / "ran"


@pytest.fixture
def says_yes(monkeypatch):
    """Whoever is asked on stdin agrees."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))


@pytest.mark.usefixtures("says_yes")
@pytest.mark.parametrize("given", [None, {}, {"trust_remote_code": None}])
def test_a_models_own_code_is_not_run_unasked(with_code, given):
    """transformers asked on stdin, and any `y` that came along there ran it."""
    path, ran = with_code
    with pytest.raises(
        ValueError, match=r"custom code.*engine_opts=.*--trust-remote-code"
    ) as error:
        load_model(path, device="cpu", engine_opts=given)
    assert "\n" not in str(error.value)
    assert not ran.exists()
    (path / "tokenizer_config.json").unlink()  # now only the model has code
    with pytest.raises(ValueError, match="custom code"):
        load_model(path, device="cpu", engine_opts=given)
    (path / "model.safetensors").unlink()
    assert weight_bytes(str(path), None) is None
    assert load._stored_dtype(str(path), False) is None
    assert not ran.exists()


def test_a_models_own_code_is_run_where_that_is_asked_for(with_code, gpt2, capsys):
    path, ran = with_code
    engine = load_model(path, device="cpu", engine_opts={"trust_remote_code": True})
    assert type(engine.model).__name__ == "Model" and ran.exists()
    assert (
        distance(engine.batch_next_token_logprobs_sync([[1, 5]]), whole_rows(gpt2, [[1, 5]])) < 1e-4
    )
    ran.unlink()
    assert load._stored_dtype(str(path), True) == torch.float32


@pytest.mark.usefixtures("says_yes")
def test_the_command_line_asks_for_it_by_an_option(with_code, capsys):
    path, ran = with_code
    assert main(["info", "--model", str(path), "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "custom code" in err and err.count("\n") == 1 and out == ""
    assert not ran.exists()
    assert main(["info", "--model", str(path), "--device", "cpu", "--trust-remote-code"]) == 0
    assert ran.exists()


def test_experiments_take_the_option_too():
    model = JobOptions(model="x", out="y", trust_remote_code=True).how()["model"]
    assert model["name"] == "x" and model["engine_opts"] == {"trust_remote_code": True}
    assert "engine_opts" not in JobOptions(model="x", out="y").how()["model"]


class Pickled:
    """Not a tensor."""


@pytest.mark.filterwarnings("ignore")  # what the libraries say of such files
@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("pytorch_model.bin", pickle.dumps(Pickled()), "pickled Python objects"),
        ("pytorch_model.bin", b"", "EOFError"),
        ("pytorch_model.bin", b"junk" * 100, "KeyError"),
        ("model.safetensors", b"", "no safetensors file"),
        ("model.safetensors", b"junk" * 9, "no safetensors file"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "no safetensors file"),
        ("model.safetensors", (10**5).to_bytes(8, "little") + b"[" * 10**5, "no safetensors file"),
        ("config.json", b"[]", "TypeError"),
        ("config.json", b"[" * 10**5, "RecursionError"),
        (
            "config.json",
            b'{"model_type": "gpt2", "n_layer": "x"}',
            "'n_layer' expected int, got str",
        ),
        ("tokenizer.json", b"{}", "KeyError"),
        ("tokenizer_config.json", b"[]", "AttributeError"),
    ],
)
def test_broken_files_are_told_of_in_one_line(tmp_path, directory, name, content, told):
    path = tmp_path / "model"
    shutil.copytree(directory, path)
    if name == "pytorch_model.bin":
        (path / "model.safetensors").unlink()
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told) as error:
        load_model(path, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # what transformers says of such files
def test_weights_that_the_files_lack_are_not_made_up(tmp_path, directory):
    path = tmp_path / "model"
    shutil.copytree(directory, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"n_layer": config["n_layer"] + 1}))
    with pytest.raises(ValueError, match=r"lack 12 of the weights .*, such as transformer\.h"):
        load_model(path, device="cpu")


def test_an_option_that_the_model_does_not_take(directory):
    with pytest.raises(ValueError, match="unexpected keyword argument 'abacus'"):
        load_model(directory, device="cpu", engine_opts={"abacus": 3})


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "cpu:1", "", 1.5, object()])
def test_unknown_devices_are_told_of_wherever_one_is_named(device):
    makes = [
        lambda: load_model("tiny", device=device),
        lambda: ByteRegex("a", device=device),
        lambda: ByteRegex("a").to(device),
        lambda: Lookahead(device=device),
    ]
    for make in makes:
        with pytest.raises(ValueError, match=r"unknown device .*; on this machine: cpu"):
            make()
    assert ByteRegex("a", device="meta").device == torch.device("meta")


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
