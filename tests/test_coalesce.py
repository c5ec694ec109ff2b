"""Callers that are merged: who serves, what is shared, and who is left when calls are cancelled."""

import asyncio

import pytest

from genlm_bytes_smc.calls import Coalesced


class Squares:
    """Answers x * x after a wait; refuses negative numbers."""

    def __init__(self, turns=5):
        self.turns, self.served = turns, []
        self.merged = Coalesced()

    async def serve(self, questions):
        self.served.append(questions)
        for _ in range(self.turns):
            await asyncio.sleep(0)
        if min(questions) < 0:
            raise ValueError(f"negative: {min(questions)}")
        return {q: q * q for q in questions}

    async def ask(self, *questions):
        return await self.merged.ask(questions, self.serve)


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


async def test_a_batch_has_each_question_once_and_answers_come_in_order():
    """Three callers with overlapping questions are one batch of distinct ones."""
    squares = Squares()
    got = await asyncio.gather(squares.ask(1, 2, 1), squares.ask(2, 3), squares.ask())
    assert got == [[1, 4, 1], [4, 9], []]
    assert squares.served == [[1, 2, 3]]
    assert squares.merged.batches == 1
    assert len(squares.merged) == 0


async def test_who_comes_during_a_batch_takes_what_it_answers_and_asks_the_rest():
    """Questions under way are not asked again; a caller who needs no others waits for no batch."""
    squares = Squares()
    first = asyncio.create_task(squares.ask(1, 2))
    await until(lambda: squares.served)
    later = [asyncio.create_task(squares.ask(*q)) for q in [(2,), (2, 3), (1, 2)]]
    assert await first == [1, 4]
    assert await asyncio.gather(*later) == [[4], [4, 9], [1, 4]]
    assert squares.served == [[1, 2], [3]]


@pytest.mark.parametrize("gone", [(0,), (1,), (1, 0), (0, 1), (0, 1, 2)])
async def test_whoever_is_left_is_answered_whichever_callers_are_cancelled(gone):
    """The first caller serves; it and those that it serves may go in any order."""
    squares = Squares()
    tasks = [asyncio.create_task(squares.ask(x)) for x in range(4)]
    await until(lambda: squares.served)
    for i in gone:
        tasks[i].cancel()
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for i, result in enumerate(results):
        assert isinstance(result, asyncio.CancelledError) if i in gone else result == [i * i]
    assert len(squares.merged) == 0
    assert await squares.ask(7) == [49]


async def test_an_error_reaches_only_who_asked_for_it():
    """A batch that fails is asked caller by caller."""
    squares = Squares()
    results = await asyncio.gather(
        squares.ask(1), squares.ask(-1), squares.ask(2, -2), squares.ask(1), return_exceptions=True
    )
    assert [str(r) for r in results] == ["[1]", "negative: -1", "negative: -2", "[1]"]
    assert squares.served == [[1, -1, 2, -2], [1], [-1], [2, -2]]


def test_two_loops_do_not_wait_for_each_other():
    """A loop that stands still in the middle of a batch leaves the next one its own line."""
    squares = Squares()
    stopped = asyncio.new_event_loop()
    stuck = stopped.create_task(squares.ask(1))
    while not squares.served:
        stopped.call_soon(stopped.stop)
        stopped.run_forever()
    assert asyncio.run(squares.ask(2)) == [4]
    stopped.run_until_complete(stuck)
    assert stuck.result() == [1]
    stopped.close()
