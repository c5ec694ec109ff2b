"""Functions of slow packages that are imported when they are first called.

jsonschema, which genlm-control imports, takes `rfc3987_syntax` to check the formats "iri" and
"iri-reference". That package builds a parser while it is imported, for one to two seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def imported_late(name: str, *functions: str) -> Iterator[None]:
    """Let modules that are imported in the block take functions of a package without loading it.

    The package is imported when one of them is first called. Any other name of the package
    imports it at once. Nothing happens where it is loaded already, or not installed.

    Args:
        name: the package.
        functions: names of functions in it.
    """
    if name in sys.modules or (spec := find_spec(name)) is None:
        yield
        return
    stand_in = _StandIn(name)
    stand_in.__spec__ = spec  # torch's compiler, which vLLM imports, looks for packages by it
    for function in functions:
        setattr(stand_in, function, _late(name, function))
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


class _StandIn(ModuleType):
    """A module that becomes the real one as soon as another name is asked for."""

    def __getattr__(self, attribute: str) -> Any:
        name = self.__name__
        if attribute.startswith("__"):  # of the import machinery
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        if sys.modules.get(name) is self:
            del sys.modules[name]
        return getattr(import_module(name), attribute)


def _late(name: str, function: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return getattr(import_module(name), function)(*args, **options)

    call.__name__ = call.__qualname__ = function
    return call
