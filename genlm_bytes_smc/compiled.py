"""Compiling functions with numba: what is compiled is kept, and made anew when its sources change.

numba keeps compiled functions beside their source, or in the user's cache directory where that
is read-only. It looks for changes in the file of the function alone, though a function holds the
code of those that it calls, in other files too; so here each is stamped with all files that hold
compiled functions. Where nothing can be written, functions are compiled in each process.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba as nb
from filelock import FileLock
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.imputils import impl_ret_new_ref
from numba.extending import intrinsic
from numba.np import arrayobj

SOURCES = (
    "beam/candidates_numba.py",
    "beam/deferred_numba.py",
    "beam/deferred_reading_numba.py",
    "beam/masses_numba.py",
    "beam/pruning_numba.py",
    "beam/steps_numba.py",
    "compiled.py",
    "constraints/automata_numba.py",
    "lm/contexts_numba.py",
    "lm/rows_numba.py",
)


@cache
def _stamp() -> str:
    """Digest of the files that compiled functions are made of."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in SOURCES)).hexdigest()


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's files of one function, valid as long as none of `SOURCES` changes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        file = self._cache_file
        file._source_stamp, load = _stamp(), file._load_index

        def load_index() -> dict[Any, str]:
            try:
                found: dict[Any, str] = load()
            except (AttributeError, ImportError):  # it names classes which are no more
                return {}
            return found

        file._load_index = load_index
        # numba writes index and code apart: of two processes at once, one could take the other's
        # code, or an older one, for its own.
        self._lock = FileLock(Path(self.cache_path) / "compiled.lock")

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Return what was kept for a signature, or None."""
        with self._lock:
            return super().load_overload(signature, context)

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled."""
        with self._lock:
            super().save_overload(signature, result)


def _compile(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    # Division by zero gives inf or NaN as in numpy. Pointers for C callers are left out.
    decorate = nb.njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True, **options)
    dispatcher = decorate(function)
    with contextlib.suppress(RuntimeError):  # numba found no directory that can be written
        dispatcher._cache = _Cache(function)
    return dispatcher


def entry(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that Python calls, and perhaps other compiled functions too.

    Args:
        options: of `numba.njit`.
    """
    return lambda function: _compile(function, options)


def inner(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that only compiled functions call.

    What turns Python's objects into arrays is left out, which takes long to compile. A call
    from Python raises TypeError.

    Args:
        options: of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = _compile(function, {"no_cpython_wrapper": True, **options})

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise TypeError(f"{function.__qualname__} can only be called by compiled functions")

        def add_overload(result: Any) -> None:
            dispatcher.overloads[tuple(result.signature.args)] = result

        # numba's own would offer Python an address that is null.
        dispatcher.add_overload, dispatcher._compile_for_args = add_overload, refuse
        return dispatcher

    return decorate


@intrinsic  # type: ignore[untyped-decorator]
def full(typingctx: Any, shape: Any, value: Any) -> Any:
    """Make an array with `value`, of its type, in each place; for compiled functions.

    What `np.full`, `np.zeros` and `np.empty` do; numba compiles each of those again and again.

    Args:
        shape: an integer, or a tuple of them.
        value: a number.
    """
    array = types.Array(types.unliteral(value), getattr(shape, "count", 1), "C")

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given, of = signature.args
        tupled = isinstance(given, types.BaseTuple)
        lengths = cgutils.unpack_tuple(builder, args[0]) if tupled else [args[0]]
        kinds = given if tupled else [given]
        lengths = [context.cast(builder, *x, types.intp) for x in zip(lengths, kinds, strict=True)]
        out = arrayobj._empty_nd_impl(context, builder, array, lengths)
        item = context.cast(builder, args[1], of, array.dtype)
        with cgutils.for_range(builder, out.nitems) as loop:
            at = cgutils.gep(builder, out.data, loop.index)
            arrayobj.store_item(context, builder, array, item, at)
        return impl_ret_new_ref(context, builder, array, out._getvalue())

    return array(shape, value), code


@intrinsic  # type: ignore[untyped-decorator]
def array_at(typingctx: Any, address: Any, shape: Any, dtype: Any) -> Any:
    """Return the array that lies at an address: `nb.carray`, without compiling it for each type."""
    array = types.Array(dtype.dtype, shape.count, "C")

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = builder.inttoptr(args[0], context.get_data_type(array.dtype).as_pointer())
        lengths = cgutils.unpack_tuple(builder, args[1])
        size = context.get_abi_sizeof(context.get_data_type(array.dtype))
        strides = [context.get_constant(types.intp, size)]
        for length in lengths[:0:-1]:
            strides.insert(0, builder.mul(strides[0], length))
        out = context.make_array(array)(context, builder)
        item = context.get_constant(types.intp, size)
        arrayobj.populate_array(out, data, lengths, strides, item, None)
        return out._getvalue()

    return array(address, shape, dtype), code
