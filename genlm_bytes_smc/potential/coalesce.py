"""Calls that arrive together are answered together.

Whoever asks first serves everyone who asked in the same pass of the event loop; what arrives
while a batch is being served waits and forms the next one. There is no task, thread or lock
behind it: a call that is cancelled while it serves hands its batch to another caller, and
nothing stays behind when the last caller is gone.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

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


class Coalesced(ABC, Generic[Question, Answer]):
    """Answers questions (hashable) in batches; subclasses provide `_serve`.

    Attributes:
        batches: how many batches have been served.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._waiting: list[_Request[Question, Answer]] = []
        self._serving = False

    @abstractmethod
    async def _serve(self, questions: list[Question]) -> Mapping[Question, Answer]:
        """Answers to distinct questions; never called again before it has returned."""

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, in order; equal questions are served once.

        Raises:
            Exception: what `_serve` raises for these questions; other callers' questions
                have no part in it.
        """
        request: _Request[Question, Answer] = _Request(questions)
        self._waiting.append(request)
        try:
            await self._settle()
            while not request.settled:
                if self._serving or request not in self._waiting:
                    request.wake = asyncio.get_running_loop().create_future()
                    await request.wake
                else:
                    await self._serve_all()
        finally:
            if request in self._waiting:
                self._waiting.remove(request)
                self._next()
        if request.error is not None:
            raise request.error
        assert request.answers is not None
        return request.answers

    async def _settle(self) -> None:
        """Give callers that are ready in this pass of the event loop the time to join."""
        seen = 0
        while len(self._waiting) > seen:
            seen = len(self._waiting)
            await asyncio.sleep(0)

    async def _serve_all(self) -> None:
        batch, self._waiting = self._waiting, []
        self._serving = True
        try:
            await self._answer(batch)
        finally:
            self._serving = False
            # Not answered: this caller was cancelled. The others stand first in line.
            self._waiting = [r for r in batch if not r.settled] + self._waiting
            for request in batch:
                if request.settled:
                    request.notify()
            self._next()

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

    def _next(self) -> None:
        """Have the first caller in line serve the next batch."""
        if self._waiting and not self._serving:
            self._waiting[0].notify()
