"""One forward over part of a context tree: host plans in, logits out.

What must be known of a model to run it is read off its configuration (`Architecture`).
"""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from genlm_bytes_smc.fast_path import Way, warn_lost
from genlm_bytes_smc.lm.bundled import BundledGPT2
from genlm_bytes_smc.lm.contexts import ContextTree, IntArray
from genlm_bytes_smc.lm.decoder import Decoder, LaidOut, Masks, decoder_of, is_hooked, is_known
from genlm_bytes_smc.lm.devices import costs_on, send
from genlm_bytes_smc.lm.kv_buffer import KVBuffer, transformers_buffer
from genlm_bytes_smc.lm.tree_cache import (
    MOST_ENTRIES,
    MOST_POSITIONS,
    Attention,
    Layout,
    MaskArray,
    Paths,
    TreeCache,
    attend,
)

if TYPE_CHECKING:
    from genlm_bytes_smc.lm.paged import PagedForward

_UNLIMITED = 1 << 40

# Families that never took position ids, or keys and values to go on from.
_WITHOUT = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "bloom", "cpmant", "marian",
    "mbart", "mpt", "musicgen", "musicgen_melody", "mvp", "openai-gpt", "pegasus", "plbart",
    "prophetnet", "reformer", "roformer", "trocr", "whisper", "xlnet",
}  # fmt: skip
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
_MASKED = {"sdpa", "eager"}  # attention implementations that take any 4-D mask

_PAGED = (torch.float32, torch.bfloat16, torch.float16)


class Architecture:
    """The facts about one model that decide how it is run.

    Args:
        model: a transformers causal language model.

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

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        takes = inspect.signature(model.forward).parameters
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "max_position_embeddings", None)
        self.window: int | None = None if window == -1 else window  # XLNet's way to say "no limit"
        self.layers = int(getattr(config, "num_hidden_layers", 0))
        slides = not kinds or "sliding_attention" in kinds
        self.sliding: int | None = getattr(config, "sliding_window", None) if slides else None
        self.mixed = len(kinds) > 1
        self.eager = _implementation(model) != "sdpa"
        self.heads = int(getattr(config, "num_attention_heads", 1) or 1)
        self.row_index = "logits_to_keep" in takes
        self.masks_padding = "attention_mask" in takes
        self.reach = _reach(config)
        self.cache_name = next((name for name in _CACHE_NAMES if name in takes), "")
        self.fixed_turns = not {kind for kind, _ in _ropes(config)} & {"dynamic", "longrope"}
        never = _never(model, config, kinds)
        reason = never or _missing(model, config, set(takes))
        self.refusal = None if reason is None else Way("whole", reason, never is None)


def _implementation(model: Any) -> str:
    return str(getattr(model.config, "_attn_implementation", None) or "eager")


def _never(model: Any, config: Any, kinds: set[str]) -> str | None:
    """Why models of this family have no tree cache; None if they should. Others are refused."""
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):  # not "vision"
        raise ValueError(
            "expected a causal language model, got one whose positions see later tokens "
            "(use_bidirectional_attention is set in its configuration)"
        )
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


def _ropes(config: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Return the kinds and settings of rotary positions, one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return []
    every = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    return [(r.get("rope_type", r.get("type")), r) for r in every]


def _reach(config: Any) -> int | None:
    name = "original_max_position_embeddings"
    limits = [
        rope.get(name) or getattr(config, name, None)
        for kind, rope in _ropes(config)
        if kind == "longrope"
    ]
    return min((int(n) for n in limits if n), default=None)


class TreeForward:
    """A transformers model with the keys and values of a context tree.

    Args:
        model: a transformers causal language model.
        architecture: how it is to be run.
        tree: the contexts.
        limit_bytes: most memory for keys and values.

    Attributes:
        cache: which contexts have entries.
        limit_slots: the most entries; unknown, and unlimited, before the first forward.
        layout: force one way of laying out keys (see `attend`), or "paged"; None takes "paged"
            where that is at hand and the cheapest elsewhere.
        paging: whether a forward that is written out may read keys where they lie, on a GPU
            (`paged`).
        graphs: whether such forwards are recorded and replayed.
        doubt: why the forward is not written out although it could be; None: it is.
        refusal: "whole" and why, if the model's own modules cannot compute a tree; None: they can.
        pack_bytes: most memory for a second copy of the weights on a CPU (see `Linear`); heeded
            when the forward is next written out, after `clear`.
    """

    def __init__(
        self, model: Any, architecture: Architecture, tree: ContextTree, limit_bytes: int
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.tree = tree
        self.limit_bytes = limit_bytes
        self.limit_slots: int | None = None
        weight = model.get_input_embeddings().weight
        self.layout: Layout | Literal["paged"] | None = None
        self.paging = _has_triton(weight.device) and weight.dtype in _PAGED
        self._paged: PagedForward | None = None
        self.graphs = architecture.fixed_turns
        self.doubt: str | None = None
        self.refusal = architecture.refusal
        self.pack_bytes = 1 << 30
        self.cache = TreeCache(tree)
        self._buffer = _buffer_for(model, architecture)
        self._device, self._dtype = weight.device, weight.dtype
        self._decoder: Decoder | str | None = None  # None: not tried yet

    def replace(self, model: Any, architecture: Architecture) -> None:
        """Go on with the same model in other modules; entries are dropped."""
        self.clear()
        self.model, self.architecture = model, architecture
        self._buffer = _buffer_for(model, architecture)

    @property
    def decoder(self) -> Decoder | None:
        """The model's forward written out; None where it is left to the model's own modules, as
        it is for as long as something watches or replaces its `forward`."""
        if self.doubt is not None or is_hooked(self.model):
            return None
        if self._decoder is None:
            self._decoder = decoder_of(self.model, self.pack_bytes)
        return None if isinstance(self._decoder, str) else self._decoder

    @property
    def way(self) -> Way:
        """See `TreeTransformer.forward`; it may lay out weights that the next forward needs."""
        decoder, kind = self.decoder, type(self.model).__name__
        if decoder is not None:
            weights = decoder.weights
            reason = f"{kind} is known; weights {weights}: {weights.reason}"
            return Way("written out", reason, weights.lost)
        if self.refusal is not None and not is_known(self.model):
            return self.refusal
        unknown = self._decoder if isinstance(self._decoder, str) else None
        hooked = "something watches or replaces the forward of the model"
        reason = self.doubt or unknown or hooked
        if self.refusal is None:
            return Way("modules", reason, is_known(self.model))
        return Way("whole", f"{reason}; and {self.refusal.reason}", True)

    @property
    def nbytes(self) -> int:
        """Memory that keys and values take, in bytes, room for growth and copies included."""
        return self._buffer.nbytes

    def make_room(self, wanted: IntArray, more: int) -> int:
        """Make room for `more` entries beside those of `wanted` and their ancestors.

        Return how many entries were dropped that had to make way. A MemoryError says that there
        cannot be that much room within the limit.
        """
        limit = _UNLIMITED if self.limit_slots is None else self.limit_slots
        keep = self.cache.room(wanted, more, limit)
        dropped = 0
        if keep is not None:
            dropped = self.cache.compact(keep)
            self._buffer.compact(keep)
        self._buffer.reserve(self.cache.used + more, self.cache.used, limit)
        self.cache.touch(wanted)
        return dropped

    @property
    def most_positions(self) -> int | None:
        """The most positions of a forward that reads keys where they lie; None: none may."""
        if not self.paging or self.layout not in (None, "paged") or self.decoder is None:
            return None
        return MOST_POSITIONS

    def paths(self, nodes: list[int], fresh: int) -> Paths | None:
        """Return what the positions of one forward see, if it may read keys where they lie."""
        if len(nodes) > (self.most_positions or 0):
            return None
        return self.cache.paths(np.array(nodes, dtype=np.int64), fresh, MOST_ENTRIES)

    @torch.inference_mode()
    def run(
        self, nodes: list[int], fresh: int, asked: IntArray, paths: Paths | None = None
    ) -> torch.Tensor:
        """Run contexts' last tokens through the model; the first `fresh` get entries.

        Args:
            nodes: T contexts, as in a `Work` (or a stretch of one).
            fresh: how many of them have no entry yet.
            asked: positions in `nodes` whose rows are wanted, int64[R].
            paths: of all the nodes, to read keys where they lie; None: lay keys out.

        Returns:
            Logits float[R, width] in the model's dtype, an inference tensor.
        """
        ids = np.array(nodes, dtype=np.int64)
        everything = len(asked) == len(nodes) and bool((asked == np.arange(len(asked))).all())
        chosen = None if everything else send(asked, self._device)
        logits = None if paths is None else self._where_they_lie(paths, chosen)
        if logits is None:
            with _backends(self._device):
                logits = self._laid_out(ids, fresh, chosen)
        self.cache.append(ids[:fresh])
        if self.limit_slots is None:
            self.limit_slots = self.limit_bytes // max(1, self._buffer.slot_cost)
        return logits

    def _where_they_lie(self, paths: Paths, chosen: torch.Tensor | None) -> torch.Tensor | None:
        """Run a forward that reads keys where they lie; None if its kernels fail."""
        decoder = self.decoder
        assert decoder is not None
        try:
            out = self._paged_by(decoder)(paths)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # such as kernels that a GPU has too little memory for
            self.paging, self._paged = False, None
            warn_lost(
                "keys are copied in every forward, which is slower, as reading them where they "
                f"lie failed ({type(error).__name__}: {error})"
            )
            return None
        return decoder.logits(out, chosen)

    def _paged_by(self, decoder: Decoder) -> PagedForward:
        if self._paged is None or self._paged.decoder is not decoder:
            from genlm_bytes_smc.lm.paged import PagedForward

            window, mixed = self.architecture.sliding, self.architecture.mixed
            self._paged = PagedForward(decoder, self._buffer, window, mixed, self.graphs)
        self._paged.recording = self.graphs
        return self._paged

    def _laid_out(self, ids: IntArray, fresh: int, chosen: torch.Tensor | None) -> torch.Tensor:
        """Run a forward by torch's operations, its keys laid out."""
        layout = self.layout
        attention = attend(
            self.cache,
            ids,
            fresh,
            window=self.architecture.sliding,
            always_mask=self.architecture.eager,
            layout=None if layout == "paged" else layout,
            most_copied=self.limit_slots,
            costs=costs_on(self._device),
        )
        self._buffer.prepare(attention)
        both = send(np.stack([self.tree.token[ids], self.tree.depth[ids] - 1]), self._device)
        masks, batched = self._masks(attention), attention.layout == "rows"
        if (decoder := self.decoder) is not None:
            attend_to = LaidOut(masks, self._buffer, batched, decoder)
            return decoder.logits(decoder.body(both[0], both[1], attend_to), chosen)
        shape = (-1, 1) if batched else (1, -1)
        inputs: dict[str, Any] = {self.architecture.cache_name: self._buffer}
        if chosen is not None and not batched and self.architecture.row_index:
            inputs["logits_to_keep"], chosen = chosen, None
        logits: torch.Tensor = self.model(
            input_ids=both[0].view(shape),
            position_ids=both[1].view(shape),
            attention_mask=masks,
            use_cache=True,
            **inputs,
        ).logits
        logits = logits[:, 0] if batched else logits[0]
        return logits if chosen is None else logits[chosen.to(logits.device)]

    def clear(self) -> None:
        """Drop all entries and what was made of the model's weights, and free their memory."""
        self.cache.clear()
        self._buffer.clear()
        self._decoder = self._paged = None

    def _masks(self, attention: Attention) -> Masks:
        """Return the mask as the model takes it: None, one 4-D tensor, or one a kind of layer."""
        if attention.full is None:
            return None
        batched = attention.layout == "rows"
        narrow = attention.full if attention.sliding is None else attention.sliding
        sliding = self._mask(narrow, batched)
        if not self.architecture.mixed:
            return sliding
        full = sliding if attention.sliding is None else self._mask(attention.full, batched)
        return {"full_attention": full, "sliding_attention": sliding}

    def _mask(self, mask: MaskArray, batched: bool) -> torch.Tensor:
        out = send(mask, self._device).to(self._dtype)
        return out[:, None, None] if batched else out[None, None]


def _buffer_for(model: Any, architecture: Architecture) -> KVBuffer:
    bundled = isinstance(model, BundledGPT2)
    return (KVBuffer if bundled else transformers_buffer)(architecture.layers)


def _has_triton(device: torch.device) -> bool:
    """Return whether Triton should be there: on Linux, builds of torch for CUDA bring it."""
    wanted = sys.platform == "linux" or find_spec("triton") is not None
    return device.type == "cuda" and wanted


def _backends(device: torch.device) -> AbstractContextManager[None]:
    """Leave cuDNN's attention out: it makes a new plan, in 50 ms, for every number of keys."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(others)
