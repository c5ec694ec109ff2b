"""What every constraint must keep, run over every public one."""

import asyncio
import inspect
import pickle

import numpy as np
import pytest
import torch
from genlm.control import Potential
from genlm.control.constant import EOS

from genlm_bytes_smc import constraints
from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_BYTES, N_SYMBOLS, TABLES
from genlm_bytes_smc.constraints import ByteConstraint, ByteRegex
from tests.constraints.cases import CASES, REMEMBERING, WITH_SNAPSHOTS

NEG_INF = float("-inf")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def tokens(text):
    return [bytes([b]) for b in text]


def beginnings(case):
    """All prefixes of the case's texts, each once."""
    return sorted({text[:k] for text in case.texts for k in range(len(text) + 1)})


def test_no_public_constraint_is_missing_here():
    public = {
        name
        for name in constraints.__all__
        if inspect.isclass(kind := getattr(constraints, name))
        and issubclass(kind, ByteConstraint)
        and not inspect.isabstract(kind)
    }
    tested = {type(case.make()).__name__ for case in CASES.values()}
    assert public == tested & public


def test_the_alphabet_is_shared():
    assert [bytes([i]) for i in range(256)] == BYTES
    assert TABLES.vocab_eos[EOS_COLUMN] is EOS
    assert (N_BYTES, EOS_COLUMN, N_SYMBOLS) == (256, 256, 257)
    for case in CASES.values():
        assert case.make().vocab is BYTES


@every_case
async def test_the_contract_of_genlm_control(case):
    constraint = case.make()
    prefixes = beginnings(case)
    few = [tokens(p) for p in prefixes[:: max(1, len(prefixes) // 3)]]
    await constraint.assert_contract(few, rtol=1e-9, atol=1e-9)
    for text in case.texts:
        assert await constraint.complete(tokens(text)) > NEG_INF
        await constraint.assert_autoreg_fact(tokens(text), rtol=1e-9, atol=1e-9)


@every_case
def test_the_law_of_states(case):
    """block(s)[b] = log_prefix(step(s, b)) - log_prefix(s), and EOS likewise, for all b."""
    constraint = case.make()
    symbols = torch.arange(N_BYTES)
    for prefix in beginnings(case):
        state = constraint.states([prefix])
        row = constraint.block(state)[0]
        here = constraint.log_prefix(state)
        assert here > NEG_INF
        children = constraint.step(state.repeat(N_BYTES), symbols)
        torch.testing.assert_close(row[:N_BYTES], constraint.log_prefix(children) - here)
        torch.testing.assert_close(row[EOS_COLUMN], (constraint.log_complete(state) - here)[0])
        assert ((children == -1) == (row[:N_BYTES] == NEG_INF)).all()
        assert not row.isnan().any()


@every_case
def test_shapes_and_types(case):
    constraint = case.make()
    state = constraint.initial(5)
    assert state.shape == (5,)
    assert state.dtype == torch.int64
    block, prefix = constraint.block(state), constraint.log_prefix(state)
    assert block.shape == (5, N_SYMBOLS)
    assert block.dtype == torch.float64
    assert prefix.shape == (5,)
    assert prefix.dtype == torch.float64
    after = constraint.step(state, torch.tensor([97, 98, 49, 123, 195]))
    assert after.shape == (5,)
    assert after.dtype == torch.int64
    empty = torch.zeros(0, dtype=torch.int64)
    assert constraint.block(empty).shape == (0, N_SYMBOLS)
    assert constraint.step(empty, empty).shape == constraint.log_prefix(empty).shape == (0,)


@every_case
def test_a_dead_state_stays_dead_and_weighs_nothing(case):
    constraint = case.make()
    dead = torch.full((3,), -1)
    assert (constraint.block(dead) == NEG_INF).all()
    assert (constraint.log_prefix(dead) == NEG_INF).all()
    assert (constraint.log_complete(dead) == NEG_INF).all()
    assert (constraint.step(dead, torch.tensor([0, 97, 255])) == -1).all()
    mixed = torch.cat([dead[:1], constraint.initial(1)])
    assert (constraint.block(mixed)[0] == NEG_INF).all()
    assert (constraint.block(mixed)[1] == constraint.block(mixed[1:])[0]).all()


@every_case
async def test_an_impossible_context_weighs_nothing_and_raises_nothing(case):
    constraint = case.make()
    if case.impossible is None:
        return
    for context in (case.impossible, case.impossible + b"a"):
        assert await constraint.prefix(tokens(context)) == NEG_INF
        assert await constraint.complete(tokens(context)) == NEG_INF
        assert (await constraint.logw_next(tokens(context))).weights.eq(NEG_INF).all()
        assert await constraint.logw_eos(tokens(context)) == NEG_INF


@every_case
async def test_batched_is_looped_and_contexts_may_be_bytes(case):
    contexts = [*beginnings(case), *beginnings(case)[:2], case.impossible or b""]
    constraint, other = case.make(), case.make()
    block = (await constraint.batch_logw_next([tokens(c) for c in contexts])).weights
    prefixes = await constraint.batch_prefix(contexts)
    completes = await constraint.batch_complete(contexts)
    assert block.dtype == torch.float64
    assert prefixes.dtype == completes.dtype == np.float64
    for i in np.random.default_rng(0).permutation(len(contexts)):
        row = (await other.logw_next(contexts[i])).weights
        torch.testing.assert_close(block[i], row, rtol=1e-12, atol=1e-12)
        assert float(prefixes[i]) == pytest.approx(await other.prefix(contexts[i]), abs=1e-12)
        assert float(completes[i]) == pytest.approx(await other.complete(contexts[i]), abs=1e-12)
    with pytest.raises(ValueError, match="at least one context"):
        await constraint.batch_prefix([])


@every_case
def test_lanes_may_be_forked_and_gathered(case):
    """Lanes shuffled by indexing while they read give what each text gives alone."""
    constraint, alone = case.make(), case.make()
    generator = torch.Generator().manual_seed(1)
    state, texts = constraint.initial(6), [b""] * 6
    for _ in range(12):
        mass = constraint.block(state)[:, :N_BYTES].exp()
        can = mass.sum(1) > 0
        drawn = torch.multinomial(torch.where(can[:, None], mass, 1.0), 1, generator=generator)[
            :, 0
        ]
        state = torch.where(can, constraint.step(state, drawn), state)
        texts = [
            t + bytes([b]) if c else t for t, b, c in zip(texts, drawn.tolist(), can, strict=True)
        ]
        chosen = torch.randint(6, (6,), generator=generator)
        state, texts = state[chosen], [texts[i] for i in chosen.tolist()]
        expected = alone.states(texts)
        torch.testing.assert_close(constraint.block(state), alone.block(expected))
        torch.testing.assert_close(constraint.log_prefix(state), alone.log_prefix(expected))


@every_case
def test_what_is_kept_stays_valid_and_the_rest_may_go(case):
    constraint, fresh = case.make(), case.make()
    prefixes = beginnings(case)
    state = constraint.states(prefixes)
    kept = state[len(prefixes) // 2 :]
    before = constraint.block(kept).clone()
    constraint.keep([kept[:1], kept[1:]])
    torch.testing.assert_close(constraint.block(kept), before)
    again = constraint.states(prefixes)
    torch.testing.assert_close(constraint.block(again), fresh.block(fresh.states(prefixes)))
    constraint.release()
    torch.testing.assert_close(constraint.block(constraint.states(prefixes[-1:])), before[-1:])


@every_case
def test_copies_are_equal_and_independent(case):
    constraint = case.make()
    prefixes = beginnings(case)
    before = constraint.block(constraint.states(prefixes))
    pickled = pickle.dumps(constraint)
    assert len(pickled) < 2**21
    copies = [constraint.spawn(), constraint.to("cpu"), pickle.loads(pickled)]
    for copy in copies:
        assert type(copy) is type(constraint)
        assert copy.vocab is BYTES
        torch.testing.assert_close(copy.block(copy.states(prefixes)), before)
        copy.release()
    torch.testing.assert_close(constraint.block(constraint.states(prefixes)), before)


@every_case
def test_views(case):
    constraint = case.make()
    assert repr(constraint).startswith(type(constraint).__name__ + "(")
    assert "device=cpu" in repr(constraint)
    assert type(constraint).__name__ in constraint._repr_html_()
    assert "<script" not in constraint._repr_html_()


def test_views_are_safe_html():
    assert "<b>x" not in ByteRegex("<b>x</b>")._repr_html_().split("</caption>")[1]


class Unigram(Potential):
    """A byte model in numpy, to multiply with."""

    def __init__(self):
        super().__init__(BYTES, tables=TABLES)
        self.row = np.log(np.random.default_rng(0).dirichlet(np.ones(N_SYMBOLS)))

    async def prefix(self, context):
        return float(sum(self.row[b[0]] for b in context))

    async def complete(self, context):
        return await self.prefix(context) + float(self.row[EOS_COLUMN])

    async def logw_next(self, context):
        return self.make_lazy_weights(self.row)


@every_case
async def test_a_product_needs_no_coercion(case):
    lm, constraint = Unigram(), case.make()
    for product in (lm * constraint, constraint * lm):
        assert product.vocab is BYTES
        contexts = [tokens(c) for c in beginnings(case)[-2:]]
        await product.assert_contract(contexts)
        rows = (await product.batch_logw_next(contexts)).weights
        expected = constraint.block(constraint.states(contexts)) + torch.from_numpy(lm.row)
        torch.testing.assert_close(rows, expected)


@every_case
async def test_concurrent_callers_agree(case):
    constraint = case.make()
    contexts = [tokens(c) for c in beginnings(case)]
    rows = await asyncio.gather(*[constraint.logw_next(c) for c in contexts])
    block = (await constraint.batch_logw_next(contexts)).weights
    torch.testing.assert_close(torch.stack([r.weights for r in rows]), block)


async def test_a_token_that_is_no_byte_is_refused():
    constraint = ByteRegex("ab")
    with pytest.raises(TypeError, match="got the token 97 of type int"):
        await constraint.prefix([97])
    with pytest.raises(ValueError, match="exactly one byte, got b'ab'"):
        await constraint.prefix([b"ab"])
    with pytest.raises(TypeError, match="got the token"):
        await constraint.prefix([b"a", EOS])
    with pytest.raises(TypeError, match="of type str"):
        await constraint.prefix("ab")


@pytest.mark.parametrize("name", WITH_SNAPSHOTS)
def test_a_growing_context_costs_one_step(name):
    case = CASES[name]
    constraint = case.make()
    longest = max(case.texts, key=len)
    for k in range(len(longest) + 1):
        constraint.block(constraint.states([longest[:k]] * 3))
        if k:
            assert constraint.reads == k


@pytest.mark.parametrize("name", REMEMBERING)
def test_memory_is_bounded_and_what_was_dropped_comes_back(name):
    case = CASES[name]
    constraint, free = case.make(max_states=2), case.make()
    prefixes = beginnings(case)
    for _ in range(2):
        for some in (prefixes, prefixes[::-1], prefixes[::3]):
            for p in some:
                torch.testing.assert_close(
                    constraint.block(constraint.states([p])), free.block(free.states([p]))
                )
                assert constraint.n_snapshots <= 2
    assert constraint.n_texts <= 4 * 2 + len(prefixes)
    for p in prefixes:  # every old text has to be read on
        here, there = constraint.states([p]), free.states([p])
        for byte in (free.block(there)[0, :N_BYTES] > NEG_INF).nonzero()[:3, 0]:
            ours, theirs = constraint.step(here, byte[None]), free.step(there, byte[None])
            torch.testing.assert_close(constraint.block(ours), free.block(theirs))
    assert constraint.reads > free.reads or name not in WITH_SNAPSHOTS
    state = constraint.states(prefixes)
    torch.testing.assert_close(constraint.block(state), free.block(free.states(prefixes)))
    with pytest.raises(ValueError, match="max_states must be at least 1, got 0"):
        case.make(max_states=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_case
def test_the_device_gives_what_the_cpu_gives(case):
    host, device = case.make(), case.make(device="cuda")
    prefixes = beginnings(case)
    moved = host.to("cuda")
    for there in (device, moved):
        state, expected = there.states(prefixes), host.states(prefixes)
        assert state.is_cuda
        assert there.block(state).is_cuda
        assert there.log_prefix(state).is_cuda
        torch.testing.assert_close(there.block(state).cpu(), host.block(expected))
        torch.testing.assert_close(there.log_prefix(state).cpu(), host.log_prefix(expected))
        torch.testing.assert_close(there.log_complete(state).cpu(), host.log_complete(expected))
        after = there.step(state, torch.full_like(state, 97))
        assert (after.cpu().ge(0) == host.step(expected, torch.full_like(expected, 97)).ge(0)).all()
