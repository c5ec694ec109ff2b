"""Calls that arrive together are answered together.

Whoever asks first serves everyone who asked in the same pass of the event loop; what arrives
while a batch is being served waits and forms the next one. There is no task, thread or lock
behind it: a call that is cancelled while it serves hands its batch to another caller, and
nothing stays behind when the last caller is gone. Callers of different event loops do not
wait for each other: a loop that stands still (stopped in the middle, or behind one that runs
in its stead) would never answer.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(eq=False)
class _Request(Generic[Question, Answer]):
    questions: Sequence[Question]
    answers: list[Answer] | None = None
    error: Exception | None = None
    wake: asyncio.Future[None] | None = None

    @property
    def settled(self) -> bool:
        return self.answers is not None or self.error is not None

    def notify(self) -> None:
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)


@dataclass(eq=False)
class _Line(Generic[Question, Answer]):
    """Who waits in one event loop, and whether somebody serves there."""

    waiting: list[_Request[Question, Answer]] = field(default_factory=list)
    serving: bool = False

    def next(self) -> None:
        """Let the first caller in line serve the next batch."""
        if self.waiting and not self.serving:
            self.waiting[0].notify()


class Coalesced(ABC, Generic[Question, Answer]):
    """Answers questions (hashable) in batches; subclasses provide `_serve`.

    Attributes:
        batches: how many batches have been served.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._lines: WeakKeyDictionary[asyncio.AbstractEventLoop, _Line[Question, Answer]]
        self._lines = WeakKeyDictionary()

    @abstractmethod
    async def _serve(self, questions: list[Question]) -> Mapping[Question, Answer]:
        """Answers to distinct questions; an event loop has one call of it at a time."""

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, in order; equal questions are served once.

        Raises:
            Exception: what `_serve` raises for these questions; other callers' questions
                have no part in it.
        """
        loop = asyncio.get_running_loop()
        line = self._lines.setdefault(loop, _Line())
        request: _Request[Question, Answer] = _Request(questions)
        line.waiting.append(request)
        try:
            await _settle(line)
            while not request.settled:
                if line.serving or request not in line.waiting:
                    request.wake = loop.create_future()
                    await request.wake
                else:
                    await self._serve_all(line)
        finally:
            if request in line.waiting:
                line.waiting.remove(request)
                line.next()
        if request.error is not None:
            raise request.error
        assert request.answers is not None
        return request.answers

    async def _serve_all(self, line: _Line[Question, Answer]) -> None:
        batch, line.waiting = line.waiting, []
        line.serving = True
        try:
            await self._answer(batch)
        finally:
            line.serving = False
            # Not answered: this caller was cancelled. The others stand first in line.
            line.waiting = [r for r in batch if not r.settled] + line.waiting
            for request in batch:
                if request.settled:
                    request.notify()
            line.next()

    async def _answer(self, batch: Iterable[_Request[Question, Answer]]) -> None:
        requests = list(batch)
        self.batches += 1
        try:
            answers = await self._serve(
                list(dict.fromkeys(q for r in requests for q in r.questions))
            )
        except Exception as error:
            if len(requests) == 1:
                requests[0].error = error
                return
            for request in requests:  # an error reaches only who asked for it
                await self._answer([request])
            return
        for request in requests:
            request.answers = [answers[q] for q in request.questions]


async def _settle(line: _Line[Question, Answer]) -> None:
    """Give callers that are ready in this pass of the event loop the time to join."""
    seen = 0
    while len(line.waiting) > seen:
        seen = len(line.waiting)
        await asyncio.sleep(0)
