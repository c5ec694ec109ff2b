"""Random-weight models of well-known shapes whose rows read like text.

Every row takes a whole forward of the model; then the row is mixed with a bigram LM's, which
makes nearly all of it. So the cost is that of the real model, beams behave as on text, and
nothing is downloaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.ngram import END, NgramLM, gpt2_tokens, llama_size_tokens
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.lm.transformer import TreeTransformer

WINDOW = 4096  # tokens
MODEL_SHARE = 1e-3  # of each row that is the random model's own


@dataclass(frozen=True)
class Shape:
    """One model's shape.

    Attributes:
        name: what it is called.
        family: "gpt2" or "llama".
        layers, width, heads, kv_heads, inner: as in its configuration.
        columns: of the LM head, padding included.
        tokens: of the vocabulary, end-of-text included; None: all of them.
    """

    name: str
    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    columns: int
    tokens: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights, to within one in a hundred (embeddings tied, as in the originals
        but for the 8B's)."""
        head = self.width // self.heads
        attention = 2 * self.width * (self.width + head * self.kv_heads)
        inner = (2 if self.family == "gpt2" else 3) * self.width * self.inner
        return self.columns * self.width + self.layers * (attention + inner)

    def config(self) -> Any:
        """Return transformers' configuration."""
        end = self.columns - 1 if self.tokens is None else self.tokens - 1
        if self.family == "gpt2":
            return tf.GPT2Config(
                vocab_size=self.columns, n_positions=WINDOW, n_embd=self.width,
                n_layer=self.layers, n_head=self.heads, n_inner=self.inner,
                bos_token_id=end, eos_token_id=end,
            )  # fmt: skip
        return tf.LlamaConfig(
            vocab_size=self.columns, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, max_position_embeddings=WINDOW,
            tie_word_embeddings=self.name != "Llama-3.1-8B", rope_theta=5e5,
            bos_token_id=end, eos_token_id=end,
        )  # fmt: skip


FULL = (
    Shape("GPT-2 medium", "gpt2", 24, 1024, 16, 16, 4096, 50_257),
    Shape("Llama-3.2-1B", "llama", 16, 2048, 32, 8, 8192, 128_256, 128_001),
    Shape("Llama-3.1-8B", "llama", 32, 4096, 32, 8, 14_336, 128_256, 128_001),
)
QUICK = (
    Shape("GPT-2 minute", "gpt2", 2, 32, 2, 2, 64, 1_500, 1_500),
    Shape("Llama minute", "llama", 2, 32, 4, 2, 64, 1_536, 1_500),
)


def small(shape: Shape) -> Shape:
    """Two narrow layers of the same kind and vocabulary: for comparing devices in float32."""
    return Shape(
        f"{shape.name}, two layers", shape.family, 2, 64, 4, 4 if shape.family == "gpt2" else 2,
        128, shape.columns, shape.tokens,
    )  # fmt: skip


class Mixed(TreeTransformer):
    """A transformer whose rows are mixed with a bigram LM's after each forward."""

    def __init__(self, model: Any, tokenizer: Any, ngram: NgramLM, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        pad = (self.width or 0) - len(ngram.tokens)
        tables = [np.pad(t, (0, pad), constant_values=-np.inf) for t in ngram.logs]
        found = [ngram.after(token) for token in range(len(ngram.tokens))]
        self._seen = np.array([f is not None for f in found])
        self._first = np.cumsum([0, *(0 if f is None else len(f[0]) for f in found)])
        columns = np.concatenate([f[0] for f in found if f is not None])
        values = np.concatenate([f[1] for f in found if f is not None]).astype(np.float32)
        self._known, self._alone, self._values = (
            torch.from_numpy(t.astype(np.float32)).to(self.device) + math.log1p(-MODEL_SHARE)
            for t in (*tables, values)
        )
        self._columns = torch.from_numpy(columns).to(self.device)

    def evaluate(self, nodes: np.ndarray) -> torch.Tensor:
        """Mixed rows, float32[B, width], nats."""
        return self.mix(super().evaluate(nodes), nodes)

    def forget(self) -> None:
        """Drop keys and values and rows, but nothing that was compiled, recorded or allotted."""
        self._forward.cache.clear()
        byte_model(self).store.clear()

    @property
    def recorded(self) -> tuple[int, ...]:
        """Return how many forwards are recorded, and how often keys and values have moved."""
        paged = self._forward._paged
        return () if paged is None else (len(paged._recorded), paged.buffer.version)

    def mix(self, rows: torch.Tensor, nodes: np.ndarray) -> torch.Tensor:
        """Mix rows of the model, float32[B, width], with the bigram LM's; in place."""
        last = self.tree.token[nodes]
        first, count = self._first[last], self._first[last + 1] - self._first[last]
        line = np.repeat(np.arange(len(last)), count)
        entry = np.arange(len(line)) + np.repeat(first - (count.cumsum() - count), count)
        sent = send(np.concatenate([self._seen[last], line, entry]), self.device)
        seen, line, entry = sent.split([len(last), len(line), len(line)])
        out = torch.where(seen[:, None] > 0, self._known, self._alone)
        out[line, self._columns[entry]] = self._values[entry]
        return torch.logaddexp(out, rows.add_(math.log(MODEL_SHARE)), out=rows)


class Worlds:
    """Models of several shapes; what they share is made once."""

    def __init__(self) -> None:
        self._ngrams: dict[Any, NgramLM] = {}
        self._tokenizers: dict[Any, Any] = {}

    def ngram(self, shape: Shape) -> NgramLM:
        """Return the bigram LM over a shape's vocabulary."""
        key = (shape.columns > 100_000, shape.tokens)
        if key not in self._ngrams:
            tokens = llama_size_tokens() if key[0] else gpt2_tokens()
            self._ngrams[key] = NgramLM(n_tokens=shape.tokens, tokens=tokens)
        return self._ngrams[key]

    def engine(
        self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> Mixed:
        """Return a model with random weights, on a device."""
        ngram = self.ngram(shape)
        key = id(ngram)
        if key not in self._tokenizers:
            self._tokenizers[key] = _tokenizer(ngram)
        torch.manual_seed(seed)
        # On the device itself, except where two devices are to have the same weights.
        where = device if dtype != torch.float32 else torch.device("cpu")
        with where:
            model = tf.AutoModelForCausalLM.from_config(
                shape.config(), dtype=dtype, attn_implementation="sdpa"
            )
        return Mixed(model, self._tokenizers[key], ngram, device=device)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tokenizer(ngram: NgramLM) -> Any:
    """Return the vocabulary as a Hugging Face tokenizer that cuts by longest match."""
    alphabet = bytes_to_unicode()
    names = ["".join(alphabet[b] for b in token) for token in ngram.tokens[:-1]]
    vocab = {name: i for i, name in enumerate([*names, END.decode()])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=END.decode(), eos_token=END.decode()
    )
    tokenizer.encode = lambda text, add_special_tokens=False: ngram.cut(text.encode())
    return tokenizer
