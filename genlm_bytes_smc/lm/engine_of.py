"""The engine of a model that is loaded already: one for each model object and set of options."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from genlm_bytes_smc.lm.adapter import AdapterEngine, overrides
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.start import start_tokens
from genlm_bytes_smc.lm.transformer import TreeTransformer

_ENGINES = "_genlm_bytes_smc_engines"


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
    engines = getattr(llm, "__dict__", {}).get(_ENGINES)
    if engines is None or engines.owner() is not llm:  # none yet, or those of what it is a copy of
        engines = _Engines(llm)
    if key not in engines:
        engines[key] = _new_engine(llm, start, limit_bytes)
        try:
            setattr(llm, _ENGINES, engines)
        except AttributeError:  # no place for attributes: an engine a call, then
            return engines[key]
    return engines[key]


class _Engines(dict[Any, RowEngine]):
    """The engines of one model object, kept in it; they stay behind when it is copied or
    pickled, as they hold its weights and caches."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = _reference(owner)

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _reference(llm: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(llm)
    except TypeError:  # a class with __slots__, where nothing is kept anyway
        return lambda: llm


def _new_engine(llm: Any, start: int | Sequence[int] | None, limit_bytes: int | None) -> RowEngine:
    from genlm.backend.llm import AsyncTransformer

    if isinstance(llm, AsyncTransformer) and not overrides(llm, AsyncTransformer):
        return TreeTransformer(llm.model, llm.tokenizer, start=start, limit_bytes=limit_bytes)
    if limit_bytes is not None:
        raise ValueError(f"limit_bytes does not apply to {type(llm).__name__}")
    return AdapterEngine(llm, start=start)


def _check_same(
    engine: RowEngine, start: int | Sequence[int] | None, limit_bytes: int | None
) -> None:
    if start is not None and start_tokens(None, start) != engine.start:
        raise ValueError(f"the engine begins contexts with {engine.start}, got start={start!r}")
    has = getattr(engine, "limit_bytes", None)
    if limit_bytes is not None and limit_bytes != has:
        raise ValueError(f"the engine has limit_bytes={has}, got limit_bytes={limit_bytes}")
