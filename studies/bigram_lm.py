"""A token bigram LM over GPT-2's vocabulary, or the first part of it: rows cost microseconds.

For measuring what a vocabulary's size costs a beam: texts are cut into tokens as real ones
are, and hardly any time goes into the model. Rows are 0.9 bigram + 0.1 unigram, both counted
on the help topics that every Python carries, cut into tokens by longest match.
"""

from __future__ import annotations

import lzma
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import resources
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from genlm.backend.tokenization.token import Token

from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine

END = b"<|endoftext|>"
_COUNTED = 300_000  # bytes of text


def gpt2_tokens(size: int | None = None) -> list[bytes]:
    """The first tokens of GPT-2 in the order of its merges, end-of-text last.

    Args:
        size: how many in all, at least 257 (None: all 50,257).
    """
    packed = resources.files(__package__).joinpath("data", "gpt2_tokens.xz").read_bytes()
    data, tokens, at = lzma.decompress(packed), list[bytes](), 0
    while at < len(data):  # a byte with the length, then the token
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    return [*tokens[: None if size is None else size - 1], END]


class BigramEngine(RowEngine):
    """The LM as an engine.

    Args:
        size: of the vocabulary.
    """

    def __init__(self, size: int | None = None) -> None:
        tokens = gpt2_tokens(size)
        self._ids = {t: i for i, t in enumerate(tokens)}
        self._longest = max(map(len, tokens[:-1]))
        tokenizer = SimpleNamespace(
            bos_token_id=len(tokens) - 1, eos_token_id=len(tokens) - 1, encode=self._encode
        )
        super().__init__(
            tokenizer,
            device=torch.device("cpu"),
            width=len(tokens),
            window=None,
            start=(len(tokens) - 1,),
            byte_vocab=[Token(i, t) for i, t in enumerate(tokens)],
        )
        text = "\n".join(topics[k] for k in sorted(topics)).encode()
        self._count(self.cut(text[:_COUNTED]), len(tokens))

    def evaluate(self, nodes: IntArray) -> torch.Tensor:
        """See `RowEngine`."""
        self.counts.forwards += 1
        self.counts.rows += len(nodes)
        out = np.empty((len(nodes), self._base.size), dtype=np.float32)
        for line, last in zip(out, self.tree.token[nodes].tolist(), strict=True):
            known = self._next.get(last)
            line[:] = self._alone if known is None else self._base
            if known is not None:
                line[known[0]] = known[1]
        return torch.from_numpy(out)

    def cut(self, text: bytes) -> list[int]:
        """Longest-match tokens of a text."""
        out, at = list[int](), 0
        while at < len(text):
            for n in range(min(self._longest, len(text) - at), 0, -1):
                token = self._ids.get(text[at : at + n])
                if token is not None:
                    out.append(token)
                    at += n
                    break
        return out

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.cut(text.encode())

    def _count(self, tokens: Sequence[int], size: int) -> None:
        unigram = np.full(size, 0.01)
        np.add.at(unigram, np.asarray(tokens), 1.0)
        share = unigram / unigram.sum()
        self._alone = np.log(share).astype(np.float32)
        self._base = np.log(0.1 * share).astype(np.float32)
        pairs: dict[int, Counter[int]] = defaultdict(Counter)
        for a, b in zip([size - 1, *tokens], tokens, strict=False):
            pairs[a][b] += 1
        self._next: dict[int, tuple[Any, Any]] = {}
        for a, counter in pairs.items():
            ids = np.fromiter(counter, dtype=np.int64)
            p = np.fromiter(counter.values(), dtype=np.float64)
            mixed = 0.1 * share[ids] + 0.9 * p / p.sum()
            self._next[a] = ids, np.log(mixed).astype(np.float32)
