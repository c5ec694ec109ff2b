"""AdapterEngine over every shape of AsyncLM."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from genlm.backend.llm import AsyncLM, AsyncTransformer, MockAsyncLM
from genlm.backend.tokenization import Token

from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.lm.adapter import AdapterEngine, as_engine
from genlm_bytes_smc.lm.rows import BadRowError

BYTES = [b"a", b"b", b"ab", b"<s>"]
CONTEXTS = [[3], [3, 0, 1], [3, 2], [3]]


def row(context):
    rng = np.random.default_rng(list(context))
    return torch.log_softmax(torch.as_tensor(rng.normal(size=len(BYTES))), 0)


def want(contexts=CONTEXTS):
    return torch.stack([row(c) for c in contexts])


class Toy(AsyncLM):
    """Has no tokenizer to decode, only what tokens spell."""

    def __init__(self, as_row=lambda x: x):
        self.byte_vocab = [Token(i, b) for i, b in enumerate(BYTES)]
        self.str_vocab = [b.decode() for b in BYTES]
        self.tokenizer = SimpleNamespace(bos_token_id=3)
        self.as_row, self.asked = as_row, []

    async def next_token_logprobs(self, token_ids, lora_name=None):
        return self.next_token_logprobs_sync(token_ids)

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        self.asked.append(list(token_ids))
        return self.as_row(row(token_ids))


class OnlyAsync(Toy):
    async def next_token_logprobs(self, token_ids):  # not even the adapter's name
        self.asked.append(list(token_ids))
        await asyncio.sleep(0)
        return row(token_ids)

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        raise NotImplementedError


class Batched(Toy):
    def __init__(self):
        super().__init__()
        self.batches = []

    async def batch_next_token_logprobs(self, token_ids_list, lora_name=None):
        self.batches.append(len(token_ids_list))
        return [row(c).numpy() for c in token_ids_list]

    async def next_token_logprobs(self, token_ids, lora_name=None):
        raise AssertionError("the batch call exists")

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        raise AssertionError("the model is asynchronous")


class Override(Batched):
    """Overrides one method below a class that has a batch call of its own."""

    async def next_token_logprobs(self, token_ids, lora_name=None):
        return row(token_ids)


async def ask(engine):
    return await engine.batch_next_token_logprobs(CONTEXTS)


@pytest.mark.parametrize("kind", [Toy, OnlyAsync, Batched, Override])
def test_rows_however_the_model_is_asked(kind):
    engine = as_engine(kind())
    assert isinstance(engine, AdapterEngine)
    assert engine.start == (3,)
    assert torch.equal(asyncio.run(ask(engine)), want())
    assert torch.equal(asyncio.run(ask(engine)), want())
    assert engine.width == len(BYTES)


@pytest.mark.parametrize("kind", [Toy, OnlyAsync])
def test_rows_without_an_event_loop(kind):
    engine = AdapterEngine(kind())
    assert torch.equal(engine.batch_next_token_logprobs_sync(CONTEXTS), want())
    assert torch.equal(engine.batch_next_token_logprobs_sync(CONTEXTS), want())


async def test_an_asynchronous_model_cannot_be_asked_at_once_inside_a_loop():
    with pytest.raises(RuntimeError, match="OnlyAsync is asynchronous"):
        AdapterEngine(OnlyAsync()).batch_next_token_logprobs_sync(CONTEXTS)
    toy = AdapterEngine(Toy())
    assert torch.equal(toy.batch_next_token_logprobs_sync(CONTEXTS), want())


async def test_duplicates_are_asked_once_and_counted():
    lm = Toy()
    engine = AdapterEngine(lm)
    await asyncio.gather(ask(engine), ask(engine))
    assert sorted(lm.asked) == [[3], [3, 0, 1], [3, 2]]
    counts = engine.counts
    assert (counts.forwards, counts.rows, counts.positions) == (1, 3, 6)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize(
    ("as_row", "dtype"),
    [
        (lambda r: r.numpy(), torch.float64),
        (lambda r: r.float().numpy(), torch.float32),
        (lambda r: r.float(), torch.float32),
        (lambda r: r.half(), torch.float32),
        (lambda r: r.bfloat16(), torch.float32),
        (lambda r: r.tolist(), torch.float32),
        (lambda r: r.clone().requires_grad_(), torch.float64),
    ],
)
@pytest.mark.parametrize("asynchronous", [True, False])
def test_rows_of_any_type_become_a_float_tensor(as_row, dtype, asynchronous):
    engine = AdapterEngine(Toy(as_row))
    rows = (
        asyncio.run(ask(engine))
        if asynchronous
        else engine.batch_next_token_logprobs_sync(CONTEXTS)
    )
    assert rows.dtype == dtype
    assert not rows.requires_grad
    assert rows.device == engine.device
    assert torch.allclose(rows.double().exp(), want().exp(), atol=0.02)
    assert torch.allclose(rows.double().exp().sum(1), torch.ones(4).double(), atol=1e-6)


def test_mock_and_the_same_engine_each_time(tokenizer):
    mock = MockAsyncLM(tokenizer)
    engine = as_engine(mock)
    assert as_engine(mock) is engine
    assert as_engine(engine) is engine
    assert as_engine(mock, start=[1, 2]) is as_engine(mock, start=(1, 2)) is not engine
    context = [1, 5, 6]
    assert torch.equal(
        engine.next_token_logprobs_sync(context), mock.next_token_logprobs_sync(context)
    )
    assert engine.byte_vocab == mock.byte_vocab


class MyTransformer(AsyncTransformer):
    async def next_token_logprobs(self, token_ids, lora_name=None):
        return torch.full((len(self.byte_vocab),), -5.0)


def test_async_transformers_are_unwrapped_unless_they_differ(gpt2, tokenizer):
    plain = as_engine(AsyncTransformer(gpt2, tokenizer), limit_bytes=1 << 20)
    assert plain.model is gpt2
    assert plain.limit_bytes == 1 << 20
    mine = as_engine(MyTransformer(gpt2, tokenizer))
    assert isinstance(mine, AdapterEngine)
    assert (asyncio.run(mine.next_token_logprobs([1, 5])) == -5.0).all()
    assert (mine.next_token_logprobs_sync([1, 5]) == -5.0).all()


def test_a_vocabulary_without_a_tokenizer():
    lm = Toy()
    lm.tokenizer = None
    with pytest.raises(ValueError, match="start="):
        AdapterEngine(lm)
    engine = AdapterEngine(lm, start=3)
    assert engine.start == (3,)
    assert engine.tokenizer is None
    assert [t.byte_string for t in engine.byte_vocab] == BYTES
    del lm.str_vocab
    assert AdapterEngine(lm, start=3).str_vocab == ["a", "b", "ab", "<s>"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
async def test_bad_rows_are_named(bad):
    def spoil(r):
        return torch.where(torch.arange(4) == 2, bad, r)

    engine = AdapterEngine(Toy(spoil))
    with pytest.raises(BadRowError, match=r"NaN or \+inf in 3 of 3 rows .*of 1, 2, 3 tokens"):
        await ask(engine)


def test_impossible_tokens_are_no_error():
    engine = AdapterEngine(Toy(lambda r: torch.where(torch.arange(4) == 2, -torch.inf, r)))
    assert engine.next_token_logprobs_sync([3])[2] == -torch.inf


def test_widths():
    narrow = AdapterEngine(Toy(lambda r: r[:3]))
    with pytest.raises(BadRowError, match=r"width 3.*ids up to 3"):
        narrow.next_token_logprobs_sync([3])
    wide = AdapterEngine(Toy(lambda r: torch.cat([r, torch.full((5,), -torch.inf)])))
    assert wide.next_token_logprobs_sync([3]).shape == (9,)
    scalar = AdapterEngine(Toy(lambda r: r[0]))
    with pytest.raises(BadRowError, match=r"asked for 1 rows and returned shape"):
        scalar.next_token_logprobs_sync([3])


async def test_a_failing_row_leaves_no_task_behind():
    class Failing(Toy):
        async def next_token_logprobs(self, token_ids, lora_name=None):
            if len(token_ids) == 2:
                raise ConnectionError("lost")
            await asyncio.sleep(60)

    with pytest.raises(ConnectionError, match="lost"):
        await ask(AdapterEngine(Failing()))
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_what_is_no_language_model_is_refused():
    with pytest.raises(TypeError, match=r"expected a genlm-backend AsyncLM.*got int"):
        as_engine(3)
    with pytest.raises(TypeError, match="load_model"):
        as_engine("gpt2")


def test_endings_reach_the_model_only_if_owned():
    lm = Toy()
    ended = []
    lm.cleanup = lambda: ended.append("ended")
    lm.clear_cache = lambda: ended.append("cleared")
    AdapterEngine(lm).close()
    assert ended == []
    owner = AdapterEngine(lm, owned=True)
    owner.clear_cache()
    owner.cleanup()
    assert ended == ["cleared", "ended"]


def test_options_that_contradict_or_do_not_apply():
    lm = Toy()
    with pytest.raises(ValueError, match="limit_bytes does not apply"):
        as_engine(lm, limit_bytes=100)
    engine = as_engine(lm)
    assert as_engine(engine, start=[3]) is engine
    with pytest.raises(ValueError, match=r"begins contexts with \(3,\)"):
        as_engine(engine, start=[1])
    with pytest.raises(ValueError, match="limit_bytes=None"):
        as_engine(engine, limit_bytes=5)


async def test_rows_of_a_beam_are_looked_through_only_where_their_sum_is_no_number():
    looked = []

    class Engine(AdapterEngine):
        def refuse_bad(self, nodes, rows):
            looked.append(len(nodes))
            super().refuse_bad(nodes, rows)

    lm = Toy()
    engine = Engine(lm)
    store = byte_model(engine).store
    await store.ensure(np.array([engine.tree.insert([3])]))
    assert looked == []
    lm.as_row = lambda r: r * torch.nan
    with pytest.raises(BadRowError, match=r"NaN or \+inf in 1 of 1 rows .*of 2 tokens"):
        await store.ensure(np.array([engine.tree.insert([3, 0])]))
    assert looked == [1]


@pytest.mark.parametrize(("limit", "requests"), [(8 * 4 * 2, [2, 2, 1]), (1 << 24, [5])])
async def test_many_rows_are_asked_for_in_requests_of_limited_size(limit, requests):
    lm = Batched()
    engine = AdapterEngine(lm)
    engine.request_bytes = limit
    contexts = engine.tree.along(0, [3, 0, 1, 2, 0])
    await byte_model(engine).store.ensure(contexts)
    assert lm.batches == requests
