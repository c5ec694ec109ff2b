"""The bundled GPT-2 by torch alone, as importing transformers' modules takes longer than all else.

Parameters have the names, and the forward the arguments, that they have in transformers, so
that everything which runs a transformers model runs this one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, GenerationConfig
from transformers.pytorch_utils import Conv1D


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
        config = self.config = AutoConfig.from_pretrained(path, attn_implementation="sdpa")
        self.generation_config = GenerationConfig.from_pretrained(path)
        dtype = config.dtype if dtype is None else dtype
        weights = {k: w.to(dtype) for k, w in load_file(path / "model.safetensors").items()}
        with torch.random.fork_rng(devices=[]):  # what modules are filled with at first is lost
            self.transformer = _Body(config)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        self.load_state_dict(weights, assign=True)
        self.lm_head.weight = self.transformer.wte.weight

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.transformer.wte

    def in_transformers(self) -> nn.Module:
        """The same model as transformers has it, over the same parameters."""
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
