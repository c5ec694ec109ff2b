"""The bundled GPT-2 and its tokenizer without transformers, which takes long to import.

Parameters have the names, and the forward the arguments, that they have in transformers, so
that everything which runs a transformers model runs this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from genlm_bytes_smc.lm.spelling import BYTE_OF


class BundledConfig(SimpleNamespace):
    """The entries of a directory's configuration as attributes, under other models' names too."""

    _attn_implementation = "sdpa"
    dtype: Any

    def __init__(self, path: Path) -> None:
        super().__init__(**_json(path / "config.json"))
        self.max_position_embeddings = self.n_positions
        self.num_hidden_layers, self.num_attention_heads = self.n_layer, self.n_head
        self.dtype = getattr(torch, self.dtype)

    def get_text_config(self, decoder: bool = False) -> Self:
        """Return itself, as there is no other part."""
        return self


class BundledTokenizer:
    """What this package asks of a tokenizer, by the package tokenizers alone.

    Args:
        path: a directory in Hugging Face's format.
        load: loads the same tokenizer as transformers has it.

    Attributes:
        all_special_ids: ids of the special tokens.
        bos_token_id, eos_token_id: the token that stands before a text, and after it.
        in_transformers: `load`.
    """

    def __init__(self, path: Path, load: Callable[[], Any]) -> None:
        self.in_transformers = load
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        named, id_of = _json(path / "tokenizer_config.json"), self._tokenizer.token_to_id
        added = self._tokenizer.get_added_tokens_decoder()
        self.all_special_ids = [i for i, token in added.items() if token.special]
        self.bos_token_id, self.eos_token_id = id_of(named["bos_token"]), id_of(named["eos_token"])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text's tokens."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def token_bytes(self) -> list[bytes]:
        """Return what each token spells, by id; letters stand for bytes as in GPT-2."""
        id_of = self._tokenizer.get_vocab(with_added_tokens=True)
        special = set(self.all_special_ids)
        return [
            name.encode() if i in special else bytes(map(BYTE_OF.__getitem__, name))
            for i, name in enumerate(sorted(id_of, key=id_of.__getitem__))
        ]


class BundledGPT2(nn.Module):
    """A GPT-2 with tied embeddings and the tanh form of GELU.

    Args:
        path: a directory in Hugging Face's format.
        dtype: of the weights; None for the one that the configuration names.
        load: loads it as a transformers model.
    """

    def __init__(
        self, path: Path, dtype: torch.dtype | None, load: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self._load = load
        config = self.config = BundledConfig(path)
        self.generation_config = SimpleNamespace(**_json(path / "generation_config.json"))
        dtype = config.dtype if dtype is None else dtype
        weights = {k: w.to(dtype) for k, w in load_file(path / "model.safetensors").items()}
        with torch.random.fork_rng(devices=[]):  # what modules are filled with at first is lost
            self.transformer = _Body(config)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        self.load_state_dict(weights, assign=True)
        self.lm_head.weight = self.transformer.wte.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embeddings."""
        return self.transformer.wte

    def in_transformers(self) -> nn.Module:
        """Return the same model as transformers has it, over the same parameters."""
        model = self._load()
        model.load_state_dict(self.state_dict(keep_vars=True), assign=True)
        model.tie_weights()  # type: ignore[operator]
        return model.train(self.training)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: torch.Tensor | slice = slice(None),
    ) -> SimpleNamespace:
        """Logits float[B, T, vocabulary], in `logits`.

        Args:
            input_ids: int64[B, T].
            attention_mask: float[B or 1, 1, T, C], added to scores; None for the causal rule.
                Without `past_key_values` padding is at the end, where nothing sees it.
            position_ids: int64[B or 1, T]; None for 0, 1, ...
            past_key_values: takes the new keys and values of a layer and returns those to read.
            use_cache: taken, as transformers takes it.
            logits_to_keep: positions whose logits are wanted.
        """
        body: Any = self.transformer
        positions = slice(input_ids.shape[1]) if position_ids is None else position_ids
        x = body.wte(input_ids) + body.wpe.weight[positions]
        for i, block in enumerate(body.h):
            at = block.attn
            parts = at.c_attn(block.ln_1(x)).unflatten(-1, (3, self.config.n_head, -1))
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            mask = None
            if past_key_values is not None:
                (k, v), mask = past_key_values.update(k, v, i), attention_mask
            causal = mask is None and x.shape[1] > 1
            seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            x = x + at.c_proj(seen.transpose(1, 2).flatten(2))
            x = x + block.mlp.c_proj(block.mlp.act(block.mlp.c_fc(block.ln_2(x))))
        return SimpleNamespace(logits=self.lm_head(body.ln_f(x[:, logits_to_keep])))


class _Body(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)


class _Block(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
        self.ln_1 = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.attn: Any = nn.Module()
        self.attn.c_attn, self.attn.c_proj = Conv1D(3 * width, width), Conv1D(width, width)
        self.attn.scaling = (width // config.n_head) ** -0.5
        self.ln_2 = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.mlp: Any = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = Conv1D(inner, width), Conv1D(width, inner)
        self.mlp.act = nn.GELU(approximate="tanh")


class Conv1D(nn.Module):
    """A linear layer with its weight float[in, out], as GPT-2 keeps it."""

    def __init__(self, wide: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, wide))
        self.bias = nn.Parameter(torch.empty(wide))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float[..., out] of float[..., in]."""
        return torch.nn.functional.linear(x, self.weight.T, self.bias)


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found
