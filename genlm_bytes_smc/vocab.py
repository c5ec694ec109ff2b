"""Token bytes as two flat arrays, whatever tokenizer they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The byte strings of a tokenizer's tokens.

    Layout: token `i` spells `buffer[offsets[i]:offsets[i + 1]]`. Several ids may spell the
    same bytes; an id may spell nothing (such a token is never part of a text).

    Attributes:
        buffer: uint8[total bytes].
        offsets: int64[V + 1].
    """

    buffer: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of token ids, V."""
        return len(self.offsets) - 1

    def __getitem__(self, token: int) -> bytes:
        """Return the bytes that `token` spells."""
        if not 0 <= token < len(self):
            raise IndexError(f"token ids run from 0 to {len(self) - 1}, got {token}")
        return self.buffer[self.offsets[token] : self.offsets[token + 1]].tobytes()

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Length of each token in bytes, int64[V]."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal vocabularies, in this process and any other."""
        digest = hashlib.blake2b(self.buffer.tobytes(), digest_size=16)
        digest.update(self.offsets.tobytes())
        return digest.hexdigest()

    def ids_of(self, token_bytes: bytes) -> list[int]:
        """All ids that spell exactly these bytes (none: an empty list)."""
        right_length = np.flatnonzero(self.lengths == len(token_bytes))
        return [int(i) for i in right_length if self[int(i)] == token_bytes]

    @classmethod
    def from_tokens(cls, tokens: Sequence[Any]) -> Vocabulary:
        """From one entry a token id, in order.

        Args:
            tokens: `bytes`, or genlm-backend `Token` objects (bytes with a `token_id`, which
                must then be the entry's index).

        Raises:
            ValueError: no tokens, or a `Token` out of its place.
            TypeError: an entry that is not bytes.
        """
        if len(tokens) == 0:
            raise ValueError("a vocabulary needs at least one token, got none")
        for i, token in enumerate(tokens):
            if not isinstance(token, bytes):
                raise TypeError(f"token {i} should be bytes, got {type(token).__name__}")
            named = getattr(token, "token_id", i)
            if named != i:
                raise ValueError(f"entry {i} of the vocabulary has token_id {named}")
        lengths = np.fromiter((len(t) for t in tokens), dtype=np.int64, count=len(tokens))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(np.frombuffer(b"".join(tokens), dtype=np.uint8), offsets)
