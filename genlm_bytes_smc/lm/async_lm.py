"""What engines have of genlm-backend's `AsyncLM`, and the tokens of their models.

That class is imported only when somebody asks for it: it brings transformers, which takes longer
than loading the bundled model.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.lm.bundled import BundledTokenizer
from genlm_bytes_smc.lm.contexts import ContextTree, IntArray
from genlm_bytes_smc.trie import Vocabulary

NO_TOKEN = "a context needs at least one token (usually BOS), got none"

# Document separators of models trained without a BOS token, likeliest first.
_SEPARATORS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "</s>")


def _as_async_lm(name: str) -> Any:
    """Return a method that does what `AsyncLM`'s of that name does."""

    def method(self: LateAsyncLM, *args: Any, **options: Any) -> Any:
        from genlm.backend.llm import AsyncLM

        _register()
        return getattr(AsyncLM, name)(self, *args, **options)

    method.__name__, method.__doc__ = name, f"See `AsyncLM.{name}`."
    return method


class LateAsyncLM(ABC):
    """A class whose instances are `AsyncLM`s for whoever has imported that class.

    Attributes:
        encoder: the tokenizer, or what does its work here without transformers.
        tree: the contexts.
    """

    encoder: Any
    tree: ContextTree

    @abstractmethod
    async def rows(self, nodes: IntArray) -> torch.Tensor:
        """See `RowEngine`."""

    @abstractmethod
    def rows_sync(self, nodes: IntArray) -> torch.Tensor:
        """See `RowEngine`."""

    def refuse_bad(self, nodes: IntArray, rows: torch.Tensor) -> None:  # noqa: B027
        """Raise if rows of an outside model hold NaN or +inf; models of our own do not.

        Whoever sums rows anyway (`RowStore`) asks only where a sum is no number: looking
        first would be one more pass over every row.

        Args:
            nodes: int64[B], the contexts.
            rows: float[B, width], what `evaluate` gave for them.

        Raises:
            ValueError: naming what came, and for which contexts.
        """

    # -- its tokens --------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, as transformers has it."""
        late = isinstance(self.encoder, BundledTokenizer)
        return self.encoder.in_transformers() if late else self.encoder

    @cached_property
    def vocab(self) -> Vocabulary:
        """Return what the tokens spell, as flat arrays."""
        late = isinstance(self.encoder, BundledTokenizer)
        return Vocabulary.from_tokens(self.encoder.token_bytes() if late else self.byte_vocab)

    @cached_property
    def byte_vocab(self) -> list[Any]:
        """Return what each token spells, as genlm-backend `Token`s."""
        return self._decoded[0]

    @cached_property
    def str_vocab(self) -> list[str]:
        """Return what each token spells, as strings."""
        return self._decoded[1]

    @cached_property
    def _decoded(self) -> tuple[list[Any], list[str]]:
        from genlm.backend.tokenization import decode_vocab

        decoded: tuple[list[Any], list[str]] = decode_vocab(self.tokenizer)
        return decoded

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a text and spell something: those that the tokenizer or the
        model's configuration for generation name, sorted."""
        inner = getattr(getattr(self, "llm", None), "model", None)
        model = getattr(self, "base", None) or getattr(self, "model", None) or inner
        ids: set[Any] = set()
        for source in (self.encoder, getattr(model, "generation_config", None)):
            named = getattr(source, "eos_token_id", None)
            ids.update(named if isinstance(named, (list, tuple)) else [named])
        vocab = self.vocab
        known = (i for i in ids if isinstance(i, int) and 0 <= i < len(vocab))
        return tuple(sorted(i for i in known if vocab[i]))

    # -- rows of contexts by their tokens, as `AsyncLM` gives them -----------------------

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The type; `isinstance(engine, AsyncLM)` reads it, and by then there is an `AsyncLM`."""
        _register()
        return type(self)

    async def next_token_logprobs(
        self, token_ids: Sequence[int], lora_name: str | None = None
    ) -> torch.Tensor:
        """Row of one context given as token ids: float[width], nats."""
        return (await self.batch_next_token_logprobs([token_ids], lora_name))[0]

    async def batch_next_token_logprobs(
        self, token_ids_list: Sequence[Sequence[int]], lora_name: str | None = None
    ) -> torch.Tensor:
        """Rows of several contexts given as token ids: float[B, width], nats."""
        with self.tree.one_thread:
            nodes = self._nodes(token_ids_list, lora_name)
            rows = await self.rows(nodes)
            self.refuse_bad(nodes, rows)
            return rows

    def next_token_logprobs_sync(
        self, token_ids: Sequence[int], lora_name: str | None = None
    ) -> torch.Tensor:
        """As `next_token_logprobs`, without an event loop."""
        return self.batch_next_token_logprobs_sync([token_ids], lora_name)[0]

    def batch_next_token_logprobs_sync(
        self, token_ids_list: Sequence[Sequence[int]], lora_name: str | None = None
    ) -> torch.Tensor:
        """As `batch_next_token_logprobs`, without an event loop."""
        with self.tree.one_thread:
            nodes = self._nodes(token_ids_list, lora_name)
            rows = self.rows_sync(nodes)
            self.refuse_bad(nodes, rows)
            return rows

    def _nodes(self, contexts: Sequence[Sequence[int]], lora_name: str | None) -> IntArray:
        if lora_name is not None:
            raise ValueError(
                f"adapters are chosen when a model is loaded, got lora_name={lora_name!r}"
            )
        if any(len(c) == 0 for c in contexts):
            raise ValueError(NO_TOKEN)
        if self.tree.due():
            self.tree.collect()
        return np.array([self.tree.insert(context) for context in contexts], dtype=np.int64)

    sample = _as_async_lm("sample")
    batch_sample = _as_async_lm("batch_sample")
    add_new_lora = _as_async_lm("add_new_lora")
    remove_lora = _as_async_lm("remove_lora")
    set_lora = _as_async_lm("set_lora")
    clear_lora = _as_async_lm("clear_lora")


def start_tokens(
    tokenizer: Any, start: int | Sequence[int] | None = None, size: int | None = None
) -> tuple[int, ...]:
    """Token ids to put before a text, so that its first token has a context.

    What the user gives comes first. Else the tokenizer's BOS token. A tokenizer without one
    (the Qwen families) belongs to a model that has seen texts follow one another, so the
    next choice is the token that stood between them: `<|endoftext|>` or another well-known
    separator among the tokenizer's special tokens, then its EOS token, then its padding
    token.

    Args:
        tokenizer: a Hugging Face tokenizer, or anything with `bos_token_id`.
        start: an id or a sequence of ids; None to choose.
        size: token ids that the model takes are below it; None if that is not known.

    Returns:
        At least one token id.

    Raises:
        ValueError: `start` is empty, or has an id that is negative or too large; or nothing is
            given and nothing can be chosen.
        TypeError: `start` is neither an integer nor a sequence of integers.
    """
    if start is not None:
        ids = _given(start)
        if size is not None and max(ids) >= size:
            raise ValueError(f"start must be token ids below {size}, got {start!r}")
        return ids
    for choice in (
        getattr(tokenizer, "bos_token_id", None),
        _separator(tokenizer),
        getattr(tokenizer, "eos_token_id", None),
        getattr(tokenizer, "pad_token_id", None),
    ):
        if isinstance(choice, Integral):
            return (int(choice),)
    raise ValueError(
        "the tokenizer has no BOS, EOS or padding token to begin a text with; say which token "
        "ids to begin with: start=..."
    )


def _given(start: int | Sequence[int]) -> tuple[int, ...]:
    ids: Any = (start,) if isinstance(start, Integral) else start
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"start must be a token id or a sequence of token ids, got {start!r}")
    ids = tuple(ids)
    if not all(isinstance(i, Integral) for i in ids):
        raise TypeError(f"start must be a token id or a sequence of token ids, got {start!r}")
    out = tuple(int(i) for i in ids)
    if not out or min(out) < 0:
        raise ValueError(f"start must be one or more token ids of at least 0, got {start!r}")
    return out


def _separator(tokenizer: Any) -> int | None:
    """Id of a document separator among the special tokens, if there is one."""
    special = getattr(tokenizer, "added_tokens_decoder", None)
    if not isinstance(special, dict):
        return None
    ids = {str(token): i for i, token in special.items()}
    return next((ids[name] for name in _SEPARATORS if name in ids), None)


def _register() -> None:
    """Make engines virtual subclasses of `AsyncLM`, if it has been imported."""
    base = sys.modules.get("genlm.backend.llm.base")
    if base is not None and LateAsyncLM not in _registered:
        _registered.append(base.AsyncLM.register(LateAsyncLM))


_registered: list[type] = []
_register()
