"""What must be known of a transformers model to run it, read off its configuration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from genlm_bytes_smc.fast_path import Way

# Families that never took position ids, or keys and values to go on from.
_WITHOUT = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "bloom", "cpmant", "marian",
    "mbart", "mpt", "musicgen", "musicgen_melody", "mvp", "openai-gpt", "pegasus", "plbart",
    "prophetnet", "reformer", "roformer", "trocr", "whisper", "xlnet",
}  # fmt: skip
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
_MASKED = {"sdpa", "eager"}  # attention implementations that take any 4-D mask


@dataclass(frozen=True)
class Architecture:
    """The facts about one model that decide how it is run.

    Attributes:
        window: the most tokens a context may have, or None.
        layers: number of layers.
        sliding: tokens that a position of a sliding-window layer sees, itself included, or
            None if every layer sees everything.
        mixed: whether some layers slide and others do not: these models take one mask a kind.
        eager: whether attention needs its causal mask spelled out, and keeps its weights.
        heads: attention heads.
        row_index: whether the model can apply its head to chosen positions only.
        masks_padding: whether the model takes a mask of padding.
        reach: contexts longer than this are computed with other position encodings
            (`longrope`) and share no keys with shorter ones; None if there is no such length.
        cache_name: what the model's forward calls the argument for keys and values; "" if it
            takes none.
        fixed_turns: whether rotary positions, if it has them, are turned alike in all forwards.
        refusal: "whole" and why, if the model's own modules cannot use the tree cache; None if
            they can, as far as the configuration tells.
    """

    window: int | None
    layers: int
    sliding: int | None
    mixed: bool
    eager: bool
    heads: int
    row_index: bool
    masks_padding: bool
    reach: int | None
    cache_name: str
    fixed_turns: bool
    refusal: Way | None

    @classmethod
    def of(cls, model: Any) -> Architecture:
        """Read a transformers causal language model."""
        config = model.config.get_text_config(decoder=True)
        takes = inspect.signature(model.forward).parameters
        kinds = set(getattr(config, "layer_types", None) or ())
        sliding = getattr(config, "sliding_window", None)
        if kinds and "sliding_attention" not in kinds:
            sliding = None
        never, missing = _never(model, config, kinds), _missing(model, config, set(takes))
        return cls(
            window=getattr(config, "max_position_embeddings", None),
            layers=int(getattr(config, "num_hidden_layers", 0)),
            sliding=sliding,
            mixed=len(kinds) > 1,
            eager=_implementation(model) != "sdpa",
            heads=int(getattr(config, "num_attention_heads", 1) or 1),
            row_index="logits_to_keep" in takes,
            masks_padding="attention_mask" in takes,
            reach=_reach(config),
            cache_name=next((name for name in _CACHE_NAMES if name in takes), ""),
            fixed_turns=not _rope_kinds(config) & {"dynamic", "longrope"},
            refusal=Way("whole", reason, never is None) if (reason := never or missing) else None,
        )


def _implementation(model: Any) -> str:
    return str(getattr(model.config, "_attn_implementation", None) or "eager")


def _never(model: Any, config: Any, kinds: set[str]) -> str | None:
    """Why models of this family have no tree cache; None if they should."""
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state, not keys and values"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if kinds - _KNOWN_LAYERS:
        return f"it has layers of type {', '.join(sorted(kinds - _KNOWN_LAYERS))}"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention goes by distance in memory"
    if getattr(config, "alibi", False):
        return "its attention (ALiBi) goes by distance in memory"
    if getattr(config, "model_type", None) in _WITHOUT:
        return "models of its kind take no position ids, or no keys and values to go on from"
    return None


def _missing(model: Any, config: Any, takes: set[str]) -> str | None:
    """Return what the tree cache needs of a model and this one lacks, or None."""
    for names in (_CACHE_NAMES, ("position_ids",), ("attention_mask",)):
        if not takes.intersection(names):
            return f"its forward takes no argument {' or '.join(names)}"
    if _implementation(model) not in _MASKED:
        return (
            f"its attention implementation, {_implementation(model)}, takes no tree mask; load "
            'it with attn_implementation="sdpa"'
        )
    if not getattr(config, "num_hidden_layers", 0):
        return "its configuration does not say how many layers it has"
    return None


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the settings of rotary positions, one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return []
    return [rope, *(v for v in rope.values() if isinstance(v, dict))]


def _rope_kinds(config: Any) -> set[Any]:
    return {rope.get("rope_type", rope.get("type")) for rope in _ropes(config)}


def _reach(config: Any) -> int | None:
    limits = [
        r.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for r in _ropes(config)
        if r.get("rope_type", r.get("type")) == "longrope"
    ]
    return min((int(n) for n in limits if n), default=None)
