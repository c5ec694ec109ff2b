"""The forward of common decoders written out, without their modules' cost.

A transformers model spends half a millisecond to some tens of milliseconds of a forward in
Python: hooks, configuration look-ups, cache and mask objects, for every layer. With a few new
tokens a step that is most of the time. Here the same arithmetic runs on the model's own
parameters as a plain sequence of tensor operations. Which models it knows is decided by their
exact classes, and a model with hooks, adapters or quantised layers is left to its own modules;
`TreeTransformer` compares the rows with those of whole forwards before it trusts them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from genlm_bytes_smc.fast_path import Way
from genlm_bytes_smc.lm.bundled import BundledGPT2
from genlm_bytes_smc.lm.devices import Linear, is_linear, layout
from genlm_bytes_smc.lm.kv_buffer import KVBuffer

Masks = dict[str, torch.Tensor] | torch.Tensor | None
_Norm = Callable[[torch.Tensor], torch.Tensor]


class Attend(ABC):
    """Attention of one forward, and what else is done otherwise on another device."""

    @abstractmethod
    def layer(self, kind: str, i: int, qkv: torch.Tensor, turn: Any, scale: float) -> torch.Tensor:
        """Keep the new keys and values of layer `i`; let every query see what it may.

        Args:
            kind: of the layer: "full_attention" or "sliding_attention".
            i: its index.
            qkv: float[T, heads + 2 kv_heads, head_dim]; may be written on.
            turn: what `Decoder.turn` gave, None where nothing is turned.
            scale: of the scores.

        Returns:
            float[T, heads * head_dim].
        """

    def gate(self, both: torch.Tensor, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return act(gate) * value, float[T, m], of [T, 2 m], gates first."""
        gate, value = both.chunk(2, dim=-1)
        return act(gate) * value


@dataclass(frozen=True)
class Layer:
    """The parts of one layer.

    Attributes:
        into: to queries, keys and values side by side.
        up: to gates and values if the MLP is gated.
        norm_q, norm_k: where heads are normalised one by one.
    """

    norm: _Norm
    into: Linear
    scale: float
    out: Linear
    norm_mlp: _Norm
    up: Linear
    act: Callable[[torch.Tensor], torch.Tensor]
    down: Linear
    gated: bool = False
    norm_q: _Norm | None = None
    norm_k: _Norm | None = None


class Decoder:
    """A decoder's layers over keys and values that an `Attend` keeps.

    Args:
        model: a transformers causal language model that `decoder_of` knows.
        pack_bytes: most memory for a second copy of the weights, laid out for few positions.
        norm: what is applied before the head.

    Attributes:
        weights: "packed" if there is that copy, else "plain", and why.
        heads, kv_heads, width: of attention; `width` is a head's.
        layers: the parts of each layer.
    """

    layers: list[Layer]

    def __init__(self, model: Any, pack_bytes: int, norm: _Norm) -> None:
        config = model.config
        kinds = getattr(config, "layer_types", None)
        self.kinds: list[str] = list(kinds or ["full_attention"] * config.num_hidden_layers)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.weights = layout(model.get_input_embeddings().weight)
        if self.weights == "packed" and size > pack_bytes:
            self.weights = Way(
                "plain", f"they take {size:,} bytes, and pack_bytes is {pack_bytes:,}"
            )
        self.packed = self.weights == "packed"
        self.embedding: torch.Tensor = model.get_input_embeddings().weight.detach()
        self._last, self._head = norm, Linear([model.lm_head], self.packed)
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.width: int = int(self.embedding.shape[1]) // self.heads

    def body(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Compute what leaves the last layer, float[T, d].

        tokens, positions: int64[T]; a position is a context's depth less one.
        """
        x = self.embed(tokens, positions)
        turn = self.turn(x, positions)
        heads, turned = self.heads, self.heads + self.kv_heads
        for i, (kind, at) in enumerate(zip(self.kinds, self.layers, strict=True)):
            qkv = at.into(at.norm(x)).view(x.shape[0], -1, self.width)
            if at.norm_q is not None and at.norm_k is not None:
                qkv[:, :heads] = at.norm_q(qkv[:, :heads])
                qkv[:, heads:turned] = at.norm_k(qkv[:, heads:turned])
            x = at.out.onto(x, attend.layer(kind, i, qkv, turn, at.scale))
            up = at.up(at.norm_mlp(x))
            x = at.down.onto(x, attend.gate(up, at.act) if at.gated else at.act(up))
        return x

    def logits(self, x: torch.Tensor, asked: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the last norm and the head to float[T, d], or to its rows `asked`, int64[R]."""
        return self._head(self._last(x if asked is None else x[asked]))

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what enters the first layer, float[T, d]: token embeddings unless overridden."""
        return self.embedding[tokens]

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> Any:
        """Compute once what all layers need to know of the positions; None unless overridden."""
        return None


class GPT2Decoder(Decoder):
    """GPT-2: learned positions, one product for queries, keys and values."""

    def __init__(self, model: Any, pack_bytes: int) -> None:
        body = model.transformer
        super().__init__(model, pack_bytes, _layer_norm(body.ln_f))
        self._positions: torch.Tensor = body.wpe.weight.detach()
        scale = (body.wte.weight.shape[1] / self.heads) ** -0.5
        scale = scale if model.config.scale_attn_weights else 1.0
        layered = model.config.scale_attn_by_inverse_layer_idx
        self.layers = [
            Layer(
                norm=_layer_norm(block.ln_1),
                into=Linear([block.attn.c_attn], self.packed),
                scale=scale / (i + 1) if layered else scale,
                out=Linear([block.attn.c_proj], self.packed),
                norm_mlp=_layer_norm(block.ln_2),
                up=Linear([block.mlp.c_fc], self.packed),
                act=block.mlp.act,
                down=Linear([block.mlp.c_proj], self.packed),
            )
            for i, block in enumerate(body.h)
        ]

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Add token and position embeddings."""
        return self.embedding[tokens] + self._positions[positions]


class LlamaDecoder(Decoder):
    """Llama and its relatives: rotary positions, grouped heads, a gated MLP."""

    def __init__(self, model: Any, pack_bytes: int) -> None:
        body = model.model
        super().__init__(model, pack_bytes, _rms_norm(body.norm))
        self.width = body.layers[0].self_attn.head_dim
        self._rotary = body.rotary_emb
        self.layers = [self._layer_of(x) for x in body.layers[: len(self.kinds)]]

    def _layer_of(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        own = hasattr(attention, "q_norm")  # Qwen 3
        return Layer(
            norm=_rms_norm(layer.input_layernorm),
            into=Linear([attention.q_proj, attention.k_proj, attention.v_proj], self.packed),
            norm_q=_rms_norm(attention.q_norm) if own else None,
            norm_k=_rms_norm(attention.k_norm) if own else None,
            scale=attention.scaling,
            out=Linear([attention.o_proj], self.packed),
            norm_mlp=_rms_norm(layer.post_attention_layernorm),
            up=Linear([mlp.gate_proj, mlp.up_proj], self.packed),
            act=mlp.act_fn,
            down=Linear([mlp.down_proj], self.packed),
            gated=True,
        )

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines float[T, 1, head_dim], and sines of their first half."""
        cos, sin = self._rotary(x[None], positions[None])
        return cos[0, :, None], sin[0, :, None, : self.width // 2]


class LaidOut(Attend):
    """Attention by torch's operations, over keys laid out as an `Attention` says.

    Args:
        masks: float[1, 1, T, C], or [T, 1, 1, C] if `batched`, added to attention's scores; by
            kind of layer if they differ; None for the causal rule.
        buffer: prepared for this forward.
        batched: whether each position reads keys of its own.
        decoder: whose forward it is.
    """

    def __init__(self, masks: Masks, buffer: KVBuffer, batched: bool, decoder: Decoder) -> None:
        self.masks, self.buffer, self.batched = masks, buffer, batched
        self.heads, self.turned = decoder.heads, decoder.heads + decoder.kv_heads
        self._spread: dict[tuple[int, int], torch.Tensor] = {}

    def layer(self, kind: str, i: int, qkv: torch.Tensor, turn: Any, scale: float) -> torch.Tensor:
        """See `Attend`."""
        mask = self.masks[kind] if isinstance(self.masks, dict) else self.masks
        qk, v = qkv[:, : self.turned], qkv[:, self.turned :]
        if turn is not None:
            qk = _rotate(qk, *turn)
        q, k = qk[:, : self.heads], qk[:, self.heads :]
        keys, values = self.buffer.update(self._lay(k), self._lay(v), i)
        out = self._scored(self._lay(q), keys, values, mask, scale)
        return out.transpose(1, 2).reshape(q.shape[0], -1)

    def _lay(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads, width] as [1, heads, T, width], or [T, heads, 1, width] if batched."""
        return x[:, :, None] if self.batched else x.transpose(0, 1)[None]

    def _scored(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        batch, heads, count, width = q.shape
        groups = heads // keys.shape[1]
        causal = mask is None and count > 1
        if groups > 1 and not causal and count <= keys.shape[1] * width:
            # Queries that share a key/value head stand below each other: keys are not copied.
            q = q.reshape(batch, -1, groups * count, width)
            spread = self._spread_mask(mask, groups)
            out = scaled_dot_product_attention(q, keys, values, spread, scale=scale)
            return out.reshape(batch, heads, count, width)
        if groups > 1:
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        return scaled_dot_product_attention(q, keys, values, mask, is_causal=causal, scale=scale)

    def _spread_mask(self, mask: torch.Tensor | None, groups: int) -> torch.Tensor | None:
        """Return the mask repeated for each query of a group, made once for all layers."""
        if mask is None or mask.shape[2] == 1:
            return mask
        key = (id(mask), groups)
        if key not in self._spread:
            self._spread[key] = mask.repeat(1, 1, groups, 1)
        return self._spread[key]


def _layer_norm(module: Any) -> _Norm:
    shape, eps = list(module.normalized_shape), module.eps
    weight, bias = module.weight.detach(), module.bias.detach()
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def _rms_norm(module: Any) -> _Norm:
    weight, eps = module.weight.detach(), module.variance_epsilon
    shape = list(weight.shape)
    return lambda x: torch.rms_norm(x, shape, weight, eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, half against half (Su et al. 2021, equation 34, as Llama pairs it)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = x * cos
    out[..., :half].addcmul_(second, sin, value=-1)
    out[..., half:].addcmul_(first, sin)
    return out


# By name, as importing one of these classes takes seconds. No two of transformers share a name.
_Make = Callable[[Any, int], Decoder]
_KNOWN: dict[str, _Make] = {
    "GPT2LMHeadModel": GPT2Decoder,
    "LlamaForCausalLM": LlamaDecoder,
    "MistralForCausalLM": LlamaDecoder,
    "Qwen2ForCausalLM": LlamaDecoder,
    "Qwen3ForCausalLM": LlamaDecoder,
}


def is_known(model: Any) -> bool:
    """Return whether models of this class can be written out."""
    return _known(type(model)) is not None


def decoder_of(model: Any, pack_bytes: int = 0) -> Decoder | str:
    """Return the model's forward written out, or why it must run by its own modules.

    It takes the model's weights, and depends on no argument of the forward it stands for.
    """
    known = _known(type(model))
    if known is None:
        return f"the forward of {type(model).__name__} is not written out"
    if reason := _obstacle(model):
        return reason
    try:
        with torch.inference_mode(False), torch.no_grad():
            return known(model, pack_bytes)
    except (AttributeError, TypeError) as error:  # modules that are built otherwise than we know
        return f"its modules are not as expected ({type(error).__name__}: {error})"


def _known(kind: type) -> _Make | None:
    if kind is BundledGPT2:
        return GPT2Decoder
    ours = kind.__module__.startswith("transformers.models.")  # no subclass of the same name
    return _KNOWN.get(kind.__name__) if ours else None


def is_hooked(module: Any) -> bool:
    """Return whether something watches or replaces the forward of this module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _obstacle(model: Any) -> str | None:
    """Return what keeps a model from being written out, or None.

    All modules must be transformers', torch's or our own, and unwatched, and all weights of one
    dtype on one device.
    """
    attention = model.config._attn_implementation
    if attention != "sdpa":
        return f"it was loaded with attn_implementation={attention!r}, not 'sdpa'"
    own = ("transformers.", "torch.", BundledGPT2.__module__)
    for name, module in model.named_modules():
        kind, weight = type(module), getattr(module, "weight", None)
        if is_hooked(module):
            return f"something watches or replaces the forward of {name or 'the model'}"
        matrix = weight is not None and weight.ndim == 2
        if not kind.__module__.startswith(own) or (
            matrix and not is_linear(module) and kind is not torch.nn.Embedding
        ):
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
    kinds = {f"{p.dtype} on {p.device}" for p in model.parameters()}
    return None if len(kinds) == 1 else f"its weights are {' and '.join(sorted(kinds))}"
