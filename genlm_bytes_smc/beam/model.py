"""What all beams over one token-level model share: its trie, its rows, its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.kernels_host import NumbaKernels
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.rules import Rescues, Rules
from genlm_bytes_smc.beam.state import N_BYTES, Shared
from genlm_bytes_smc.fast_path import warn_lost
from genlm_bytes_smc.lm.adapter import as_engine
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.rows import DEFAULT_ROW_BYTES, RowStore, RowTransform
from genlm_bytes_smc.trie import shared_trie

NO_CUT: IntArray = np.empty(0, dtype=np.int64)


class ByteModel(Shared):
    """A token-level model seen as a source of bytes; `byte_model(llm)` gives an engine's own.

    Attributes:
        engine: the rows' source, itself a genlm-backend AsyncLM.
        vocab, trie: shared by all models with an equal tokenizer.
        store: its rows, on the host wherever the engine computes them.
        kernels: the beam's arithmetic.
    """

    def __init__(
        self,
        engine: RowEngine,
        transform: RowTransform,
        row_bytes: int,
    ) -> None:
        self.engine = engine
        self.vocab = engine.vocab
        self.trie = shared_trie(self.vocab)
        self.store = RowStore(engine, self.trie, transform, row_bytes)
        self.kernels = NumbaKernels(self.store)
        self.eos_ids = lru_cache(maxsize=64)(self._eos_ids)
        self.cut = lru_cache(maxsize=64)(self._cut)
        self._rescues = lru_cache(maxsize=16)(partial(Rescues, self.trie))
        self._guide_lost = False

    @property
    def device(self) -> torch.device:
        """Return where byte rows are returned: where the model is, or the host for Metal, which
        has no float64."""
        device = self.engine.device
        return torch.device("cpu") if device.type == "mps" else device

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the tokenizer's special (control) tokens that spell something, sorted."""
        tokenizer = self.engine.encoder
        ids = set(getattr(tokenizer, "all_special_ids", None) or ())
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        ids.update(i for i, token in added.items() if getattr(token, "special", False))
        return tuple(sorted(i for i in ids if i < len(self.vocab) and self.trie.position[i] >= 0))

    @cached_property
    def special_cut(self) -> IntArray:
        """Trie positions of the special tokens, sorted int64."""
        return np.sort(self.trie.position[list(self.special_ids)]).astype(np.int64)

    @cached_property
    def first_bytes(self) -> npt.NDArray[np.float64]:
        """Return the share of the tokens that begin with each byte, float64[256]."""
        trie, out = self.trie, np.zeros(N_BYTES)
        roots = slice(int(trie.first_child[0]), int(trie.first_child[1]))
        out[trie.byte[roots]] = trie.hi[roots] - trie.lo[roots]
        shares: npt.NDArray[np.float64] = out / out.sum()
        return shares

    def _eos_ids(self, spellings: frozenset[bytes]) -> tuple[int, ...]:
        """Ids of all tokens with one of these spellings, sorted.

        Raises:
            ValueError: a spelling that no token has.
        """
        ids: list[int] = []
        for spelling in sorted(spellings):
            found = self.vocab.ids_of(spelling)
            if not found:
                raise ValueError(f"no token of the vocabulary is spelled {spelling!r}")
            ids.extend(found)
        return tuple(sorted(ids))

    def _cut(self, spellings: frozenset[bytes]) -> IntArray:
        """Trie positions of the end-of-sequence tokens, sorted int64."""
        return np.sort(self.trie.position[list(self.eos_ids(spellings))]).astype(np.int64)

    def not_text(self, params: BeamParams, *, in_prompt: bool, literal: bool) -> IntArray:
        """Trie positions of the tokens that are no text; see `Rules`."""
        if in_prompt:
            return self.special_cut if literal else NO_CUT
        return self.cut(params.eos) if params.eos else NO_CUT

    def spellings(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """Return what each token spells; an id that only the model knows stands as `<id>`."""
        size = len(self.vocab)
        return tuple(self.vocab[t] if t < size else b"<%d>" % t for t in tokens)

    def canonical(self, text: bytes) -> list[int]:
        """Return the tokenizer's own tokens of `text`, as far as they spell it.

        They stop before bytes that are no UTF-8, before a character that `text` cuts, and
        where the tokenizer has changed the text.
        """
        valid = _valid_utf8(text)
        tokens, spelled = self._spelling(self._encode(valid), text)
        if spelled < len(valid.encode()):
            # SentencePiece tokenizers put a space before a text, but not after a newline.
            behind = self._encode("\n" + valid)
            first = self._after_newline(behind)
            others, length = self._spelling(behind[first:], text)
            if length > spelled:
                return others
        return tokens

    def _after_newline(self, tokens: list[int]) -> int:
        """Index of the token after the one that ends with a leading newline, or their number."""
        for i, token in enumerate(tokens):
            if self.vocab[token].endswith(b"\n"):
                return i + 1
            if self.vocab[token].strip():
                break
        return len(tokens)

    def _encode(self, text: str) -> list[int]:
        """Return the tokenizer's tokens of a text; none if it cannot say, which is one warning."""
        if not text or not hasattr(self.engine.encoder, "encode"):
            return []
        try:
            tokens = list(self.engine.encoder.encode(text, add_special_tokens=False))
        except (TypeError, ValueError) as error:
            return self._lose_guide(f"fails ({type(error).__name__}: {error})")
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < len(self.vocab):
                return self._lose_guide(f"gave {token!r} for a token, of {len(self.vocab)}")
        return tokens

    def _lose_guide(self, why: str) -> list[int]:
        if not self._guide_lost:
            self._guide_lost = True
            warn_lost(
                f"the tokenizer's encode {why}: what a known text will ask for cannot be guessed, "
                "so that reading it takes more forwards"
            )
        return []

    def _spelling(self, tokens: list[int], text: bytes) -> tuple[list[int], int]:
        """Return the first of `tokens` that spell what `text` begins with, and how many bytes."""
        spelled = b"".join(self.vocab[t] for t in tokens)
        if text.startswith(spelled):
            return tokens, len(spelled)
        count = at = 0
        while text.startswith(self.vocab[tokens[count]], at):
            at += len(self.vocab[tokens[count]])
            count += 1
        return tokens[:count], at

    def rules(self, params: BeamParams, *, in_prompt: bool = False, literal: bool = False) -> Rules:
        """Return how lanes with these parameters prune and heal; see `Rules`."""
        cut = self.not_text(params, in_prompt=in_prompt, literal=literal)
        limits = params.heal_max_backoff, params.heal_max_splits
        return Rules(
            in_prompt=in_prompt,
            literal=literal,
            cut=cut,
            k=-1 if params.K is None else int(params.K),
            log_threshold=params.log_prune_threshold,
            random=params.unbiased,
            heals=params.heal,
            rescues=self._rescues(tuple(cut.tolist()), *limits),
        )


def _valid_utf8(text: bytes) -> str:
    """Return the text up to the first byte that is no UTF-8."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        return text[: error.start].decode("utf-8")


def byte_model(
    llm: Any, transform: RowTransform | None = None, row_bytes: int = DEFAULT_ROW_BYTES
) -> ByteModel:
    """Return the byte model of a token-level model; the same object for the same arguments.

    Args:
        llm: a genlm-backend AsyncLM or a `RowEngine`.
        transform: temperature, top-k and top-p of the token-level rows.
        row_bytes: limit on cached rows, in bytes (of the first call for this transform).

    Raises:
        TypeError: `llm` is no model, or `transform` no RowTransform.
    """
    if not isinstance(transform, RowTransform | None):
        raise TypeError(f"transform must be a RowTransform, got {transform!r}")
    engine = as_engine(llm)
    transform = transform or RowTransform()
    # Kept on the engine itself, so that both go together.
    models: dict[RowTransform, ByteModel] = engine.__dict__.setdefault("_byte_models", {})
    if transform not in models:
        models[transform] = ByteModel(engine, transform, row_bytes)
    return models[transform]
