"""The engine's contract under asyncio, and other libraries on top of it."""

import asyncio
import gc
import threading

import numpy as np
import pytest
import torch
from genlm.backend.llm import AsyncTransformer
from genlm.bytes import BeamParams, ByteBeamState
from genlm.control import PromptedLLM

from genlm_bytes_smc import ByteLLM, as_engine, byte_model
from genlm_bytes_smc.lm.contexts import ContextTree
from genlm_bytes_smc.lm.engine import ContextTooLongError, RowEngine
from genlm_bytes_smc.lm.transformer import TreeTransformer
from tests.lm.families import WINDOW, distance, whole_rows
from tests.toys import ToyLM

CONTEXTS = [[1, 5], [1, 5, 6], [1, 7], [1, 5]]

# What genlm-backend's own transformer is told by transformers 5.24: it passes the old name.
theirs = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")


async def ask(engine, context):
    return await engine.next_token_logprobs(context)


def only_task() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


async def test_concurrent_callers_share_one_forward(engine, gpt2):
    rows = await asyncio.gather(*(ask(engine, c) for c in CONTEXTS))
    assert engine.counts.forwards == 1
    assert engine.counts.rows == 3
    assert distance(torch.stack(rows), whole_rows(gpt2, CONTEXTS)) < 1e-4
    assert only_task()


async def test_a_crowd_of_idle_tasks_is_not_counted_each_time(engine, monkeypatch):
    counted = []
    count = asyncio.all_tasks
    monkeypatch.setattr(asyncio, "all_tasks", lambda *a: counted.append(1) or count(*a))
    idle = [asyncio.ensure_future(asyncio.sleep(60)) for _ in range(100)]
    alone = await engine.next_token_logprobs([0, 1])
    for _ in range(250):
        torch.testing.assert_close(await engine.next_token_logprobs([0, 1]), alone)
    assert len(counted) <= 3
    for task in idle:
        task.cancel()
    await asyncio.gather(*idle, return_exceptions=True)
    for _ in range(150):
        await engine.next_token_logprobs([0, 1])
    assert len(counted) > 3  # the crowd is gone, and that was seen


async def test_callers_that_need_a_few_turns_of_the_loop_still_join(engine):
    async def late(turns, context):
        for _ in range(turns):
            await asyncio.sleep(0)
        return await ask(engine, context)

    await asyncio.gather(*(late(i, c) for i, c in enumerate(CONTEXTS[:3])))
    assert engine.counts.forwards == 1


@pytest.mark.parametrize("cancelled", [0, 1, 2])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
async def test_cancelling_one_caller_leaves_the_others_answered(engine, gpt2, cancelled, turns):
    tasks = [asyncio.create_task(ask(engine, c)) for c in CONTEXTS[:3]]
    for _ in range(turns):
        await asyncio.sleep(0)
    stopped = tasks[cancelled].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for i, (result, context) in enumerate(zip(results, CONTEXTS, strict=False)):
        if i == cancelled and stopped:
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert distance(result, whole_rows(gpt2, [context])[0]) < 1e-4
    assert not engine._requests
    assert only_task()


class SlowEngine(RowEngine):
    """Rows after a wait, by another engine."""

    def __init__(self, inner, error=None):
        super().__init__(
            inner.tokenizer,
            device=inner.device,
            width=inner.width,
            window=None,
            start=inner.start,
            byte_vocab=inner.byte_vocab,
        )
        self.inner, self.error, self.calls = inner, error, 0

    def evaluate(self, nodes):
        contexts = [self.tree.tokens(n) for n in nodes.tolist()]
        return self.inner.batch_next_token_logprobs_sync(contexts)

    async def evaluate_async(self, nodes):
        self.calls += 1
        for _ in range(5):
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.evaluate(nodes)


async def test_whoever_asks_alone_can_be_stopped(engine):
    async def on_and_on(context):
        for token in range(3, 30):
            context = [*context, token]
            await ask(engine, context)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await on_and_on([1])
    assert engine.counts.forwards <= 1


async def test_cancelling_whoever_serves_hands_the_work_on(engine, gpt2):
    slow = SlowEngine(engine)
    tasks = [asyncio.create_task(ask(slow, c)) for c in CONTEXTS[:3]]
    while not slow.calls:
        await asyncio.sleep(0)
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert distance(torch.stack(results[1:]), whole_rows(gpt2, CONTEXTS[1:3])) < 1e-4
    assert only_task()


async def test_an_error_reaches_every_caller_and_no_cancelled_one_leaves_it_unseen(engine):
    messages = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, c: messages.append(c))
    slow = SlowEngine(engine, error=RuntimeError("no model"))
    tasks = [asyncio.create_task(ask(slow, c)) for c in CONTEXTS[:3]]
    while not slow.calls:
        await asyncio.sleep(0)
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results] == [RuntimeError, asyncio.CancelledError, RuntimeError]
    del tasks, results
    gc.collect()
    await asyncio.sleep(0)
    assert messages == []


async def test_a_bad_request_fails_alone(engine, gpt2):
    good, bad = asyncio.create_task(ask(engine, [1, 5])), ask(engine, [1] * (WINDOW + 1))
    with pytest.raises(ContextTooLongError, match=str(WINDOW)):
        await bad
    assert distance(await good, whole_rows(gpt2, [[1, 5]])[0]) < 1e-4


def test_successive_event_loops(engine, gpt2):
    async def both():
        rows = torch.stack(await asyncio.gather(*(ask(engine, c) for c in CONTEXTS)))
        assert only_task()
        return rows

    want = whole_rows(gpt2, CONTEXTS)
    for _ in range(2):
        assert distance(asyncio.run(both()), want) < 1e-4


async def test_callers_of_one_context_do_not_share_memory(engine):
    a, b = await asyncio.gather(ask(engine, [1, 5]), ask(engine, [1, 5]))
    assert engine.counts.rows == 1
    a[:] = 0.0
    assert b.exp().sum() == pytest.approx(1.0, abs=1e-5)


async def test_cancelled_callers_leave_nothing_pinned(engine):
    task = asyncio.create_task(ask(engine, [1, 5, 6]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    engine.tree.collect()
    assert len(engine.tree) == 1
    assert engine.memory()["entries"] == 0


async def test_no_adapters(engine):
    with pytest.raises(ValueError, match="lora_name='x'"):
        await engine.next_token_logprobs([1], lora_name="x")


def test_contexts_spelled_again_after_collection(engine, gpt2):
    first = engine.batch_next_token_logprobs_sync([[1, 5, 6], [1, 5, 7]])
    engine.tree.collect()
    engine.tree.insert([3, 3, 3, 3])  # takes the freed ids
    again = engine.batch_next_token_logprobs_sync([[1, 5, 7], [1, 5, 6], [1, 5, 6, 8]])
    assert distance(again[:2].flip(0), first) < 1e-5
    assert distance(again[2:], whole_rows(gpt2, [[1, 5, 6, 8]])) < 1e-4


# -- other libraries -------------------------------------------------------------------


@pytest.fixture
def reference(gpt2, tokenizer):
    return AsyncTransformer(gpt2, tokenizer, timeout=0.001)


@theirs
async def test_prompted_llm_gives_the_same_numbers(engine, reference, tokenizer):
    prompt = tokenizer.encode("then ")
    ours = PromptedLLM(engine, prompt_ids=prompt)
    theirs = PromptedLLM(reference, prompt_ids=prompt)
    context = [ours.token_maps.decode[i] for i in tokenizer.encode("and the end")]
    contexts = [context[:n] for n in range(len(context) + 1)]
    for method in ("prefix", "complete", "logw_next"):
        for c in contexts:
            a, b = await getattr(ours, method)(c), await getattr(theirs, method)(c)
            a, b = (getattr(x, "weights", x) for x in (a, b))
            assert np.allclose(np.asarray(a), np.asarray(b), atol=1e-4)
    engine.counts.reset()
    await ours.batch_logw_next(contexts)
    assert engine.counts.forwards == 1


@theirs
@pytest.mark.filterwarnings("ignore:Sparse")
async def test_byte_beam_state_gives_the_same_numbers(engine, reference):
    outcomes = []
    for lm in (engine, reference):
        state = await ByteBeamState.initial(lm, BeamParams(K=4))
        try:
            rows = []
            for byte in b"the an":
                rows.append((await state.logp_next()).materialize())
                state = await (state.prune() << byte)
            outcomes.append((rows, state.logZ))
        finally:
            await state.cleanup()
    (a, za), (b, zb) = outcomes
    assert za == pytest.approx(zb, abs=1e-3)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert np.allclose([x[k] for k in x], [y[k] for k in x], atol=1e-3)


def test_engines_are_freed_with_their_owner(gpt2, tokenizer):
    import weakref

    engine = TreeTransformer(gpt2, tokenizer)
    engine.next_token_logprobs_sync([1, 5])
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None


def test_a_second_thread_is_refused_while_one_is_answered():
    """Caches know no locks: rows came out wrong, or shapes did not fit."""
    asked, go_on = threading.Event(), threading.Event()

    class Slow(ToyLM):
        def row(self, context):
            asked.set()
            assert go_on.wait(30)
            return super().row(context)

    engine = as_engine(Slow())
    go_on.set()
    lm = ByteLLM(engine, BeamParams(3), model_eos=False)
    lanes = asyncio.run(lm.lanes(2))
    go_on.clear()
    asked.clear()
    out = []
    first = threading.Thread(target=lambda: out.append(engine.next_token_logprobs_sync([1])))
    first.start()
    try:
        assert asked.wait(30)
        for ask in (
            lambda: engine.next_token_logprobs_sync([2]),
            lambda: asyncio.run(engine.next_token_logprobs([2])),
            engine.clear_cache,
            engine.close,
            engine.cleanup,
            engine.tree.collect,
            lm.clear_cache,
            lm.model.store.clear,
            lambda: asyncio.run(lm.cleanup()),
            lambda: asyncio.run(lm.prefix(b"ab")),
            lambda: asyncio.run(lm.model.store.ensure(np.array([1]))),
            lambda: asyncio.run(lanes.extended()),
            lambda: asyncio.run(lanes.logp_next()),
            lambda: asyncio.run(lanes.step([97, 97])),
            lambda: asyncio.run(lanes.read(97)),
            lambda: asyncio.run(lanes.feed([1])),
            lambda: lanes.gather([0]),
        ):
            with pytest.raises(RuntimeError, match="one thread at a time"):
                ask()
    finally:
        go_on.set()
        first.join()
    assert torch.equal(out[0], engine.next_token_logprobs_sync([1])), "and one after the other"
    engine.clear_cache()
    lm.clear_cache()
    assert len(lm.model.store) > 0
    lm.model.store.clear()
    assert len(lm.model.store) == 0


async def test_a_model_that_works_through_a_whole_run_is_not_cleared_by_another_thread(engine):
    """Between two forwards, too: the beams of a run stand on the rows they have."""
    lm = ByteLLM(engine, BeamParams(3, prune_threshold=0.01), model_eos=False)
    refused, evaluate = [], engine.evaluate

    def clear():
        for clear in (engine.clear_cache, lm.model.store.clear, lm.clear_cache):
            try:
                clear()
            except RuntimeError as error:
                refused.append(error)

    def meanwhile(nodes):
        other = threading.Thread(target=clear)
        other.start()
        other.join()
        return evaluate(nodes)

    engine.evaluate = meanwhile
    try:
        got = await lm.prefix(b"the an")
    finally:
        del engine.evaluate
    assert len(refused) >= 6
    engine.clear_cache()
    lm.model.store.clear()
    lm.clear_cache()
    assert got == pytest.approx(await lm.prefix(b"the an"), abs=1e-5)


async def test_rows_that_a_call_waits_for_survive_a_clear():
    """A task may clear the store while another, in the same loop, waits for a missing row."""

    class Waits(ToyLM):
        async def next_token_logprobs(self, token_ids, lora_name=None):
            await asyncio.sleep(0)
            store.clear()
            return self.row(token_ids)

    engine = as_engine(Waits())
    store = byte_model(engine).store
    first, second = (engine.tree.insert(t) for t in ([1], [2]))
    await store.ensure(np.array([first]))
    await store.ensure(np.array([first, second]))
    assert len(store.missing(np.array([first, second]))) == 0


def test_what_was_tracked_and_is_gone_leaves_nothing_behind():
    class Holder:
        def __init__(self, node):
            self.node = node

        def context_ids(self):
            return np.array([self.node])

    tree = ContextTree()
    kept = Holder(tree.insert([1, 2]))
    tree.track(kept)
    for token in range(5000):
        tree.track(Holder(tree.insert([7, token])))
    assert len(tree._holders) < 3000
    tree.collect()
    assert len(tree) == 3
    assert tree.tokens(kept.node) == [1, 2]
