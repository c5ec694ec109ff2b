"""The one interface between a token-level model and everything above it.

A `RowEngine` answers one question: the next-token log-probabilities of many contexts at
once. Contexts are ids of its `ContextTree`. Callers that ask at the same time (tasks of one
event loop) are answered by one evaluation, in which equal contexts stand once.

An engine is itself a genlm-backend `AsyncLM`, so genlm-control's `PromptedLLM` and
genlm-bytes run on it unchanged.
"""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch

from genlm_bytes_smc.fast_path import Way
from genlm_bytes_smc.lm.async_lm import LateAsyncLM
from genlm_bytes_smc.lm.contexts import ContextTree, IntArray

_TURN = 2e-3  # seconds between two turns of the loop where nobody else waits for one
_FEW_TASKS = 8  # up to so many are counted at each request


class ContextTooLongError(ValueError):
    """A context has more tokens than the model's window holds."""


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


@dataclass(eq=False)
class _Request:
    nodes: IntArray
    done: asyncio.Future[torch.Tensor | None] = field(repr=False)


def not_pickled() -> TypeError:
    """Return the error for pickling a model, or what refers to one."""
    return TypeError(
        "a language model is not pickled, nor what is made from one (beams, lanes, a ByteLLM): "
        "pickle its name, BeamParams, prompts and results, and load the model where they arrive"
    )


class RowEngine(LateAsyncLM):
    """Next-token log-probability rows of many contexts at once.

    Args:
        tokenizer: a Hugging Face tokenizer, or whatever stands for one where `byte_vocab`
            is given; or a `BundledTokenizer`.
        device: where rows are returned.
        width: number of columns of a row (the LM head's, padding included), or None while
            unknown (an adapter learns it from the first row).
        window: the most tokens a context may have, or None for no limit.
        start: token ids that every context of a text begins with (usually BOS).
        byte_vocab: what each token spells (genlm-backend `Token`s, entry i for id i); decoded
            from `tokenizer` if None.
        str_vocab: as strings; made from `byte_vocab` if None.

    Attributes:
        encoder: `tokenizer`, or what does its work here without transformers.
    """

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
            self.str_vocab = _strings(self.byte_vocab) if str_vocab is None else list(str_vocab)
        self.device = device
        self.width = width
        self.window = window
        self.start = tuple(int(t) for t in start)
        self.tree = ContextTree()
        self.counts = LMCounts()
        self._requests: list[_Request] = []
        self._spelled = {}
        self._last_turn = 0.0
        self._crowd = 0  # requests to come that take it that there are other tasks
        self.tree.on_free(self._forget_spelling)

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

    @property
    def input_size(self) -> int | None:
        """Token ids that the model takes are below it; None where that is not known."""
        return None

    @property
    def forward(self) -> Way:
        """Return how rows are computed: a string whose `reason` says why it is this way.

        "outside" where another package or program does it its own way; see
        `TreeTransformer.forward` for the ways of this one.
        """
        source = type(getattr(self, "llm", self))
        return Way("outside", f"rows come from {source.__module__}.{source.__qualname__}")

    def __deepcopy__(self, memo: object) -> RowEngine:
        """Return the engine itself: copies of what stands on a model share the model."""
        return self

    def __copy__(self) -> RowEngine:
        return self

    def __reduce__(self) -> NoReturn:
        raise not_pickled()

    # -- what a subclass provides ------------------------------------------------------

    @abstractmethod
    def evaluate(self, nodes: IntArray) -> torch.Tensor:
        """Compute rows of distinct contexts, now.

        Args:
            nodes: int64[B], distinct ids of `tree`, none of them empty contexts, all within
                `window`, all kept alive by the caller.

        Returns:
            Normalised log-probabilities in nats, float32 or float64 [B, width], on `device`.
        """

    async def evaluate_async(self, nodes: IntArray) -> torch.Tensor:
        """As `evaluate`; engines whose model is asynchronous override it."""
        return self.evaluate(nodes)

    def refuse_bad(self, nodes: IntArray, rows: torch.Tensor) -> None:
        """Raise if rows of an outside model hold NaN or +inf; models of our own do not.

        Whoever sums rows anyway (`RowStore`) asks only where a sum is no number: looking
        first would be one more pass over every row.

        Args:
            nodes: int64[B], the contexts.
            rows: float[B, width], what `evaluate` gave for them.

        Raises:
            ValueError: naming what came, and for which contexts.
        """

    # -- what callers use --------------------------------------------------------------

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
        self.check(nodes)
        with self.tree.one_thread, self.tree.pinned(nodes):
            if not self._requests and self._only_task():
                await self._turn()
                distinct, where = _distinct(nodes)
                return _pick(await self.evaluate_async(distinct), where)
            rows = None
            while rows is None:  # None: whoever served us was cancelled
                rows = await self._answer(nodes)
            return rows

    async def _turn(self) -> None:
        """Let the loop hear a cancellation, a time-out or an interrupt, now and then."""
        now = time.monotonic()
        if now - self._last_turn > _TURN:
            self._last_turn = now
            await asyncio.sleep(0)

    def _only_task(self) -> bool:
        """Return whether this is the only task, so that nobody could join its request.

        Counting tasks walks through all there are, so a crowd is counted as seldom as it is
        large; until then we wait for others to join, whether they would or not.
        """
        if self._crowd:
            self._crowd -= 1
            return False
        tasks = len(asyncio.all_tasks())
        self._crowd = tasks if tasks > _FEW_TASKS else 0
        return tasks == 1

    def rows_sync(self, nodes: IntArray) -> torch.Tensor:
        """As `rows`, without an event loop."""
        self.check(nodes)
        with self.tree.one_thread, self.tree.pinned(nodes):
            distinct, where = _distinct(nodes)
            return _pick(self.evaluate(distinct), where)

    def check(self, nodes: IntArray) -> None:
        """Raise before any work if a context is empty or longer than the window."""
        if len(nodes) == 0:
            return
        depth = self.tree.depth[nodes].tolist()
        if min(depth) == 0:
            raise ValueError("a context needs at least one token (usually BOS), got none")
        if self.window is not None and max(depth) > self.window:
            raise ContextTooLongError(
                f"a context of {max(depth)} tokens does not fit the model's window of "
                f"{self.window} tokens; shorten the prompt or the text"
            )

    async def _answer(self, nodes: IntArray) -> torch.Tensor | None:
        """Join the callers waiting at this moment; the first of them serves all."""
        loop = asyncio.get_running_loop()
        if self._requests and self._requests[0].done.get_loop() is not loop:
            self._requests = []  # of a loop that stands still: left to it
        line = self._requests
        request = _Request(nodes, loop.create_future())
        line.append(request)
        leads = len(line) == 1
        try:
            if leads:
                await _settle(line)
                await self._serve(line)
            return await request.done
        finally:
            if request in line:
                line.remove(request)
                if leads:  # cancelled before serving: the others ask again
                    _release(line)
                    line.clear()

    async def _serve(self, line: list[_Request]) -> None:
        batch = line.copy()
        line.clear()
        nodes = np.concatenate([r.nodes for r in batch])
        distinct, where = _distinct(nodes)
        try:
            rows = await self.evaluate_async(distinct)
        except Exception as error:
            for request in batch:
                if not request.done.done():
                    request.done.set_exception(error)
            return
        except BaseException:  # cancelled (or interrupted) while serving: the others ask again
            _release(batch)
            raise
        at = 0
        for request in batch:
            mine = slice(at, at + len(request.nodes))
            at += len(request.nodes)
            if request.done.done():
                continue
            if where is not None:
                request.done.set_result(_pick(rows, where[mine]))
            else:  # a copy, unless the rows are all its own
                request.done.set_result(rows if len(batch) == 1 else rows[mine].clone())

    # -- ending ------------------------------------------------------------------------

    def clear_cache(self) -> None:
        """Drop what the model keeps of contexts; rows come out the same.

        Raises:
            RuntimeError: another thread is being answered.
        """
        with self.tree.one_thread:
            self._clear_cache()

    def _clear_cache(self) -> None:
        """Do what `clear_cache` does, with no other thread in it."""

    def close(self) -> None:
        """Free what the engine holds.

        Raises:
            RuntimeError: another thread is being answered.
        """
        with self.tree.one_thread:
            self._close()

    cleanup = close

    def _close(self) -> None:
        """Do what `close` does, with no other thread in it."""


async def _settle(line: list[_Request]) -> None:
    """Give callers that are ready in this pass of the event loop the time to join."""
    seen, quiet = len(line), 0
    while quiet < 2:  # we may run before the others in a pass, so one is not enough
        await asyncio.sleep(0)
        quiet = quiet + 1 if len(line) == seen else 0
        seen = len(line)


def _release(requests: list[_Request]) -> None:
    for request in requests:
        if not request.done.done():
            request.done.set_result(None)


def _strings(byte_vocab: Sequence[Any]) -> list[str]:
    return [bytes(getattr(t, "byte_string", t)).decode("utf-8", "replace") for t in byte_vocab]


def _distinct(nodes: IntArray) -> tuple[IntArray, IntArray | None]:
    """Distinct ids, and where each of `nodes` is among them (None: they are the same)."""
    if len(nodes) < 2 or bool((nodes[1:] > nodes[:-1]).all()):
        return nodes, None
    return np.unique(nodes, return_inverse=True)


def _pick(rows: torch.Tensor, where: IntArray | None) -> torch.Tensor:
    """`rows[where]`, a copy; or the rows themselves."""
    return rows if where is None else rows[torch.as_tensor(where, device=rows.device)]
