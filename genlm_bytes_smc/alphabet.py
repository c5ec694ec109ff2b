"""The alphabet that everything in this package speaks: 256 one-byte tokens and EOS.

Every byte-level potential of the package is built on the same list object, so that a
genlm-control product of two of them needs no coercion: it recognises the list by identity
and adds the two rows. Column `b` of a row of weights is byte `b`; column `EOS_COLUMN` is the
end of the text.

`imported_late` keeps short the import of genlm-control, which takes slow packages along for
functions that nobody here calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    return lambda *args, **options: getattr(import_module(name), function)(*args, **options)


# The first is what jsonschema takes to check the formats "iri" and "iri-reference" (it builds a
# parser while it is imported, for one to two seconds); the others what arsenal's stop watch does.
with (
    imported_late("rfc3987_syntax", "is_valid_syntax"),
    imported_late("matplotlib.pyplot"),
    imported_late("pandas"),
):
    from genlm.control.potential.base import Potential as Potential
    from genlm.control.potential.base import VocabTables

N_BYTES = 256
EOS_COLUMN = N_BYTES
N_SYMBOLS = N_BYTES + 1

BYTES: list[bytes] = [bytes([i]) for i in range(N_BYTES)]
TABLES: VocabTables = Potential.build_tables(BYTES)

Context = Sequence[bytes] | bytes


def as_bytes(context: Context) -> bytes:
    """Return the bytes of a context, checked.

    Raises:
        TypeError: a token is not `bytes`.
        ValueError: a token is not exactly one byte.
    """
    if isinstance(context, bytes):
        return context
    try:
        text = b"".join(context)
    except TypeError:
        odd = next(t for t in context if not isinstance(t, bytes))
        raise TypeError(
            f"a context is bytes or a sequence of one-byte `bytes` tokens, got the token {odd!r} "
            f"of type {type(odd).__name__}"
        ) from None
    if len(text) != len(context):
        odd = next(t for t in context if len(t) != 1)
        raise ValueError(f"a token of a context is exactly one byte, got {odd!r}")
    return text


def contexts_of(texts: Iterable[bytes]) -> list[list[bytes]]:
    """Return texts as genlm-control has them: lists of one-byte tokens."""
    return [[BYTES[b] for b in text] for text in texts]
