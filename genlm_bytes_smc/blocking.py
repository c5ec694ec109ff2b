"""Plain forms of awaited calls, for scripts and notebooks: one rule for all.

`run_sync(call)` runs any coroutine of the package and returns its result. A function `f` of the
package that is awaited has the plain form `f_sync`, which is `blocking(f)`.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def run_sync(call: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine, from code that cannot await.

    It has an event loop of its own. Where a loop is running already (a notebook), the new one
    gets a thread, and the running one stands still meanwhile. Ctrl-C cancels the coroutine, which
    ends before `KeyboardInterrupt` is raised.

    Args:
        call: a coroutine, such as `llm.prefix(b"a")`.

    Raises:
        TypeError: no coroutine.
    """
    _check(call)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(call)
    return _in_thread(call)


def blocking(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Return the plain form of an async function: same arguments, result and errors."""
    name = f"{function.__name__}_sync"

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_sync(function(*args, **kwargs))

    plain.__name__ = plain.__qualname__ = name
    plain.__doc__ = f"`{function.__name__}` for scripts and notebooks: blocks until done."
    return plain


def _check(call: object) -> None:
    if not inspect.iscoroutine(call):
        raise TypeError(f"a coroutine is due, as f(x) of an async f; got {type(call).__name__}")


def _in_thread(call: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a thread and a loop of its own, and cancel it if we are interrupted."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []

    async def noted() -> T:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await call

    context = contextvars.copy_context()
    with _interruptible(), ThreadPoolExecutor(1) as pool:
        future = pool.submit(context.run, asyncio.run, noted())
        try:
            return future.result()
        except BaseException:
            for loop, task in running:
                if task is not None and not loop.is_closed():
                    loop.call_soon_threadsafe(task.cancel)
            raise


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise `KeyboardInterrupt` here.

    `asyncio.run` has it cancel its own task, which stands still and would never notice.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # it is ignored, or handled by what is not Python
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
