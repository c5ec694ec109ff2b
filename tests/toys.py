"""Token LMs small enough to enumerate, and the enumeration itself."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import torch
from genlm.backend.llm import AsyncLM
from genlm.backend.tokenization.token import Token

TOY_TOKENS = [b"a", b"b", b"c", b"ab", b"ba", b"abc", b"a", b"cab", b"bb", b"<e>"]
EOS_TOKEN = b"<e>"


class ToyLM(AsyncLM):
    """A genlm-backend AsyncLM whose rows are random functions of the whole context."""

    def __init__(self, tokens=None, seed=0, dtype=torch.float64, sharpness=2.0, pad=0):
        tokens = TOY_TOKENS if tokens is None else tokens
        self.tokens = tokens
        self.byte_vocab = [Token(i, t) for i, t in enumerate(tokens)]
        self.str_vocab = [t.decode("utf-8", "replace") for t in tokens]
        self.tokenizer = SimpleNamespace(bos_token_id=len(tokens) - 1, eos_token_id=None)
        self.seed, self.dtype, self.sharpness, self.pad = seed, dtype, sharpness, pad
        self.calls: list[tuple[int, ...]] = []
        self._batch_queue, self._batch_armed = [], False

    def row(self, context) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, *map(int, context)])
        logits = rng.normal(size=len(self.tokens) + self.pad) * self.sharpness
        return torch.log_softmax(torch.as_tensor(logits, dtype=self.dtype), dim=0)

    async def next_token_logprobs(self, token_ids, lora_name=None):
        return self.next_token_logprobs_sync(token_ids)

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        self.calls.append(tuple(token_ids))
        return self.row(token_ids)


class Enumeration:
    """Exact byte-level quantities of a ToyLM by enumerating token strings.

    Recursion over all coverings of a string; no code is shared with the package.
    """

    def __init__(self, lm: ToyLM, eos: frozenset[bytes] = frozenset()):
        self.lm = lm
        self.eos = [i for i, t in enumerate(lm.tokens) if t in eos]
        self.start = (lm.tokenizer.bos_token_id,)
        self._known = {}

    def _rows(self, context):
        if context not in self._known:
            self._known[context] = self._row(context)
        return self._known[context]

    def _row(self, context):
        p = np.exp(self.lm.row(context).double().numpy())[: len(self.lm.tokens)]
        spelled = np.array([len(t) > 0 for t in self.lm.tokens])
        return np.where(spelled, p, 0.0) / p[spelled].sum()

    def prefix(self, s: bytes, context=None) -> float:
        """Probability that the text begins with `s`, ended or not."""
        if not s:
            return 1.0
        context = self.start if context is None else context
        total = 0.0
        for i, (p, t) in enumerate(zip(self._rows(context), self.lm.tokens, strict=True)):
            if i in self.eos or not t:
                continue
            if t.startswith(s):
                total += p
            elif s.startswith(t):
                total += p * self.prefix(s[len(t) :], (*context, i))
        return total

    def ended(self, s: bytes, context=None) -> float:
        """Probability that the text is exactly `s`."""
        context = self.start if context is None else context
        row = self._rows(context)
        if not s:
            return float(sum(row[i] for i in self.eos))
        return sum(
            p * self.ended(s[len(t) :], (*context, i))
            for i, (p, t) in enumerate(zip(row, self.lm.tokens, strict=True))
            if i not in self.eos and t and s.startswith(t)
        )

    def logp_next(self, s: bytes) -> np.ndarray:
        """log p(next | s) for 256 bytes and the end, nats."""
        z = self.prefix(s)
        alphabet = {b for t in self.lm.tokens for b in t}
        out = np.full(257, -math.inf)
        for b in alphabet:
            p = self.prefix(s + bytes([b]))
            out[b] = math.log(p / z) if p > 0 else -math.inf
        end = self.ended(s)
        out[256] = math.log(end / z) if end > 0 else -math.inf
        return out
