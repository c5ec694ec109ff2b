"""The one interface between a token-level model and everything above it.

A `RowEngine` answers one question: the next-token log-probabilities of many contexts at
once. Contexts are ids of its `ContextTree`. Callers that ask at the same time (tasks of one
event loop) are answered by one evaluation, in which equal contexts stand once.

An engine is itself a genlm-backend `AsyncLM`, so genlm-control's `PromptedLLM` and
genlm-bytes run on it unchanged. That class is imported only when somebody asks for it: it brings
transformers, which takes longer than loading the bundled model.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.calls import Coalesced
from genlm_bytes_smc.fast_path import Way
from genlm_bytes_smc.lm.bundled import BundledTokenizer
from genlm_bytes_smc.lm.contexts import ContextTree, IntArray
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.lm.spelling import decode_vocab
from genlm_bytes_smc.trie import Vocabulary

Row = tuple[torch.Tensor, int]
"""One row: a block of rows, float[B, width], and the row's place in it."""


class ContextTooLongError(ValueError):
    """A context has more tokens than the model's window holds."""


class BadRowError(ValueError):
    """A model returned a row that is no distribution over its vocabulary."""


class EngineError(RuntimeError):
    """The engine behind a model could not start, died, or was closed; the cause is attached."""


@dataclass
class LMCounts:
    """What a model was asked to do since it was made (or since `reset`).

    forwards: calls of the model; rows: next-token rows it returned; positions: token
    positions it computed (a prompt of t tokens counts t once, whatever shares it);
    evicted: cached entries dropped to stay within the memory limit.
    """

    forwards: int = 0
    rows: int = 0
    positions: int = 0
    evicted: int = 0

    def reset(self) -> None:
        """Set every count to zero."""
        self.forwards = self.rows = self.positions = self.evicted = 0


class Shared:
    """What a copy of its holder holds, too, as it is or refers to a model; it is not pickled."""

    def __deepcopy__(self, memo: object) -> Self:
        """Return the object itself: copies of what stands on a model share the model."""
        return self

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a language model is not pickled, nor what is made from one (beams, lanes, a ByteLLM): "
            "pickle its name, BeamParams, prompts and results, and load the model where they arrive"
        )


def _as_async_lm(name: str) -> Any:
    """Return a method that does what `AsyncLM`'s of that name does."""

    def method(self: RowEngine, *args: Any, **options: Any) -> Any:
        from genlm.backend.llm import AsyncLM

        _register()
        return getattr(AsyncLM, name)(self, *args, **options)

    method.__name__, method.__doc__ = name, f"See `AsyncLM.{name}`."
    return method


class RowEngine(Shared, ABC):
    """Next-token log-probability rows of many contexts at once.

    Args:
        tokenizer: a Hugging Face tokenizer, a `BundledTokenizer`, or anything beside `byte_vocab`.
        device: where rows are returned.
        width: number of columns of a row (the LM head's, padding included), or None while
            unknown (an adapter learns it from the first row).
        window: the most tokens a context may have, or None for no limit.
        start: token ids that every context of a text begins with (usually BOS).
        byte_vocab: what each token spells (genlm-backend `Token`s, entry i for id i); decoded
            from `tokenizer` if None. str_vocab: as strings; made from `byte_vocab` if None.

    Attributes:
        counts: what the model was asked to do.
        rows_are_cheap: whether some dozens of rows more hardly change the cost of a forward, as
            on a GPU: it should fetch what later ones may ask for. Only `counts` depend on it.
    """

    input_size: int | None = None
    """Token ids that the model takes are below it; None where that is not known."""

    request_bytes = 1 << 28
    """Most that the logits of one request of a `RowStore` take, at 8 bytes each."""

    forwards_are_dear = True
    """Whether a forward costs as much as many more rows in it, so that rows which may not be
    asked for are worth fetching early. Only which rows a known text costs depends on it."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        device: torch.device,
        width: int | None,
        window: int | None,
        start: Sequence[int],
        byte_vocab: Sequence[Any] | None = None,
        str_vocab: Sequence[str] | None = None,
    ) -> None:
        self.encoder = tokenizer
        if byte_vocab is not None:
            self.byte_vocab = list(byte_vocab)
            spelled = (bytes(getattr(t, "byte_string", t)) for t in byte_vocab)
            strings = (s.decode("utf-8", "replace") for s in spelled)
            self.str_vocab = list(strings if str_vocab is None else str_vocab)
        self.device, self.width, self.window = device, width, window
        self.start = tuple(int(t) for t in start)
        self.tree = ContextTree()
        self.counts = LMCounts()
        self.rows_are_cheap = device.type != "cpu"
        self._requests = Coalesced[int, Row]()

    # -- what a subclass provides ------------------------------------------------------

    @property
    def forward(self) -> Way:
        """Return how rows are computed, and why; "outside" where another package or program does
        it its own way (see `TreeTransformer.forward` for the ways of this one)."""
        source = type(getattr(self, "llm", self))
        return Way("outside", f"rows come from {source.__module__}.{source.__qualname__}")

    @abstractmethod
    def evaluate(self, nodes: IntArray) -> torch.Tensor:
        """Compute rows of distinct contexts, now.

        Args:
            nodes: int64[B], at least one; distinct ids of `tree`, none of them empty contexts,
                all within `window`, all kept alive by the caller.

        Returns:
            Normalised log-probabilities in nats, float32 or float64 [B, width], on `device`.
        """

    async def evaluate_async(self, nodes: IntArray) -> torch.Tensor:
        """As `evaluate`; engines whose model is asynchronous override it."""
        return self.evaluate(nodes)

    def refuse_bad(self, nodes: IntArray, rows: torch.Tensor) -> None:
        """Raise a BadRowError if rows of an outside model, of these contexts, hold NaN or +inf.

        Models of our own have none. Whoever sums rows anyway (`RowStore`) asks only where a sum
        is no number: looking first would be one more pass over every row.
        """

    def _refuse_nan(self, rows: torch.Tensor, nodes: IntArray) -> None:
        """Raise a BadRowError if a row of normalised log-probabilities is NaN."""
        bad = torch.isnan(rows[:, 0]).cpu().numpy()  # one bad logit makes the whole row NaN
        if bad.any():
            raise self._bad_rows("the model", nodes, bad, "; try another dtype")

    def _bad_rows(
        self, who: str, nodes: IntArray, bad: npt.NDArray[np.bool_], advice: str = ""
    ) -> BadRowError:
        wrong = np.unique(nodes[bad])
        lengths = ", ".join(map(str, sorted(set(self.tree.depth[wrong].tolist()))))
        return BadRowError(
            f"{who} returned NaN or +inf in {len(wrong)} of {len(np.unique(nodes))} rows (contexts "
            f"of {lengths} tokens){advice}"
        )

    # -- rows of contexts by their ids -------------------------------------------------

    async def rows(self, nodes: IntArray) -> torch.Tensor:
        """Compute rows of contexts, distinct or not; concurrent callers share one forward.

        Not looked through for NaN (see `refuse_bad`).

        Args:
            nodes: int64[B] ids of `tree`.

        Returns:
            float[B, width] log-probabilities in nats, on `device`.

        Raises:
            ContextTooLongError: a context exceeds the model's window.
            RuntimeError: another thread is being answered.
        """
        if len(nodes) == 0:
            return self.rows_sync(nodes)
        found = await self.found(nodes)
        rows = gathered(found)
        return rows.clone() if rows is found[0][0] else rows  # others may have that block too

    async def found(self, nodes: IntArray) -> list[Row]:
        """As `rows`, but each row by reference, in blocks that callers share: copied by nobody."""
        self.check(nodes)
        with self.tree.one_thread, self.tree.pinned(nodes):
            contexts: list[int] = nodes.tolist()
            if await self._requests.alone():
                answers = await self._serve(list(set(contexts)))
                return [answers[context] for context in contexts]
            return await self._requests.ask(contexts, self._serve, alone=False)

    async def _serve(self, contexts: list[int]) -> dict[int, Row]:
        contexts.sort()
        rows = await self.evaluate_async(np.array(contexts, dtype=np.int64))
        return {context: (rows, i) for i, context in enumerate(contexts)}

    def rows_sync(self, nodes: IntArray) -> torch.Tensor:
        """As `rows`, without an event loop."""
        if len(nodes) == 0:
            return torch.empty((0, self.width or len(self.vocab)), device=self.device)
        self.check(nodes)
        with self.tree.one_thread, self.tree.pinned(nodes):
            distinct, where = np.unique(nodes, return_inverse=True)
            rows = self.evaluate(distinct)
            if np.array_equal(distinct, nodes):
                return rows
            return rows[torch.from_numpy(where).to(rows.device)]

    def check(self, nodes: IntArray) -> None:
        """Raise before any work if one of some contexts is empty or longer than the window."""
        depth = self.tree.depth[nodes].tolist()
        if min(depth) == 0:
            raise ValueError("a context needs at least one token (usually BOS), got none")
        if self.window is not None and max(depth) > self.window:
            raise ContextTooLongError(
                f"a context of {max(depth)} tokens does not fit the model's window of "
                f"{self.window} tokens; shorten the prompt or the text"
            )

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
        return self._decoded[0]  # type: ignore[no-any-return]

    @cached_property
    def str_vocab(self) -> list[str]:
        """Return what each token spells, as strings."""
        return self._decoded[1]  # type: ignore[no-any-return]

    @cached_property
    def _decoded(self) -> Any:
        return decode_vocab(self.tokenizer, self.width)

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
        """See `next_token_logprobs`; needs no event loop."""
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
        if self.tree.due():
            self.tree.collect()
        return np.array([self.tree.insert(context) for context in contexts], dtype=np.int64)

    sample = _as_async_lm("sample")
    batch_sample = _as_async_lm("batch_sample")
    add_new_lora = _as_async_lm("add_new_lora")
    remove_lora = _as_async_lm("remove_lora")
    set_lora = _as_async_lm("set_lora")
    clear_lora = _as_async_lm("clear_lora")

    # -- ending ------------------------------------------------------------------------

    def clear_cache(self) -> None:
        """Drop what the model keeps of contexts; rows come out the same.

        Here and in `close` a RuntimeError says that another thread is being answered.
        """
        with self.tree.one_thread:
            self._clear_cache()

    def _clear_cache(self) -> None:
        """Do what `clear_cache` does, with no other thread in it."""

    def close(self) -> None:
        """Free what the engine holds."""
        with self.tree.one_thread:
            self._close()

    cleanup = close

    def _close(self) -> None:
        """Do what `close` does, with no other thread in it."""


def gathered(found: Sequence[Row]) -> torch.Tensor:
    """Return rows as one block, float[B, width]: a copy, unless they are a whole block."""
    first, places = found[0][0], [i for _, i in found]
    if any(block is not first for block, _ in found):
        return torch.stack([block[i] for block, i in found])
    if places == list(range(len(first))):
        return first
    return first[send(np.array(places), first.device)]


def _register() -> None:
    """Make engines virtual subclasses of `AsyncLM`, if it has been imported."""
    if (base := sys.modules.get("genlm.backend.llm.base")) is not None:
        base.AsyncLM.register(RowEngine)


_register()
