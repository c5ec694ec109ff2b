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


def gpt2_tokens(size: int | None = None) -> list[bytes]:
    """Return the first tokens of GPT-2 in the order of its merges, end-of-text last.

    Args:
        size: how many in all, at least 257 (None: all 50,257).
    """
    packed = resources.files(__package__).joinpath("data", "gpt2_tokens.xz").read_bytes()
    data, tokens, at = lzma.decompress(packed), list[bytes](), 0
    while at < len(data):  # a byte with the length, then the token
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    return [*tokens[: None if size is None else size - 1], END]


class Bigram:
    """The counts, and the rows that they make.

    Args:
        tokens: the vocabulary of V tokens, end-of-text last.
        n_bytes: how much text is counted.

    Attributes:
        text: what was counted; held_out: 20,000 bytes after it.
        usual: log-probabilities of tokens never seen after a known one, float32[V], nats.
        alone: log-probabilities after a token that was not seen, float32[V], nats.
    """

    def __init__(self, tokens: Sequence[bytes], n_bytes: int = 300_000) -> None:
        self.tokens = list(tokens)
        self._ids = {t: i for i, t in enumerate(tokens)}
        self._longest = max(map(len, tokens[:-1]))
        text = "\n".join(topics[k] for k in sorted(topics)).encode()
        self.text, self.held_out = text[:n_bytes], text[n_bytes : n_bytes + 20_000]
        self._count(self.cut(self.text))

    def cut(self, text: bytes) -> list[int]:
        """Return the longest-match tokens of a text."""
        out, at = list[int](), 0
        while at < len(text):
            for n in range(min(self._longest, len(text) - at), 0, -1):
                token = self._ids.get(text[at : at + n])
                if token is not None:
                    out.append(token)
                    at += n
                    break
        return out

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return `cut` of a text, as tokenizers call it."""
        return self.cut(text.encode())

    def after(self, token: int) -> tuple[Any, Any] | None:
        """Return the tokens seen after `token`, int64[m], and their log-probabilities, nats.

        None if `token` was not seen.
        """
        return self._next.get(token)

    def rows(self, last: Sequence[int]) -> torch.Tensor:
        """Return log-probabilities after contexts that end in these B tokens, float32[B, V]."""
        out = np.empty((len(last), len(self.tokens)), dtype=np.float32)
        for line, token in zip(out, last, strict=True):
            known = self._next.get(token)
            line[:] = self.alone if known is None else self.usual
            if known is not None:
                line[known[0]] = known[1]
        return torch.from_numpy(out)

    def _count(self, tokens: Sequence[int]) -> None:
        size = len(self.tokens)
        unigram = np.full(size, 0.01)
        np.add.at(unigram, np.asarray(tokens), 1.0)
        share = unigram / unigram.sum()
        self.alone = np.log(share).astype(np.float32)
        self.usual = np.log(0.1 * share).astype(np.float32)
        pairs: dict[int, Counter[int]] = defaultdict(Counter)
        for a, b in zip([size - 1, *tokens], tokens, strict=False):
            pairs[a][b] += 1
        self._next: dict[int, tuple[Any, Any]] = {}
        for a, counter in pairs.items():
            ids = np.fromiter(counter, dtype=np.int64)
            p = np.fromiter(counter.values(), dtype=np.float64)
            mixed = 0.1 * share[ids] + 0.9 * p / p.sum()
            self._next[a] = ids, np.log(mixed).astype(np.float32)


class BigramEngine(RowEngine):
    """The LM as an engine.

    Args:
        size: of the vocabulary.
    """

    def __init__(self, size: int | None = None) -> None:
        self._bigram = Bigram(gpt2_tokens(size))
        tokens = self._bigram.tokens
        tokenizer = SimpleNamespace(
            bos_token_id=len(tokens) - 1,
            eos_token_id=len(tokens) - 1,
            encode=self._bigram.encode,
        )
        super().__init__(
            tokenizer,
            device=torch.device("cpu"),
            width=len(tokens),
            window=None,
            start=(len(tokens) - 1,),
            byte_vocab=[Token(i, t) for i, t in enumerate(tokens)],
        )

    def evaluate(self, nodes: IntArray) -> torch.Tensor:
        """See `RowEngine`."""
        self.counts.forwards += 1
        self.counts.rows += len(nodes)
        return self._bigram.rows(self.tree.token[nodes].tolist())
