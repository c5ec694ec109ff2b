"""The studies' bigram LM as a genlm-backend AsyncLM, which genlm-bytes can use too."""

from __future__ import annotations

import base64
import lzma
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from genlm.backend.llm import AsyncLM
from genlm.backend.tokenization.token import Token

from studies.bigram_lm import END, Bigram, gpt2_tokens

DATA_128K = Path(__file__).parent / "data" / "o200k_128000.tiktoken.xz"

__all__ = ["END", "NgramLM", "gpt2_tokens", "llama_size_tokens"]


def llama_size_tokens() -> list[bytes]:
    """Return 128,000 tokens of a newer vocabulary (as many as Llama 3 has) and end-of-text."""
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
        if n_tokens is not None:
            tokens = [*tokens[: n_tokens - 1], END]
        self._bigram = Bigram(tokens, n_bytes)
        self.tokens, self.cut = self._bigram.tokens, self._bigram.cut
        self.text, self.held_out = self._bigram.text, self._bigram.held_out
        self.after = self._bigram.after
        self.byte_vocab = [Token(i, t) for i, t in enumerate(self.tokens)]
        self.str_vocab = [t.decode("utf-8", "replace") for t in self.tokens]
        self.tokenizer = SimpleNamespace(
            bos_token_id=len(self.tokens) - 1, eos_token_id=None, encode=self._bigram.encode
        )
        self._batch_queue: list[object] = []
        self._batch_armed = False
        self.calls = 0

    @property
    def logs(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities of tokens never seen after a known token, and after an unknown one:
        float32[V] both."""
        return self._bigram.usual, self._bigram.alone

    def row(self, context: list[int]) -> torch.Tensor:
        """Return log-probabilities after a context, float32[V]."""
        return self.rows([context])[0]

    def rows(self, contexts: list[list[int]]) -> torch.Tensor:
        """Return log-probabilities after each of several contexts, float32[B, V]."""
        self.calls += len(contexts)
        return self._bigram.rows([int(context[-1]) for context in contexts])

    async def next_token_logprobs(self, token_ids, lora_name=None):
        """Return the row of one context."""
        return self.row(token_ids)

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        """Return the row of one context."""
        return self.row(token_ids)

    async def batch_next_token_logprobs(self, token_ids_list, lora_name=None):
        """Return rows of several contexts, float32[B, V]."""
        return self.rows(token_ids_list)

    def batch_next_token_logprobs_sync(self, token_ids_list, lora_name=None):
        """Return rows of several contexts, float32[B, V]."""
        return self.rows(token_ids_list)
