"""Awaited calls: their plain forms for scripts, and callers that are merged.

`run_sync(call)` runs any coroutine of the package and returns its result. A function `f` of the
package that is awaited has the plain form `f_sync`, which is `blocking(f)`.

`Coalesced` answers calls that arrive together at once; it is the one place where callers are
merged. The first caller in line lets the event loop run until nobody new joins, and then serves
all who stand in line. Who arrives while a batch is being served takes from it what it answers of
the same questions, and waits for the next batch with the rest. There is no task, thread or lock
behind it: a call that is cancelled while it serves hands its batch to another caller, and nothing
stays behind when the last caller is gone. Callers of different event loops do not wait for each
other: a loop that stands still (stopped in the middle, or behind one that runs in its stead) would
never answer.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

P = ParamSpec("P")
T = TypeVar("T")
Question = TypeVar("Question")
Answer = TypeVar("Answer")
Serve = Callable[[list[Question]], Awaitable[Mapping[Question, Answer]]]

_TURN = 2e-3  # seconds between two turns of the loop where nobody else waits for one
_FEW_TASKS = 8  # up to so many are counted at each call


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
    if not isinstance(call, Coroutine):
        raise TypeError(f"a coroutine is due, as f(x) of an async f; got {type(call).__name__}")
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(call)
    return _in_thread(call)


def blocking(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """Return the plain form of an async function: same arguments, result and errors."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_sync(function(*args, **kwargs))

    plain.__name__ = plain.__qualname__ = f"{function.__name__}_sync"
    plain.__doc__ = f"`{function.__name__}` for scripts and notebooks: blocks until done."
    return plain


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


async def together(calls: Sequence[Awaitable[T]]) -> list[T]:
    """Await concurrent calls; if one fails or we are cancelled, leave none running."""
    if not calls:
        return []
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- merged callers -------------------------------------------------------------------------


class _Request(Generic[Question, Answer]):
    """One call; `lacking` are the questions that have no answer yet."""

    __slots__ = ("answers", "error", "lacking", "wake")

    def __init__(self, questions: Sequence[Question]) -> None:
        self.lacking = list(dict.fromkeys(questions))
        self.answers: dict[Question, Answer] = {}
        self.error: Exception | None = None
        self.wake: asyncio.Future[None] | None = None

    @property
    def settled(self) -> bool:
        return not self.lacking or self.error is not None

    def take(self, answers: Mapping[Question, Answer]) -> None:
        asked, self.lacking = self.lacking, []
        for question in asked:
            if question in answers:
                self.answers[question] = answers[question]
            else:
                self.lacking.append(question)

    def notify(self) -> None:
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)


@dataclass(eq=False)
class _Line(Generic[Question, Answer]):
    """Who waits in one event loop, and who is being served there."""

    waiting: list[_Request[Question, Answer]] = field(default_factory=list)
    served: list[_Request[Question, Answer]] = field(default_factory=list)

    def leave(self, request: _Request[Question, Answer]) -> None:
        """Let a caller go, answered or not; the next in line serves, if nobody does."""
        request.lacking = []
        if request in self.waiting:
            self.waiting.remove(request)
        self.next()

    def next(self) -> None:
        if self.waiting and not self.served:
            self.waiting[0].notify()

    def end_batch(self) -> None:
        """Let those go who have their answers; the others stand first in line."""
        everyone = self.served + self.waiting
        self.served, self.waiting = [], [r for r in everyone if not r.settled]
        for request in everyone:
            if request.settled:
                request.notify()
        self.next()


class Coalesced(Generic[Question, Answer]):
    """Answers questions (hashable) in batches; an event loop has one batch at a time.

    Attributes:
        batches: number of batches served.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._lines: WeakKeyDictionary[asyncio.AbstractEventLoop, _Line[Question, Answer]]
        self._lines = WeakKeyDictionary()
        self._last_turn = 0.0
        self._crowd = 0  # calls to come that take it that there are other tasks

    def __len__(self) -> int:
        """Return the number of calls under way."""
        return sum(len(line.waiting) + len(line.served) for line in self._lines.values())

    async def ask(
        self,
        questions: Sequence[Question],
        serve: Serve[Question, Answer],
        alone: bool | None = None,
    ) -> list[Answer]:
        """Return one answer a question, in order; equal questions are served once.

        Args:
            questions: hashable.
            serve: gives the answers to distinct questions, those of other callers too.
            alone: what `alone` said, if the caller knows.

        Raises:
            Exception: what `serve` raises for these questions alone.
        """
        loop = asyncio.get_running_loop()
        line = self._lines.get(loop)
        if line is None:
            line = self._lines[loop] = _Line()
        request: _Request[Question, Answer] = _Request(questions)
        line.waiting.append(request)
        try:
            while not request.settled:
                if line.served or line.waiting[0] is not request:
                    request.wake = loop.create_future()
                    await request.wake
                    continue
                if not (await self.alone() if alone is None else alone):
                    await _settle(line)
                line.served, line.waiting = line.waiting, []
                try:
                    await self._answer(line, line.served, serve)
                finally:
                    line.end_batch()
        finally:
            line.leave(request)
        if request.error is not None:
            raise request.error
        return [request.answers[q] for q in questions]

    async def _answer(
        self,
        line: _Line[Question, Answer],
        requests: Sequence[_Request[Question, Answer]],
        serve: Serve[Question, Answer],
    ) -> None:
        self.batches += 1
        try:
            answers = await serve(list(dict.fromkeys(q for r in requests for q in r.lacking)))
        except Exception as error:
            if len(requests) == 1:
                requests[0].error = error
                return
            for request in requests:  # an error reaches only who asked for it
                if not request.settled:
                    await self._answer(line, [request], serve)
            return
        for request in (*line.served, *line.waiting):
            request.take(answers)

    async def alone(self) -> bool:
        """Return whether this is the only task of its loop, so that nobody could join its call.

        Now and then, the loop has a turn first: to hear a cancellation, a time-out or an interrupt.
        """
        if not self._only_task():
            return False
        now = time.monotonic()
        if now - self._last_turn > _TURN:
            self._last_turn = now
            await asyncio.sleep(0)
        return True

    def _only_task(self) -> bool:
        # Counting tasks walks through all there are, so a crowd is counted as seldom as it is
        # large; until then we wait for others to join, whether they would or not.
        if self._crowd:
            self._crowd -= 1
            return False
        tasks = len(asyncio.all_tasks())
        self._crowd = tasks if tasks > _FEW_TASKS else 0
        return tasks == 1


async def _settle(line: _Line[Question, Answer]) -> None:
    """Give callers that are ready in this pass of the event loop the time to join."""
    seen, quiet = len(line.waiting), 0
    while quiet < 2:  # we may run before the others in a pass, so one is not enough
        await asyncio.sleep(0)
        quiet = quiet + 1 if len(line.waiting) == seen else 0
        seen = len(line.waiting)
