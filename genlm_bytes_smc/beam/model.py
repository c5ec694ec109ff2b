"""What all beams over one token-level model share: trie, rows, kernels, and how lanes prune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import N_BYTES, NOTHING, BoolArray, NumbaKernels
from genlm_bytes_smc.fast_path import warn_lost
from genlm_bytes_smc.lm.adapter import as_engine
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine, Shared
from genlm_bytes_smc.lm.rows import DEFAULT_ROW_BYTES, RowStore, RowTransform
from genlm_bytes_smc.trie import TokenTrie, shared_trie

HEAL_RESERVE = 5e-5
"""Share of a row set aside for bytes that only healing can read.

What such bytes weigh exactly would cost LM rows for bytes that are mostly never read. So they
share this much of the row, in proportion to how likely the best candidate's row holds a token to
begin with them (see `ByteLanes.logp_next`).
"""

NEVER = 1 << 60  # more splits than there can be


class Span(NamedTuple):
    """What the trie knows from one position of the partial token on.

    Attributes:
        ends: positions at which a token that begins here may end, ascending.
        node: where the rest of the partial token leads, -1 if no token begins like it.
    """

    ends: list[int]
    node: int


class Rescues:
    """The ways to spell a token in flight anew, and the bytes that healing could read then.

    Healing ends a token after the first k bytes of the partial one, and has to spell the rest
    from tokens, the last of which stays in flight and reads the next byte. Position p means that
    a token ends after p bytes of the partial one; a *split* is a token that ends after the first.

    Attributes:
        max_backoff, max_splits: as in `BeamParams`.
        line_of: int32[nodes], line of `lines` for a node whose bytes have been looked up, or -1.
        lines: bool[R, 256].
    """

    def __init__(
        self,
        trie: TokenTrie,
        cut: tuple[int, ...],
        max_backoff: int | None,
        max_splits: int | None,
    ) -> None:
        self.max_backoff, self.max_splits = max_backoff, max_splits
        self._trie, self._cut = trie, cut
        self._edges = lru_cache(maxsize=1024)(self._edges_of)
        self._known = 0
        self.line_of = np.full(len(trie), -1, dtype=np.int32)
        self.lines = np.zeros((64, N_BYTES), dtype=bool)

    def learn(self, nodes: IntArray) -> None:
        """Look up the lines of these nodes (0 and negative ones are ignored)."""
        nodes = nodes[nodes > 0]
        for node in nodes[self.line_of[nodes] < 0].tolist():
            if self.line_of[node] < 0:
                if self._known == len(self.lines):
                    self.lines = np.concatenate([self.lines, np.zeros_like(self.lines)])
                self.lines[self._known] = self._rescuable(node)
                self.line_of[node] = self._known
                self._known += 1

    def _rescuable(self, node: int) -> BoolArray:
        """Return which bytes healing could read from a node, bool[256]."""
        partial = self._trie.spell(node)
        out = np.zeros(N_BYTES, dtype=bool)
        if self.max_splits is None and self._single_bytes:  # any rest can be spelled then
            out[:] = bool(self.first_ends(self.spans(partial, 1), len(partial)))
            return out
        found = self.spans(partial)
        firsts = self.first_ends(found, len(partial))
        fewest = [0 if p in firsts else NEVER for p in range(len(found))]  # splits before p
        for p, span in enumerate(found):
            for q in span.ends if fewest[p] < NEVER else ():
                fewest[q] = min(fewest[q], fewest[p] + 1)
        most = NEVER - 1 if self.max_splits is None else self.max_splits
        for span, splits in zip(found, fewest, strict=True):
            if splits <= most and span.node >= 0:
                out[self._edges(span.node)] = True
        return out

    def spans(self, partial: bytes, count: int | None = None) -> list[Span]:
        """Return the span of each position 0..len(partial), or of the first `count`."""
        out = []
        for start in range(len(partial) + 1 if count is None else count):
            node, found = 0, []
            for at in range(start, len(partial)):
                node = self._trie.child(node, partial[at])
                if node < 0:
                    break
                if self._ends(node):
                    found.append(at + 1)
            out.append(Span(found, node))
        return out

    def first_ends(self, found: list[Span], length: int) -> list[int]:
        """Return where the first token of `length` bytes in flight may end, the longest first."""
        least = 1 if self.max_backoff is None else max(1, length - self.max_backoff)
        return [k for k in reversed(found[0].ends) if k >= least]

    def splits_after(self, found: list[Span], byte: int) -> list[int]:
        """Count the fewest splits with which the rest from each position, and `byte`, are read."""
        fewest = [NEVER] * len(found)
        for p in range(len(found) - 1, -1, -1):
            if found[p].node >= 0 and byte in self._edges(found[p].node):
                fewest[p] = 0
            else:
                fewest[p] = min([NEVER, *(fewest[q] + 1 for q in found[p].ends)])
        return fewest

    @cached_property
    def _single_bytes(self) -> bool:
        """Whether each byte is a token that is text, as in most vocabularies."""
        nodes = [self._trie.child(0, byte) for byte in range(N_BYTES)]
        return all(node >= 0 and self._ends(node) for node in nodes)

    def _ends(self, node: int) -> bool:
        """Return whether a token that is text ends at `node`."""
        first = int(self._trie.lo[node])
        last = first + int(self._trie.ends[node])
        return last - first > sum(first <= c < last for c in self._cut)

    def _edges_of(self, node: int) -> npt.NDArray[np.uint8]:
        """Bytes on the edges below `node` under which a token that is text ends."""
        trie = self._trie
        below = slice(int(trie.first_child[node]), int(trie.first_child[node + 1]))
        lo, hi = trie.lo[below], trie.hi[below]
        inside = sum(((lo <= c) & (c < hi)).astype(np.int64) for c in self._cut)
        return trie.byte[below][hi - lo > inside]


@dataclass(frozen=True, eq=False)
class Rules:
    """How lanes of one model prune and heal, as kernels take it.

    Attributes:
        in_prompt: whether end-of-sequence tokens are ordinary tokens (prompt) or ends.
        literal: in a prompt, whether special tokens are left out, so that text which looks
            like one is spelled from ordinary tokens.
        cut: sorted int64[c], trie positions of the tokens that are no text.
        k: most candidates kept, -1 for all.
        log_threshold: log share below which candidates and extensions are dropped or thinned.
        random: whether pruning is unbiased.
        heals: whether dead lanes are healed.
        rescues: bytes that healing could read, and its limits.
    """

    in_prompt: bool
    literal: bool
    cut: IntArray
    k: int
    log_threshold: float
    random: bool
    heals: bool
    rescues: Rescues

    @property
    def share(self) -> float:
        """Share set aside for rescues of each row of a lane that dropped mass; 0: no healing."""
        return HEAL_RESERVE if self.heals else 0.0


class ByteModel(Shared):
    """A token-level model seen as a source of bytes; `byte_model(llm)` gives an engine's own.

    Attributes:
        engine: the rows' source, itself a genlm-backend AsyncLM.
        vocab, trie: shared by all models with an equal tokenizer.
        store: its rows, on the host wherever the engine computes them.
        kernels: the beam's arithmetic.
    """

    def __init__(self, engine: RowEngine, transform: RowTransform, row_bytes: int) -> None:
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
        return self._positions(self.special_ids)

    def _positions(self, ids: Sequence[int]) -> IntArray:
        return np.sort(self.trie.position[list(ids)]).astype(np.int64)

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
        return self._positions(self.eos_ids(spellings))

    def not_text(self, params: BeamParams, *, in_prompt: bool, literal: bool) -> IntArray:
        """Trie positions of the tokens that are no text; see `Rules`."""
        if in_prompt:
            return self.special_cut if literal else NOTHING
        return self.cut(params.eos) if params.eos else NOTHING

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
        limits, threshold = (
            (params.heal_max_backoff, params.heal_max_splits),
            params.prune_threshold,
        )
        return Rules(
            in_prompt=in_prompt,
            literal=literal,
            cut=cut,
            k=-1 if params.K is None else int(params.K),
            log_threshold=math.log(threshold) if threshold > 0 else -math.inf,
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
