"""A bigram LM over GPT-2's 50k vocabulary: rows cost microseconds, beams behave as on text.

Rows are log-probabilities of `0.9 * bigram + 0.1 * unigram`, both counted on the
documentation topics that every Python carries, cut into tokens by longest match.
"""

from __future__ import annotations

import base64
import lzma
from collections import Counter, defaultdict
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import torch
from genlm.backend.llm import AsyncLM
from genlm.backend.tokenization.token import Token

DATA = Path(__file__).parent / "data" / "r50k_base.tiktoken"
DATA_128K = Path(__file__).parent / "data" / "o200k_128000.tiktoken.xz"
END = b"<|endoftext|>"


def gpt2_tokens() -> list[bytes]:
    """The 50,257 tokens of GPT-2, end-of-text last."""
    lines = DATA.read_text().splitlines()
    return [base64.b64decode(line.split()[0]) for line in lines] + [END]


def llama_size_tokens() -> list[bytes]:
    """128,000 tokens of a newer vocabulary (as many as Llama 3 has) and end-of-text."""
    lines = lzma.decompress(DATA_128K.read_bytes()).splitlines()
    return [base64.b64decode(line) for line in lines] + [END]


class NgramLM(AsyncLM):
    """The bigram LM as a genlm-backend AsyncLM; `calls` counts rows.

    Args:
        n_bytes: how much text to count.
        n_tokens: size of the vocabulary: the first merges and end-of-text (default: all).
        tokens: the vocabulary, end-of-text last (default: GPT-2's).
    """

    def __init__(
        self,
        n_bytes: int = 300_000,
        n_tokens: int | None = None,
        tokens: list[bytes] | None = None,
    ) -> None:
        tokens = gpt2_tokens() if tokens is None else tokens
        self.tokens = tokens if n_tokens is None else [*tokens[: n_tokens - 1], END]
        self.byte_vocab = [Token(i, t) for i, t in enumerate(self.tokens)]
        self.str_vocab = [t.decode("utf-8", "replace") for t in self.tokens]
        self.tokenizer = SimpleNamespace(
            bos_token_id=len(self.tokens) - 1, eos_token_id=None, encode=self._encode
        )
        self._batch_queue: list[object] = []
        self._batch_armed = False
        self.calls = 0
        self._ids = {t: i for i, t in enumerate(self.tokens)}
        self._longest = max(map(len, self.tokens[:-1]))
        text = "\n".join(topics[k] for k in sorted(topics)).encode()
        self.text, held_out = text[:n_bytes], text[n_bytes : n_bytes + 20_000]
        self.held_out = held_out
        self._count(self.cut(self.text))

    def cut(self, text: bytes) -> list[int]:
        """Longest-match tokens of a text."""
        out, at = [], 0
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

    def _count(self, tokens: list[int]) -> None:
        unigram = np.full(len(self.tokens), 0.01)
        np.add.at(unigram, tokens, 1.0)
        self._base = (0.1 * unigram / unigram.sum()).astype(np.float32)
        self._log_base = np.log(self._base)
        self._log_alone = self._log_base - np.log(np.float32(0.1))
        pairs: dict[int, Counter[int]] = defaultdict(Counter)
        for a, b in zip([len(self.tokens) - 1, *tokens], tokens, strict=False):
            pairs[a][b] += 1
        self._next: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for a, counter in pairs.items():
            ids = np.fromiter(counter, dtype=np.int64)
            p = np.fromiter(counter.values(), dtype=np.float32)
            self._next[a] = ids, np.log(self._base[ids] + 0.9 * p / p.sum()).astype(np.float32)

    @property
    def logs(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of tokens never seen after a known token, and after an unknown one:
        float32[V] both."""
        return self._log_base, self._log_alone

    def after(self, token: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens seen after `token`, int64[m], and their log-probabilities; None if it was not."""
        return self._next.get(token)

    def row(self, context: list[int]) -> torch.Tensor:
        """Log-probabilities after a context, float32[V]."""
        return self.rows([context])[0]

    def rows(self, contexts: list[list[int]]) -> torch.Tensor:
        """Log-probabilities after each of several contexts, float32[B, V]."""
        self.calls += len(contexts)
        out = np.empty((len(contexts), len(self.tokens)), dtype=np.float32)
        for line, context in zip(out, contexts, strict=True):
            known = self._next.get(int(context[-1]))
            if known is None:
                line[:] = self._log_alone
            else:
                line[:] = self._log_base
                line[known[0]] = known[1]
        return torch.from_numpy(out)

    async def next_token_logprobs(self, token_ids, lora_name=None):
        """Row of one context."""
        return self.row(token_ids)

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        """Row of one context."""
        return self.row(token_ids)

    async def batch_next_token_logprobs(self, token_ids_list, lora_name=None):
        """Rows of several contexts, float32[B, V]."""
        return self.rows(token_ids_list)

    def batch_next_token_logprobs_sync(self, token_ids_list, lora_name=None):
        """Rows of several contexts, float32[B, V]."""
        return self.rows(token_ids_list)
