"""Engines of models that are loaded already, and rows of any genlm-backend `AsyncLM`.

`as_engine` gives each model object one engine for each set of options. `AdapterEngine` is that of
an `AsyncLM`: vLLM, SGLang, MLX, a mock, or a class of one's own. It is the only engine that waits
for its model; all others compute at once.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.lm.contexts import IntArray, start_tokens
from genlm_bytes_smc.lm.engine import BadRowError, RowEngine
from genlm_bytes_smc.lm.transformer import TreeTransformer

_ENGINES = "_genlm_bytes_smc_engines"

_ONE, _BATCH = "next_token_logprobs", "batch_next_token_logprobs"
_ONE_SYNC, _BATCH_SYNC = f"{_ONE}_sync", f"{_BATCH}_sync"
_NOT_OVERRIDDEN = 1 << 30

# On the host a larger block is fresh memory each time, whose first use costs more than cheap
# rows do; and it is out of the caches before its rows are read.
_HOST_REQUEST = 1 << 24

_EXACT = (torch.float32, torch.float64)


def as_engine(
    llm: Any, *, start: int | Sequence[int] | None = None, limit_bytes: int | None = None
) -> RowEngine:
    """Return the engine of a loaded model; the same object with the same options has one.

    A `RowEngine` is returned as it is. A genlm-backend `AsyncTransformer` gives its model and
    tokenizer to a `TreeTransformer` (unless it is of a subclass that computes rows its own
    way). Any other `AsyncLM` is wrapped in an `AdapterEngine`.

    Args:
        llm: the model.
        start: token ids that contexts begin with; None chooses as `start_tokens` does (or,
            for a `RowEngine`, leaves what it has).
        limit_bytes: the most memory for keys and values where this package keeps them.

    Raises:
        TypeError: `llm` is no such thing.
        ValueError: options that contradict the given `RowEngine`, or do not apply.
    """
    if isinstance(llm, RowEngine):
        _check_same(llm, start, limit_bytes)
        return llm
    if isinstance(llm, (str, os.PathLike)):
        raise TypeError(f"expected a model, got {llm!r}; load_model loads models by name")
    key = (None if start is None else start_tokens(None, start), limit_bytes)
    if not hasattr(llm, "__dict__"):  # no place for attributes: an engine a call, then
        return _new_engine(llm, start, limit_bytes)
    engines: _Engines | None = vars(llm).get(_ENGINES)
    if engines is None or engines.owner() is not llm:  # none yet, or those of what it is a copy of
        engines = _Engines(llm)
    if key not in engines:
        engines[key] = _new_engine(llm, start, limit_bytes)
        vars(llm)[_ENGINES] = engines
    return engines[key]


class _Engines(dict[Any, RowEngine]):
    """The engines of one model object, kept in it; they stay behind when it is copied or
    pickled, as they hold its weights and caches."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner: Callable[[], Any] = weakref.ref(owner)

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _new_engine(llm: Any, start: Any, limit_bytes: int | None) -> RowEngine:
    from genlm.backend.llm import AsyncTransformer

    if isinstance(llm, AsyncTransformer):
        place = type(llm).__mro__.index(AsyncTransformer)
        if all(_rank(llm, name) >= place for name in (_ONE, _BATCH, _ONE_SYNC, _BATCH_SYNC)):
            return TreeTransformer(llm.model, llm.tokenizer, start=start, limit_bytes=limit_bytes)
    if limit_bytes is not None:
        raise ValueError(f"limit_bytes does not apply to {type(llm).__name__}")
    return AdapterEngine(llm, start=start)


def _check_same(engine: RowEngine, start: Any, limit_bytes: int | None) -> None:
    if start is not None and start_tokens(None, start) != engine.start:
        raise ValueError(f"the engine begins contexts with {engine.start}, got start={start!r}")
    has = getattr(engine, "limit_bytes", None)
    if limit_bytes is not None and limit_bytes != has:
        raise ValueError(f"the engine has limit_bytes={has}, got limit_bytes={limit_bytes}")


class AdapterEngine(RowEngine):
    """A `RowEngine` over the `AsyncLM` interface.

    Of the interface's four methods (one context or a batch, awaited or not) it calls the one
    that the model's class defines most specifically, so a subclass that overrides
    `next_token_logprobs` alone is heard. Without an event loop, a model that is only
    asynchronous is run in one of its own.

    Rows may come as tensors, arrays or lists of them. Half-precision rows become float32 and
    are normalised again; float32 and float64 rows are taken as they are.

    Args:
        llm: the model; its `byte_vocab` says what tokens spell.
        start: token ids that contexts begin with; None chooses as `start_tokens` does.
        owned: whether `close` ends the model too.

    Attributes:
        llm: the model.
        counts: `forwards` counts calls of the model and `positions` the tokens sent to it;
            what it caches is its own affair.

    Raises:
        TypeError: `llm` lacks `byte_vocab` or a method that gives rows.
        ValueError: nothing can begin a text.
    """

    def __init__(
        self, llm: Any, *, start: int | Sequence[int] | None = None, owned: bool = False
    ) -> None:
        byte_vocab = getattr(llm, "byte_vocab", None)
        if byte_vocab is None or not hasattr(llm, _ONE):
            raise TypeError(
                f"expected a genlm-backend AsyncLM (byte_vocab, {_ONE}), got {type(llm).__name__}"
            )
        tokenizer = getattr(llm, "tokenizer", None)
        super().__init__(
            tokenizer,
            device=_device_of(llm),
            width=None,
            window=_window_of(llm),
            start=start_tokens(tokenizer, start),
            byte_vocab=byte_vocab,
            str_vocab=getattr(llm, "str_vocab", None),
        )
        self.llm = llm
        if self.device.type == "cpu":
            self.request_bytes = _HOST_REQUEST
            self.forwards_are_dear = False  # as far as we know: it may answer one by one
        self._owned = owned
        self._least_width = 1 + max(
            (int(getattr(t, "token_id", i)) for i, t in enumerate(byte_vocab)), default=-1
        )

    # -- rows --------------------------------------------------------------------------

    async def evaluate_async(self, nodes: IntArray) -> torch.Tensor:
        """Rows of distinct contexts; see `RowEngine`."""
        contexts = [self.tree.tokens(n) for n in nodes.tolist()]
        if _rank(self.llm, _BATCH) <= _rank(self.llm, _ONE):
            result = await self.llm.batch_next_token_logprobs(contexts)
        else:
            result = await _all(self.llm.next_token_logprobs, contexts)
        return self._rows(result, nodes)

    def evaluate(self, nodes: IntArray) -> torch.Tensor:
        """As `evaluate_async`, without an event loop.

        Raises:
            RuntimeError: the model is only asynchronous and an event loop is running.
        """
        contexts = [self.tree.tokens(n) for n in nodes.tolist()]
        awaited = min(_rank(self.llm, _ONE), _rank(self.llm, _BATCH))
        if min(_rank(self.llm, _ONE_SYNC), _rank(self.llm, _BATCH_SYNC)) <= awaited:
            try:
                return self._rows(self._ask_sync(contexts), nodes)
            except NotImplementedError:
                pass
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.evaluate_async(nodes))
        raise RuntimeError(
            f"{type(self.llm).__name__} is asynchronous and an event loop is running: await the "
            "rows instead"
        )

    def _ask_sync(self, contexts: list[list[int]]) -> Any:
        if _rank(self.llm, _BATCH_SYNC) <= _rank(self.llm, _ONE_SYNC):
            return self.llm.batch_next_token_logprobs_sync(contexts)
        return [self.llm.next_token_logprobs_sync(c) for c in contexts]

    def _rows(self, result: Any, nodes: IntArray) -> torch.Tensor:
        """Whatever the model returned as a checked block of rows."""
        rows = _as_tensor(result).to(self.device)
        shape = rows.shape
        if len(shape) != 2 or shape[0] != len(nodes):
            raise BadRowError(
                f"{type(self.llm).__name__} was asked for {len(nodes)} rows and returned shape "
                f"{tuple(shape)}; expected ({len(nodes)}, width)"
            )
        if shape[1] < self._least_width:
            raise BadRowError(
                f"{type(self.llm).__name__} returned rows of width {shape[1]}, but its "
                f"vocabulary has token ids up to {self._least_width - 1}; rows may be wider "
                "(padding), not narrower"
            )
        self.width = int(shape[1])
        self.counts.forwards += 1
        self.counts.rows += len(nodes)
        self.counts.positions += sum(self.tree.depth[nodes].tolist())
        return rows

    def refuse_bad(self, nodes: IntArray, rows: torch.Tensor) -> None:
        """See `RowEngine`."""
        bad = ~(rows.amax(dim=1) < torch.inf).cpu().numpy()  # NaN compares false
        if bad.any():
            raise self._bad_rows(type(self.llm).__name__, nodes, bad)

    # -- ending ------------------------------------------------------------------------

    def _clear_cache(self) -> None:
        """Drop the caches of the model, if it can."""
        clear = getattr(self.llm, "clear_cache", None)
        if clear is not None:
            clear()

    def _close(self) -> None:
        """End the model if this engine owns it."""
        cleanup = getattr(self.llm, "cleanup", None)
        if self._owned and cleanup is not None:
            cleanup()


def _rank(llm: Any, name: str) -> int:
    """Return how far up the class hierarchy a method is defined; the instance itself counts -1."""
    kind: Any = type(llm)
    return -1 if name in vars(llm) else _rank_in_class(kind, name)


@lru_cache(maxsize=256)
def _rank_in_class(kind: Any, name: str) -> int:
    for i, cls in enumerate(kind.__mro__):
        if name in vars(cls):
            # AsyncLM's own batch methods only loop over the single ones.
            generic = cls.__module__ == "genlm.backend.llm.base" and cls.__name__ == "AsyncLM"
            return _NOT_OVERRIDDEN if generic else i
    return _NOT_OVERRIDDEN + 1


async def _all(ask: Callable[[list[int]], Awaitable[Any]], contexts: list[list[int]]) -> list[Any]:
    """Await `ask` for all contexts together, leaving no task behind if one fails."""
    tasks = [asyncio.ensure_future(ask(c)) for c in contexts]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _as_tensor(result: Any) -> torch.Tensor:
    """float32 or float64 tensor from a tensor, an array, or a list of either."""
    if isinstance(result, (list, tuple)):
        rows = [torch.as_tensor(row).detach() for row in result]
        if all(row.device.type == "cpu" and row.dtype in _EXACT for row in rows):
            out = torch.from_numpy(np.stack([row.numpy() for row in rows]))
        else:
            out = torch.stack(rows)
    else:
        out = torch.as_tensor(result).detach()
    if out.dtype in _EXACT:
        return out
    if out.dtype in (torch.float16, torch.bfloat16):
        return torch.log_softmax(out, dim=-1, dtype=torch.float32)
    return out.float()


def _device_of(llm: Any) -> torch.device:
    device = getattr(llm, "device", None)
    if isinstance(device, (str, torch.device)):
        return torch.device(device)
    on_gpu = type(llm).__name__ in ("AsyncVirtualLM", "AsyncSGLTransformer")
    return torch.device("cuda" if on_gpu and torch.cuda.is_available() else "cpu")


def _window_of(llm: Any) -> int | None:
    """vLLM's limit on the length of a context, which leaves room for the next token."""
    at: Any = llm
    for name in ("llm_engine", "llm_engine", "model_config", "max_model_len"):
        at = getattr(at, name, None)
    return at - 1 if isinstance(at, int) else None
