"""What a run costs, repeats, refuses and survives."""

import asyncio
import dataclasses
import math

import numpy as np
import pytest
from genlm.control.potential.base import Potential
from hypothesis import given, settings
from hypothesis import strategies as st

from genlm_bytes_smc import BeamParams
from genlm_bytes_smc.alphabet import BYTES, TABLES
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import (
    AllParticlesDeadError,
    BadWeightError,
    Particles,
    SMCResult,
    SMCState,
    frontier,
    smc,
    smc_steps,
    smc_sync,
)
from genlm_bytes_smc.smc.lanes import Lanes
from genlm_bytes_smc.smc.plan import make_plan
from tests.smc.worlds import EXACT, FREE, LONGEST, PATTERN, RANDOM, TOPK, finite, same, toy


class Weighted(Potential):
    """A potential that knows contexts only, and notes what it is asked."""

    def __init__(self, weigh=lambda text, complete: 0.0):
        super().__init__(BYTES, tables=TABLES)
        self.weigh = weigh
        self.asked = []

    async def prefix(self, context):
        text = b"".join(context)
        self.asked.append(text)
        return self.weigh(text, False)

    async def complete(self, context):
        text = b"".join(context)
        self.asked.append(text)
        return self.weigh(text, True)


# -- cost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [dataclasses.replace(TOPK, heal=False), RANDOM, EXACT],
    ids=["topk", "unbiased", "exact"],
)
async def test_one_forward_a_step_whatever_the_number_of_particles(params):
    for n in (1, 8, 64):
        llm = toy(params=params)
        await llm.prefix([])  # the prompt
        result = await smc(llm * ByteRegex(FREE), n, 0.5, 6)
        assert max(i.forwards for i in result.history) <= 1
        assert n == 1 or result.forwards > 1


async def test_equal_texts_are_computed_once():
    rows = []
    for n in (1, 100):
        llm = toy(params=TOPK)
        result = await smc(llm * ByteRegex("abcab"), n, 0, 8)
        assert [i.lanes for i in result.history] == [1] * 6
        rows.append(llm.model.engine.counts.rows)
    assert rows[0] == rows[1]


async def test_a_context_potential_is_asked_about_distinct_texts_only():
    other = Weighted()
    critic = Weighted()
    result = await smc(toy() * other * ByteRegex("ab|ac"), 50, 0.5, 4, critic=critic)
    assert set(result.texts) == {b"ab", b"ac"}
    # rows of "", "a", "ab", "ac": one prefix and 257 extensions each
    assert len(other.asked) == 4 * 258 + 1
    assert sorted(critic.asked) == [b"a", b"ab", b"ab", b"ac", b"ac"]


async def test_ended_and_dead_particles_cost_nothing():
    llm = toy(params=TOPK)
    result = await smc(llm * ByteRegex("a|bbbb"), 40, 0, 6)
    lanes = [i.lanes for i in result.history]
    assert lanes == [1, 2, 1, 1, 1][: len(lanes)]
    critic = Weighted(lambda text, complete: -math.inf if text.startswith(b"b") else 0.0)
    result = await smc(llm * ByteRegex("a|bbbb"), 40, 0.3, 6, critic=critic)
    assert [i.lanes for i in result.history] == [1, 1]
    assert set(result.byte_posterior) == {b"a"}


async def test_lanes_lost_in_resampling_are_not_computed():
    """Regression: rows for particles that do not survive (LLaMPPL issue 2)."""
    llm = toy(params=TOPK)
    liked = Weighted(lambda text, complete: 0.0 if text.startswith(b"a") else -200.0)
    with_all = await smc(llm * ByteRegex("[abc]{3}"), 64, 0.0, 4, critic=liked)
    llm = toy(params=TOPK)
    result = await smc(llm * ByteRegex("[abc]{3}"), 64, 0.9, 4, critic=liked)
    assert with_all.history[1].lanes == 3
    assert result.history[1].lanes == 1


# -- repetition, continuation ----------------------------------------------------------

OPTIONS = {
    "plain": {},
    "critic": {"critic": Weighted(lambda text, complete: -0.3 * text.count(b"a"))},
    "proposal": {"proposal": toy(seed=5) * ByteRegex(FREE)},
    "multinomial": {"resampling_method": "multinomial", "record": True},
}


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("params", [TOPK, RANDOM], ids=["topk", "unbiased"])
async def test_equal_seeds_give_equal_results(name, params):
    llm = toy(params=params)
    a = await smc(llm * ByteRegex(FREE), 12, 0.8, 6, seed=3, beam_seed=9, **OPTIONS[name])
    llm.clear_cache()
    b = await smc(llm * ByteRegex(FREE), 12, 0.8, 6, seed=3, beam_seed=9, **OPTIONS[name])
    c = await smc(llm * ByteRegex(FREE), 12, 0.8, 6, seed=4, beam_seed=9, **OPTIONS[name])
    assert same(a, b)
    assert a.texts != c.texts


@pytest.mark.filterwarnings("ignore:the proposal gives weight zero")
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("params", [TOPK, RANDOM], ids=["topk", "unbiased"])
async def test_resumed_is_uninterrupted(name, params, tmp_path):
    target = toy(params=params) * ByteRegex(FREE)
    options = OPTIONS[name] | {"beam_seed": 9}
    whole = await smc(target, 12, 0.8, 9, seed=3, **options)
    part = await smc(target, 12, 0.8, 2, seed=3, **options)
    assert whole.ancestry
    assert not same(whole, part)
    part.save(tmp_path / "part.json")
    for stop in (3, 5, 9):
        part = await smc(target, 12, 0.8, stop, resume=part, **OPTIONS[name])
    assert same(part, whole)
    loaded = SMCResult.load(tmp_path / "part.json")
    assert same(await smc(target, 12, 0.8, 9, resume=loaded, **OPTIONS[name]), whole)


async def test_a_complete_run_resumes_to_itself():
    target = finite(toy())
    whole = await smc(target, 8, 0.5, LONGEST + 5)
    assert same(await smc(target, 8, 0.5, LONGEST + 50, resume=whole), whole)


@pytest.mark.parametrize("params", [TOPK, RANDOM], ids=["topk", "unbiased"])
async def test_any_state_on_the_way_can_be_gone_on_with(params):
    target = toy(params=params) * ByteRegex(FREE)
    states = [s async for s in smc_steps(target, 10, 0.7, 6, seed=2)]
    whole = SMCResult(states[-1])
    assert states[0].step == 0
    for state in states[:-1]:
        assert same(await smc(target, 10, 0.7, 6, resume=state), whole)


async def test_states_are_values():
    seen: list[tuple[SMCState, list]] = []
    target = toy() * ByteRegex(FREE)
    await smc(
        target, 10, 1.0, 6, on_step=lambda s: seen.append((s, [a.copy() for a in s.particles[:6]]))
    )
    for state, then in seen:
        assert all(np.array_equal(a, b) for a, b in zip(state.particles[:6], then, strict=True))


class Stalling(Weighted):
    """Waits for ever at the third byte."""

    async def prefix(self, context):
        if len(context) == 3:
            await asyncio.sleep(1000)
        return 0.0


async def test_cancellation_leaves_nothing_running_and_can_be_resumed():
    llm, states = toy(), []
    other = toy(seed=5)
    target = llm * other * ByteRegex(FREE)
    whole = await smc(target, 6, 0.5, 6, seed=1)
    before = asyncio.all_tasks()
    stalled = target * Stalling()
    task = asyncio.ensure_future(smc(stalled, 6, 0.5, 6, seed=1, on_step=states.append))
    done, _ = await asyncio.wait([task], timeout=0.6)
    assert not done
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before
    assert states[-1].step > 0
    assert same(await smc(target, 6, 0.5, 6, resume=states[-1]), whole)


async def test_a_run_by_itself_hears_a_time_out():
    target, states = toy() * ByteRegex(FREE), []
    whole = await smc(target, 6, 0.5, 6, seed=1)  # every row is known from here on
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await smc(target, 6, 0.5, 6, seed=1, on_step=states.append)
    assert len(states) <= 2
    assert same(await smc(target, 6, 0.5, 6, resume=states[-1]), whole)


async def test_leaving_the_steps_early_leaves_nothing_running():
    before = asyncio.all_tasks()
    steps = smc_steps(toy() * toy(seed=2) * ByteRegex(FREE), 6, 0.5, 6)
    async for state in steps:
        if state.step == 2:
            break
    await steps.aclose()
    assert asyncio.all_tasks() == before


class Spelling(Lanes):
    """Spells what its lanes have read, and the salts between."""

    def __init__(self, read):
        self.read = read

    async def rows(self):
        raise AssertionError("no row is needed to come to known texts")

    async def step(self, symbols):
        pairs = zip(self.read, symbols.tolist(), strict=True)
        spelled = [(*read, symbol) for read, symbol in pairs]
        assert len(set(spelled)) == len(spelled)  # each prefix once
        return Spelling(spelled), None

    def gather(self, lanes):
        return Spelling([self.read[i] for i in lanes])

    def seeded(self, seeds):
        return Spelling([(*read, seed) for read, seed in zip(self.read, seeds, strict=True)])

    def salted(self, salt):
        pairs = zip(self.read, salt.tolist(), strict=True)
        return Spelling([(*read, ("salt", key)) for read, key in pairs])


def test_a_frontier_comes_to_every_text_and_reads_each_prefix_once(monkeypatch):
    plan = make_plan(toy(params=RANDOM), 4)

    async def start(potential):
        return Spelling([()])

    monkeypatch.setattr(frontier, "lanes_of", start)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32))
    def check(length, n, letters, seed):
        rng = np.random.default_rng(seed)
        text = rng.integers(0, letters, size=(2 * n, length)).astype(np.uint8)
        first = Particles.first(2 * n, 0.0)._replace(text=text, length=np.full(2 * n, length))
        first = first._replace(ended=rng.integers(0, 4, size=2 * n) == 0)
        salt = rng.integers(0, 2, size=(2 * n, length + 1)).astype(np.uint64)
        for particles in (first, first._replace(salt=salt)):
            found = asyncio.run(frontier.Frontier.start(plan, particles, [7, 8]))
            spelled = found.lanes[0].read if found.size else []
            assert found.size == len(spelled) == len(set(spelled))
            for i, lane in enumerate(found.lane_of.tolist()):
                assert (lane < 0) == particles.ended[i]
                if lane >= 0:
                    keys = salt[i].tolist() if particles.salt is not None else []
                    path = [7 + (i >= n), *[("salt", k) for k in keys[:1]]]
                    for k, symbol in enumerate(text[i].tolist(), start=1):
                        path += [symbol, *[("salt", key) for key in keys[k : k + 1]]]
                    assert spelled[lane] == tuple(path)

    check()


# -- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_particles": 0}, ValueError, "n_particles must be at least 1, got 0"),
        ({"n_particles": 2.0}, TypeError, "n_particles must be an integer, got 2.0"),
        ({"n_particles": True}, TypeError, "n_particles must be an integer"),
        ({"ess_threshold": -0.1}, ValueError, r"ess_threshold must be in \[0, 1\], got -0.1"),
        ({"ess_threshold": 1.5}, ValueError, r"got 1.5"),
        ({"ess_threshold": math.nan}, ValueError, r"got nan"),
        ({"ess_threshold": "0.5"}, TypeError, r"a number in \[0, 1\]"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1, got 0"),
        ({"resampling_method": "best"}, ValueError, "unknown resampling method 'best'"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"target": ByteRegex("a")}, ValueError, r"needs a byte language model .*ByteRegex"),
        ({"target": "a"}, TypeError, "a genlm-control Potential over bytes is due, got str"),
        ({"critic": 3}, TypeError, "critic must be a Potential over bytes or a function"),
        ({"proposal": 3}, TypeError, "Potential over bytes is due, got int"),
        ({"terminate_when": 3}, TypeError, "terminate_when must be a function"),
        ({"resume": 3}, TypeError, "resume must be an SMCResult or an SMCState"),
        ({"progress": 3}, TypeError, "progress must be None, a bool or a function"),
    ],
)
async def test_bad_arguments_are_named_before_any_work(options, error, message):
    llm = toy()
    arguments = {"target": finite(llm), "n_particles": 4} | options
    with pytest.raises(error, match=message):
        await smc(arguments.pop("target"), **arguments)
    assert llm.model.engine.counts.forwards == 0


class Integers(Potential):
    def __init__(self):
        super().__init__(list(range(256)))

    async def prefix(self, context):
        return 0.0

    async def complete(self, context):
        return 0.0


async def test_other_alphabets_are_refused_with_the_remedy():
    llm = toy()
    for options in ({"critic": Integers()}, {"proposal": Integers()}):
        with pytest.raises(ValueError, match=r"other tokens than single bytes.*coerce it"):
            await smc(finite(llm), 4, **options)


async def test_a_model_that_cannot_end_is_refused():
    llm = ByteLLM(toy().llm, BeamParams(K=2), model_eos=False)
    with pytest.raises(ValueError, match=r"no token of ByteLLM.* ends a text"):
        await smc(llm, 4)
    result = await smc(llm, 4, max_bytes=9, terminate_when=lambda text: len(text) == 3)
    assert {len(t) for t in result.texts} == {3}


async def test_a_power_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="a power must be finite, got nan"):
        await smc(toy() ** float("nan"), 4)


async def test_resuming_something_else_is_refused():
    target = toy() * ByteRegex(FREE)
    part = await smc(target, 4, 0.5, 3, seed=2)
    with pytest.raises(ValueError, match="n_particles must be 4, as in what is resumed; got 5"):
        await smc(target, 5, 0.5, 9, resume=part)
    with pytest.raises(ValueError, match="seed must be 2"):
        await smc(target, 4, 0.5, 9, resume=part, seed=3)
    with pytest.raises(ValueError, match="at least the 3 bytes"):
        await smc(target, 4, 0.5, 1, resume=part)


# -- dead ends -------------------------------------------------------------------------


async def test_all_dead_says_where_and_by_whom():
    with pytest.raises(AllParticlesDeadError) as caught:
        await smc(toy() * ByteRegex("abx"), 7, 0.5, 5)
    error = caught.value
    assert error.byte == 2
    assert any("ByteLLM" in name for name in error.causes) or " and " in next(iter(error.causes))
    assert "all 7 particles are dead" in str(error)
    assert "b'ab'" in str(error)
    assert error.result.log_ml == -math.inf
    assert error.result.texts == [b"ab"] * 7
    assert error.result.decoded_posterior == {}
    assert "ab" not in repr(error.result)


async def test_all_dead_by_the_critic():
    critic = Weighted(lambda text, complete: -math.inf if len(text) == 3 else 0.0)
    with pytest.raises(AllParticlesDeadError, match=r"at byte 2 by critic Weighted \(5 of them"):
        await smc(toy() * ByteRegex("[abc]{4}"), 5, 0.5, 5, critic=critic)


async def test_all_dead_by_the_twist():
    ahead = Lookahead()
    with pytest.raises(AllParticlesDeadError, match=r"at byte 0 by the twist Lookahead.* \(5 of"):
        await smc(toy() * ByteRegex("[abc]{4}"), 5, 0.5, 3, twist=ahead)


async def test_all_dead_at_the_length_limit():
    with pytest.raises(AllParticlesDeadError) as caught:
        await smc(toy() * ByteRegex("[abc]{4}"), 5, 0.5, 3)
    assert "to ending at the length limit by ByteRegex" in str(caught.value)
    assert caught.value.byte == 3
    assert set(caught.value.causes.values()) == {5}


async def test_a_target_that_excludes_the_empty_text():
    nothing = Weighted(lambda text, complete: -math.inf)
    with pytest.raises(ValueError, match=r"the empty text must .*Weighted gave -inf"):
        await smc(toy() * nothing, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
async def test_bad_weights_are_named(bad):
    odd = Weighted(lambda text, complete: bad if text == b"a" else 0.0)
    target = toy() * ByteRegex("a|b")
    with pytest.raises(BadWeightError, match=r"critic Weighted gave (nan|inf) for the prefix b'a'"):
        await smc(target, 20, critic=odd)
    with pytest.raises(BadWeightError, match=r"Weighted gave (nan|inf) to the byte b'a' after b''"):
        await smc(target * odd, 20)


async def test_predicates():
    target = finite(toy())
    result = await smc(target, 60, 0.5, LONGEST, critic=lambda text: b"ab" in text)
    alive = {t for t, w in zip(result.texts, result.normalized_weights, strict=True) if w}
    assert alive == {t for t in set(result.texts) if b"ab" in t}
    with pytest.raises(TypeError, match="returned the integer 1: return a bool, or a float"):
        await smc(target, 60, 0.5, LONGEST, critic=lambda text: 1)


@pytest.mark.filterwarnings("error")
async def test_a_proposal_with_holes_is_noticed():
    llm = toy()
    with pytest.warns(RuntimeWarning, match="the proposal gives weight zero to symbols"):
        result = await smc(finite(llm), 20, proposal=llm * ByteRegex("ab|ba"))
    assert 0 < result.uncovered < 1
    result = await smc(finite(llm), 20, proposal=llm * ByteRegex(PATTERN + "|bbb"))
    assert result.uncovered == 0


# -- progress, no loop -----------------------------------------------------------------


async def test_progress_as_a_function():
    infos = []
    result = await smc(finite(toy()), 5, 0.5, 9, progress=infos.append)
    assert len(infos) == len(result.history)
    for i in infos:
        assert i.active + i.ended + i.dead == 5


async def test_progress_bar_goes_to_stderr_when_asked(capsys):
    await smc(finite(toy()), 5, 0.5, 9, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "log ML" in err
    await smc(finite(toy()), 5, 0.5, 9)
    assert capsys.readouterr() == ("", "")


async def test_progress_bar_in_a_notebook_without_ipywidgets(capsys, monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("genlm_bytes_smc.smc.diagnostics.find_spec", lambda name: None)
    await smc(finite(toy()), 5, 0.5, 9, progress=True)
    assert "log ML" in capsys.readouterr().err


def test_sync_without_a_loop():
    target = finite(toy())
    assert same(smc_sync(target, 5, 0.5, 9, seed=1), smc_sync(target, 5, 0.5, 9, seed=1))


async def test_sync_inside_a_loop():
    target = finite(toy())
    inside = smc_sync(target, 5, 0.5, 9, seed=1)
    assert same(inside, await smc(target, 5, 0.5, 9, seed=1))
    with pytest.raises(AllParticlesDeadError):
        smc_sync(toy() * ByteRegex("abx"), 5)


@pytest.mark.parametrize("distinct", [False, True])
async def test_a_run_that_the_limit_killed_or_cut_goes_on(distinct, tmp_path):
    """With a larger limit it is the run that would have been without the smaller one."""
    target, options = finite(toy(), [b"abab", b"ba", b"a"]), {"distinct": distinct, "seed": 5}
    for n in (1, 2, 4):
        whole = await outcome(target, n, 4, **options)
        for limit in (1, 2, 3):
            part = await outcome(target, n, limit, **options)
            part.save(tmp_path / "part.json")
            for stopped in (part, SMCResult.load(tmp_path / "part.json")):
                assert same(await outcome(target, n, 4, resume=stopped, **options), whole)


async def outcome(target, n, limit, **options):
    """The result of a run, of a dead one too."""
    try:
        return await smc(target, n, 0.5, limit, **options)
    except AllParticlesDeadError as error:
        return error.result
