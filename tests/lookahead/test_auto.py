"""`lookahead="auto"`: unbiased whatever the look-ahead, never far below the plain run, and told."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from genlm_bytes_smc import as_engine
from genlm_bytes_smc.constraints import BytePredicate, ByteRegex
from genlm_bytes_smc.lookahead import Lookahead, auto, future_mass
from genlm_bytes_smc.lookahead.auto import LOSS, LOSS_OF_BUDGET
from genlm_bytes_smc.lookahead.seen import DEFENSIVE, MeanLanes, line_of, mean_guesses, solve
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import (
    AllParticlesDeadError,
    SMCResult,
    pooled,
    reading,
    smc,
    smc_repeat,
)
from genlm_bytes_smc.smc.factors import Tree
from genlm_bytes_smc.smc.loop import run
from genlm_bytes_smc.smc.plan import make_plan
from genlm_bytes_smc.smc.weighers import Ahead, Recorder, Seen, proposal_rows
from tests.smc.worlds import (
    EXACT,
    LONGEST,
    RANDOM,
    TEXTS,
    Estimates,
    estimates,
    exact_weights,
    finite,
    same,
    total_variation,
    toy,
)
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

RUNS = 1000
FEW = 120
AUTO = {"lookahead": "auto"}
STOPS = [b"ba", b"cab", b"bb", b"abab"]


def automaton(llm):
    """The usual texts, by an automaton."""
    return finite(llm), {}


def predicate(llm):
    """The same texts, by functions: nothing to look along but what was seen."""
    begins = {t[:k] for t in TEXTS for k in range(len(t) + 1)}
    return llm * BytePredicate(lambda t: t in TEXTS, lambda t: t in begins), {}


def tempered(llm):
    """With a critic and tempering, none of which the look-ahead knows about."""
    return finite(llm), {"critic": lambda t: len(t) < 4, "tempering": 2}


def weight(options, texts):
    """The total weight of texts under the options of a case."""
    judge = options.get("critic", lambda _: True)
    return sum(w for t, w in texts.items() if judge(t))


async def watched(target, n, max_bytes=LONGEST, **options):
    """A run, and the rows that it saw."""
    store = Seen()
    plan = make_plan(target, n, 0.5, max_bytes, **options)
    plan = dataclasses.replace(plan, weighers=(*plan.weighers, Recorder(store, plan.max_bytes)))
    (result,) = await run([plan])
    return result, store.rows()


@pytest.mark.parametrize(
    ("case", "ess", "runs"),
    [(automaton, 0.5, RUNS), (predicate, 1.0, RUNS), (tempered, 1.0, FEW)],
)
async def test_its_estimate_is_unbiased(case, ess, runs):
    """The mean of exp(log_ml) is the enumerated weight, within four standard errors."""
    llm = toy(seed=12)
    target, options = case(llm)
    truth = weight(options, exact_weights(llm))
    found = await estimates(target, runs, n=8, ess=ess, **AUTO, **options)
    assert found.agree(truth), (found, truth)


async def test_it_is_unbiased_where_a_function_ends_texts():
    """Texts end without a symbol for it; tables look to where the automaton may end."""
    llm = toy(seed=12)
    engine = llm.model.engine
    enumeration = Enumeration(engine.llm, frozenset([EOS_TOKEN]))
    truth = sum(enumeration.prefix(t) for t in STOPS)
    found = await estimates(
        finite(llm, STOPS), FEW, n=8, ess=1.0, terminate_when=lambda t: t in STOPS, **AUTO
    )
    assert found.agree(truth), (found, truth)


async def test_it_is_unbiased_over_random_beams():
    """Beams of a particle's own are drawn afresh in each of its runs."""
    llm = toy(seed=9, params=dataclasses.replace(RANDOM, K=2))
    truth = sum(exact_weights(llm).values())
    found = await estimates(finite(llm), 2 * FEW, n=8, share_beams=False, **AUTO)
    assert found.agree(truth), (found, truth)


@pytest.mark.parametrize("mistake", ["shares", "mixture", "known"])
async def test_a_wrong_weight_is_noticed(monkeypatch, mistake):
    """Shares that sum to more than one, weights of another mixture than was drawn from, and
    known texts that count in the draws too."""
    llm = toy(seed=12)
    truth = sum(exact_weights(llm).values())
    budget = None
    if mistake == "known":
        budget = 5
        monkeypatch.setattr(pooled.Stage, "rest", lambda self: self.result.state)
    elif mistake == "shares":
        real = pooled.pooled
        monkeypatch.setattr(
            pooled, "pooled", lambda states, shares: real(states, [s**0.5 for s in shares])
        )
    else:
        real = reading.draw

        def wrong(rows, lanes, uniform):
            symbols, _ = real(rows, lanes, uniform)
            _, weights = real(rows._replace(proposal=None), lanes, uniform)
            return symbols, weights

        monkeypatch.setattr(reading, "draw", wrong)
    values = []
    for seed in range(FEW):
        llm.clear_cache()
        llm.model.store.clear()
        run = await estimates(finite(llm), 1, n=8, ess=1.0, first=seed, budget=budget, **AUTO)
        values.append(run.mean)
    found = Estimates(values)
    assert not found.agree(truth), (found, truth)


class Wrong(Ahead):
    """A look-ahead that prefers what has no future."""

    strength, defensive, line = 1.0, DEFENSIVE, pooled.Stage

    def __init__(self):
        self.line = auto.SeenLookahead([], None).line

    async def start(self, target, leaves, max_bytes):
        """Guesses that fall by three nats a byte."""
        return MeanLanes(-3.0 * np.arange(max_bytes + 1), 1)


async def test_a_ruinous_look_ahead_costs_no_more_than_is_stated(monkeypatch):
    """log_ml is never below that of the plain run of a quarter less log 4, and is unbiased."""
    llm = toy(seed=12)
    truth, values = sum(exact_weights(llm).values()), []
    monkeypatch.setattr(auto._Stages, "_ahead", lambda self, rest: Wrong())
    for seed in range(FEW):
        result = await smc(finite(llm), 8, 1.0, LONGEST, seed=seed, progress=False, **AUTO)
        plain = await smc(finite(llm), 2, 1.0, LONGEST, seed=seed, progress=False)
        assert result.stages[0].result.log_weights == pytest.approx(plain.log_weights)
        assert result.log_ml >= plain.log_ml - LOSS - 1e-9
        values.append(math.exp(result.log_ml))
    error = np.std(values) / math.sqrt(FEW)
    assert abs(np.mean(values) - truth) < 4 * error


def test_a_step_weighs_at_most_so_many_times_a_plain_one():
    """The defensive mixture bounds the weight of a step, whatever psi says."""
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(50, 257, generator=generator, dtype=torch.float64) * 5
    psi = torch.randn(50, 257, generator=generator, dtype=torch.float64) * 50
    ahead = auto.SeenLookahead([], None)
    q = torch.log_softmax(proposal_rows(Tree((0,)), 1, ahead)([own, psi]), 1)
    plain = torch.logsumexp(own, 1, keepdim=True)
    assert float((own - q - plain).max()) <= -math.log(DEFENSIVE) + 1e-9


async def test_a_table_that_would_be_too_large_is_done_without(monkeypatch):
    """Guesses are then means by length, as where there is no automaton."""
    monkeypatch.setattr(future_mass, "MOST_ARCS", 1)
    result = await smc(finite(toy(seed=4)), 8, 0.5, LONGEST, seed=1, progress=False, **AUTO)
    assert result.stages[-1].lookahead
    assert math.isfinite(result.log_ml)


async def test_the_posterior():
    """Many particles have the law of the target."""
    llm = toy()
    result = await smc(finite(llm), 4000, 0.5, LONGEST, seed=1, **AUTO)
    assert total_variation(result.byte_posterior, exact_weights(llm)) < 0.03


@pytest.mark.parametrize("case", [automaton, predicate])
async def test_sums_are_exact_where_everything_was_seen(case):
    """psi of the empty text is then the target's total weight, whatever is guessed."""
    llm = toy(seed=4)
    target, _ = case(llm)
    _, seen = await watched(target, 4000, seed=1)
    solved = await solve(seen, MeanLanes(mean_guesses(seen), 1))
    assert math.exp(solved.value[0]) == pytest.approx(sum(exact_weights(llm).values()), rel=1e-3)
    assert [len(seen.texts[i]) for i in seen.levels()[2]] == [2] * len(seen.levels()[2])


async def test_only_one_run_of_equal_rows_is_paid_for():
    """Rows that the plain run computed are not computed again; all are counted."""
    llm = toy(seed=4)
    plain = await smc(finite(llm), 400, 0.5, LONGEST, seed=0, progress=False)
    llm.clear_cache()
    llm.model.store.clear()
    result = await smc(finite(llm), 1600, 0.5, LONGEST, seed=0, progress=False, **AUTO)
    first, *others = result.stages
    assert plain.rows > 10
    assert first.rows - plain.rows in (0, 1)  # the row of the empty text belongs to the first run
    assert sum(stage.rows for stage in others) < 10
    assert result.rows == sum(stage.rows for stage in result.stages)


async def test_weights_of_known_texts():
    """They are those of enumeration, where a symbol ends texts and where a function does."""
    llm = toy(seed=4)
    exact = exact_weights(llm)
    _, seen = await watched(finite(llm), 1000, seed=1)
    known = seen.whole()
    assert set(known) <= set(exact)
    assert len(known) > 5
    for text, logw in known.items():
        assert math.exp(logw) == pytest.approx(exact[text], rel=1e-9)
    stops = lambda t: t in STOPS  # noqa: E731
    _, seen = await watched(finite(llm, STOPS), 1000, seed=1, terminate_when=stops)
    enumeration = Enumeration(llm.model.engine.llm, frozenset([EOS_TOKEN]))
    known = seen.whole()
    assert set(known) == set(STOPS)
    for text, logw in known.items():
        assert math.exp(logw) == pytest.approx(enumeration.prefix(text), rel=1e-9)


async def test_a_budget_is_spent_and_makes_the_posterior_exact():
    """A budget is kept to but for the last run, and where a plain run has a size that is given."""
    llm = toy(seed=4)
    target, exact = finite(llm), exact_weights(llm)
    for budget in (10, 25):
        llm.clear_cache()
        llm.model.store.clear()
        result = await smc(target, 8, 0.5, LONGEST, seed=1, budget=budget, **AUTO)
        others = result.rows - result.stages[-1].rows
        assert 5 <= others <= max(budget, result.stages[0].rows) + 12
    result = await smc(target, 32, 0.5, LONGEST, seed=1, budget=500, **AUTO)
    assert sum(s.share for s in result.stages) == pytest.approx(1.0)
    assert total_variation(result.byte_posterior, exact) < 0.05
    first = result.stages[0].result.log_ml
    assert result.log_ml >= first - LOSS_OF_BUDGET
    assert len(result.texts) == result.size == len(result.log_weights)
    assert len(result.to_records()) == result.size


async def test_random_beams_have_no_known_weights():
    """Texts weigh otherwise in each run, so every one is estimated from draws."""
    llm = toy(seed=4, params=dataclasses.replace(RANDOM, K=2))
    result = await smc(finite(llm), 8, 0.5, LONGEST, seed=1, budget=100, **AUTO)
    assert result.search is None
    assert not any(stage.known for stage in result.stages)


async def test_its_error():
    """The mean estimated variance is that of the estimates, within a factor of two."""
    llm = toy(seed=12)
    truth = sum(exact_weights(llm).values())
    estimates, variances = [], []
    for seed in range(FEW):
        llm.clear_cache()
        llm.model.store.clear()
        result = await smc(finite(llm), 16, 1.0, LONGEST, seed=seed, progress=False,
                           resampling_method="multinomial", **AUTO)  # fmt: skip
        z = math.exp(result.log_ml) / truth
        estimates.append(z)
        variances.append(result.ml_relative_variance * z**2)
    assert 0.5 < np.mean(variances) / np.var(estimates) < 2


async def test_what_is_pooled_is_a_run_like_another(tmp_path):
    """Weights, history, files and the viewer's record are those of one run of all particles."""
    result = await smc(finite(toy()), 12, 1.0, LONGEST, seed=3, record=True, **AUTO)
    assert result.size == 12
    assert [s.result.size for s in result.stages] == [3, 3, 6]
    last = result.history[-1]
    assert last.log_ml == pytest.approx(result.log_ml, abs=1e-9)
    assert last.ess == pytest.approx(result.ess, rel=1e-9)
    assert (last.active, last.ended + last.dead) == (0, 12)
    mixed = [s.share * math.exp(s.result.log_ml) for s in result.stages]
    assert math.exp(result.log_ml) == pytest.approx(sum(mixed))
    assert 0 <= result.log_ml_error < 1
    result.save(tmp_path / "run.json")
    again = SMCResult.load(tmp_path / "run.json")
    assert again.texts == result.texts
    assert again.log_ml == result.log_ml
    assert len(again.to_json()) == len(result.to_json()) > 1000
    assert "3 plain" in str(result)
    assert "trusted" in result.summary()["stages"]
    searched = await smc(finite(toy(seed=2)), 12, 1.0, LONGEST, seed=3, budget=15, **AUTO)
    for pooled in (result, searched):
        pooled.save(tmp_path / "run.json")
        again = SMCResult.load(tmp_path / "run.json")
        assert (again.log_ml_error, again.rows) == (pooled.log_ml_error, pooled.rows)
        assert again.summary().items() <= pooled.summary().items()


async def test_a_run_that_resampling_ends_is_counted_as_it_is_then(tmp_path):
    """Its last step counts particles that were still active, and that resampling left out."""
    for seed in range(200):
        result = await smc(finite(toy()), 6, 1.0, LONGEST, seed=seed, record=True, **AUTO)
        lasts = [stage.result.history[-1] for stage in result.stages]
        if any(info.active for info in lasts) and len({info.step for info in lasts}) > 1:
            break
    else:
        pytest.fail("no run was ended by resampling")
    for info in result.history:
        assert info.active + info.ended + info.dead == result.size == len(info.symbols)
    result.save(tmp_path / "run.json")
    assert SMCResult.load(tmp_path / "run.json").texts == result.texts


async def test_stages_that_gape_are_told():
    """A plain run far below the last one is said, and one near it is not."""
    result = await smc(finite(toy()), 40, 0.5, LONGEST, seed=3, **AUTO)
    assert not result.gapes
    assert "warning" not in result.summary()
    first, *others = result.stages
    low = SMCResult(
        first.result.state._replace(
            particles=first.result.state.particles._replace(
                log_weights=first.result.log_weights - 9.0
            )
        )
    )
    apart = pooled.StagedResult([first._replace(result=low), *others])
    assert apart.gap == pytest.approx(9.0, abs=1.0)
    assert "log evidence of the plain run" in apart.summary()["warning"]


async def test_runs_that_die():
    """A plain run that dies counts as nothing; only where all die there is an error."""
    llm = toy(seed=12)
    saved = 0
    for seed in range(40):
        try:
            result = await smc(llm * ByteRegex("abab|bb|[abc]{5}"), 8, 0.5, 4, seed=seed, **AUTO)
        except AllParticlesDeadError:
            continue
        first = result.stages[0].result.log_ml
        saved += first == -math.inf < result.log_ml
        assert result.summary()
    assert saved > 0
    with pytest.raises(AllParticlesDeadError) as caught:
        await smc(llm * ByteRegex("ababab"), 8, 0.5, 3, seed=0, **AUTO)
    assert caught.value.result.size == 8


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
async def test_few_particles(n):
    """The plain run has at least a quarter of any number."""
    result = await smc(finite(toy()), n, 0.5, LONGEST, seed=1, **AUTO)
    assert result.size == n
    assert result.stages[0].share >= 0.25
    assert sum(s.share for s in result.stages) == pytest.approx(1.0)


def test_the_line_between_guesses_and_sums():
    """Right guesses are trusted, random ones are not, and a shift is taken back."""
    rng = np.random.default_rng(0)
    length = rng.integers(0, 5, 300)
    value = rng.normal(size=300) * 3 - length
    assert line_of(value, value, length).slope == pytest.approx(1.0)
    shifted = line_of(value + 2.0, value, length)
    assert shifted.slope == pytest.approx(1.0)
    assert shifted.intercept == pytest.approx(np.full(6, -2.0))
    assert line_of(rng.normal(size=300), value, length).slope < 0.3
    assert line_of(-value, value, length).slope == 0.0
    assert line_of(np.empty(0), np.empty(0), np.empty(0, dtype=int)).slope == 1.0


async def test_a_look_ahead_of_ones_own():
    """`lookahead=` is proposal and twist at once, here and in repeated runs."""
    llm, ahead = toy(), Lookahead(n_texts=8)
    target = finite(llm)
    both = await smc(target, 8, 0.5, LONGEST, seed=1, proposal=ahead, twist=ahead)
    one = await smc(target, 8, 0.5, LONGEST, seed=1, lookahead=ahead)
    assert same(one, both)
    runs = await smc_repeat(target, 8, 0.5, LONGEST, seeds=2, seed=1, lookahead=ahead)
    assert runs.results[0].texts == one.texts


async def test_repeated_runs_in_stages():
    """`smc_repeat` makes each of its runs in stages, as `smc` does with the same seed."""
    target = finite(toy())
    runs = await smc_repeat(target, 8, 0.5, LONGEST, seeds=3, seed=5, **AUTO)
    one = await smc(target, 8, 0.5, LONGEST, seed=6, **AUTO)
    assert runs.results[1].log_weights == pytest.approx(one.log_weights, abs=1e-9)


async def test_progress_and_states_of_every_stage():
    """`on_step` sees each run in turn."""
    sizes = []
    await smc(
        finite(toy()), 12, 0.5, LONGEST, on_step=lambda s: sizes.append(len(s.particles.length)),
        progress=lambda info: None, **AUTO,
    )  # fmt: skip
    assert list(dict.fromkeys(sizes)) == [3, 6]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"proposal": Lookahead(), **AUTO}, "proposal cannot be given"),
        ({"twist": Lookahead(), **AUTO}, "twist cannot be given"),
        ({"resample_at": "\n", **AUTO}, "cannot be combined"),
        ({"twist": Lookahead(), "lookahead": Lookahead()}, "neither can be given"),
        ({"lookahead": "best"}, "lookahead must be"),
        ({"budget": 5}, "a budget needs"),
        ({"budget": 0, **AUTO}, "budget must be at least 1"),
        ({"tempering": 0, **AUTO}, "positive number"),
    ],
)
async def test_bad_options_are_refused(options, error):
    """Before any row is computed."""
    llm = ByteLLM(as_engine(ToyLM()), EXACT)
    with pytest.raises((TypeError, ValueError), match=error):
        await smc(finite(llm), 4, **options)
    assert llm.model.engine.counts.rows <= 1


async def test_going_on_is_refused():
    """A pooled run has no state to go on from with further stages."""
    target = finite(toy())
    half = await smc(target, 4, 0.5, 2, seed=0)
    with pytest.raises(ValueError, match="resume cannot be given"):
        await smc(target, 4, 0.5, LONGEST, resume=half, **AUTO)
