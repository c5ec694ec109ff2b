"""Small random models of many families, and a tokenizer for them."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from genlm_bytes_smc.fast_path import FastPathWarning, Way
from genlm_bytes_smc.lm.transformer import TreeTransformer

WINDOW = 48  # the most tokens of a context
SLIDING = 6  # tokens that sliding-window layers see
_MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("Ġ", "the"), ("an", "d")]
VOCAB = 3 + 256 + len(_MERGES)

# Large initial weights: attention must matter, or a wrong mask would go unseen.
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": WINDOW,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_SLIDES = {"sliding_window": SLIDING}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **_SLIDES}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_OLD = {"vocab_size": VOCAB, "hidden_size": 32, "initializer_range": 0.3}


_PHI3_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 12,
    "factor": 4.0,
}
_NEO = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": WINDOW,
    "attention_types": [[["global", "local"], 1]],
    "window_size": SLIDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (tf.GPT2Config, _GPT2),
    "gpt2-eager": (tf.GPT2Config, {**_GPT2, "attn_implementation": "eager"}),
    "llama": (tf.LlamaConfig, _COMMON),
    "qwen2": (tf.Qwen2Config, _COMMON),
    "qwen2-mixed": (
        tf.Qwen2Config,
        {**_COMMON, **_SLIDES, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": (tf.Qwen3Config, {**_COMMON, "head_dim": 8}),
    "mistral": (tf.MistralConfig, {**_COMMON, **_SLIDES}),
    "phi3": (tf.Phi3Config, {**_COMMON, **_SLIDES}),
    "phi3-longrope": (
        tf.Phi3Config,
        {**_COMMON, "original_max_position_embeddings": 12, "rope_parameters": _PHI3_LONG},
    ),
    "gemma": (tf.GemmaConfig, {**_COMMON, "head_dim": 8}),
    "gemma2": (tf.Gemma2Config, {**_COMMON, **_GEMMA, "attn_logit_softcapping": 20.0}),
    "gemma3": (tf.Gemma3TextConfig, {**_COMMON, **_GEMMA, **_MIXED}),
    "gpt-neox": (tf.GPTNeoXConfig, _COMMON),
    "olmo2": (tf.Olmo2Config, _COMMON),
    "smollm3": (tf.SmolLM3Config, _COMMON),
    "gpt-oss": (
        tf.GptOssConfig,
        {**_COMMON, **_SLIDES, **_MIXED, **_EXPERTS, **_ROPE, "head_dim": 8},
    ),
    "mamba": (tf.MambaConfig, {**_OLD, "num_hidden_layers": 2}),
    "bloom": (tf.BloomConfig, {**_OLD, "n_layer": 2, "n_head": 4}),
    "gpt-neo": (tf.GPTNeoConfig, {**_OLD, **_NEO}),
    "falcon-alibi": (
        tf.FalconConfig,
        {**_OLD, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    ),
}


CACHED = (
    "gpt2",
    "gpt2-eager",
    "llama",
    "qwen2",
    "qwen2-mixed",
    "qwen3",
    "mistral",
    "phi3",
    "phi3-longrope",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt-neox",
    "olmo2",
    "smollm3",
    "gpt-oss",
)
WRITTEN_OUT = ("gpt2", "llama", "mistral", "qwen2", "qwen2-mixed", "qwen3")
UNCACHED = ("mamba", "bloom", "gpt-neo", "falcon-alibi")
WINDOWED = ("qwen2-mixed", "mistral", "phi3", "gemma2", "gemma3", "gpt-oss")


def forward_of(family: str) -> str:
    """The forward that a family runs by."""
    if family in UNCACHED:
        return "whole"
    return "written out" if family in WRITTEN_OUT else "modules"


def make_model(family: str, seed: int = 0) -> Any:
    """A random model, in float32 on the CPU."""
    torch.manual_seed(seed)
    kind, options = _CONFIGS[family]
    return tf.AutoModelForCausalLM.from_config(kind(**options)).float().eval()


def make_engine(model: Any, tokenizer: Any) -> TreeTransformer:
    """Its engine; a model with eager attention is slower than it could be, which is told."""
    eager = model.config._attn_implementation == "eager" and model.config.model_type == "gpt2"
    told = pytest.warns(FastPathWarning, match="attn_implementation='eager'")
    with told if eager else nullcontext():
        return TreeTransformer(model, tokenizer)


def use_forward(engine: TreeTransformer, name: str) -> None:
    """Have it run by this forward, or again by the one it chose ("written out"), in silence."""
    engine._told_forward = True
    engine._forward.doubt = None if name == "written out" else "a test wants it so"
    engine._forward.refusal = Way("whole", "a test wants it so") if name == "whole" else None
    assert engine.forward == name


def make_tokenizer(**special: str | None) -> Any:
    """A byte-level BPE tokenizer with a few merges."""
    alphabet = bytes_to_unicode()
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[alphabet[byte]] = len(vocab)
    for left, right in _MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def whole_rows(model: Any, contexts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows by one whole forward a context: the oracle."""
    with torch.no_grad():
        return torch.stack(
            [
                torch.log_softmax(model(torch.tensor([list(c)]), use_cache=False).logits[0, -1], -1)
                for c in contexts
            ]
        )


def random_contexts(
    rng: np.random.Generator, known: list[list[int]], count: int, longest: int = WINDOW - 8
) -> list[list[int]]:
    """Contexts that extend known ones by 0 to 7 tokens (and are added to them)."""
    out = []
    for _ in range(count):
        base = known[int(rng.integers(len(known)))]
        more = rng.integers(0, VOCAB, size=int(rng.choice([0, 1, 1, 1, 2, 7]))).tolist()
        out.append([*base, *more][:longest])
    known += out
    return out


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference in nats."""
    return float((a - b).abs().max())
