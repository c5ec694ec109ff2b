"""What engines have of genlm-backend's `AsyncLM`, imported only when somebody asks for it.

Importing it brings transformers, which takes longer than loading the bundled model.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.lm.bundled import BundledTokenizer
from genlm_bytes_smc.lm.contexts import ContextTree, IntArray
from genlm_bytes_smc.trie import Vocabulary


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

    @abstractmethod
    def refuse_bad(self, nodes: IntArray, rows: torch.Tensor) -> None:
        """See `RowEngine`."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The type; `isinstance(engine, AsyncLM)` reads it, and by then there is an `AsyncLM`."""
        _register()
        return type(self)

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

    # -- rows of contexts that are given as token ids ------------------------------------

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
            raise ValueError("a context needs at least one token (usually BOS), got none")
        if self.tree.due():
            self.tree.collect()
        return np.array([self.tree.insert(context) for context in contexts], dtype=np.int64)

    # -- what `AsyncLM` does for all ----------------------------------------------------

    sample = _as_async_lm("sample")
    batch_sample = _as_async_lm("batch_sample")
    add_new_lora = _as_async_lm("add_new_lora")
    remove_lora = _as_async_lm("remove_lora")
    set_lora = _as_async_lm("set_lora")
    clear_lora = _as_async_lm("clear_lora")


def _register() -> None:
    """Make engines virtual subclasses of `AsyncLM`, if it has been imported."""
    base = sys.modules.get("genlm.backend.llm.base")
    if base is not None and LateAsyncLM not in _registered:
        _registered.append(base.AsyncLM.register(LateAsyncLM))


_registered: list[type] = []
_register()
