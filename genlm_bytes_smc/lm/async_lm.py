"""genlm-backend's `AsyncLM` for engines, which import it only when somebody asks for it.

Importing it brings transformers, which takes longer than loading the bundled model.
"""

from __future__ import annotations

import sys
from abc import ABC
from typing import Any


class LateAsyncLM(ABC):  # noqa: B024  (its subclasses have abstract methods)
    """A class whose instances are `AsyncLM`s for whoever has imported that class.

    Its subclasses define the four methods that give rows; the others are `AsyncLM`'s own.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The type; `isinstance(engine, AsyncLM)` reads it, and by then there is an `AsyncLM`."""
        _register()
        return type(self)

    async def sample(self, *args: Any, **options: Any) -> list[int]:
        """See `AsyncLM.sample`."""
        tokens: list[int] = await _async_lm().sample(self, *args, **options)
        return tokens

    async def batch_sample(self, *args: Any, **options: Any) -> list[list[int]]:
        """See `AsyncLM.batch_sample`."""
        tokens: list[list[int]] = await _async_lm().batch_sample(self, *args, **options)
        return tokens

    def add_new_lora(self, *args: Any, **options: Any) -> None:
        """Raise, as `AsyncLM.add_new_lora` does."""
        _async_lm().add_new_lora(self, *args, **options)

    def remove_lora(self, *args: Any, **options: Any) -> None:
        """Raise, as `AsyncLM.remove_lora` does."""
        _async_lm().remove_lora(self, *args, **options)

    def set_lora(self, *args: Any, **options: Any) -> None:
        """Raise, as `AsyncLM.set_lora` does."""
        _async_lm().set_lora(self, *args, **options)

    def clear_lora(self) -> None:
        """Raise, as `AsyncLM.clear_lora` does."""
        _async_lm().clear_lora(self)


def _async_lm() -> Any:
    from genlm.backend.llm import AsyncLM

    _register()
    return AsyncLM


def _register() -> None:
    """Make engines virtual subclasses of `AsyncLM`, if it has been imported."""
    base = sys.modules.get("genlm.backend.llm.base")
    if base is not None and LateAsyncLM not in _registered:
        _registered.append(base.AsyncLM.register(LateAsyncLM))


_registered: list[type] = []
_register()
