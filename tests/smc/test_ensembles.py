"""Ensembles: their weights against enumeration, in `smc`, and through genlm-control's samplers."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from genlm.control import Ensemble, direct_token_sampler
from genlm.control.potential.base import Potential

from genlm_bytes_smc import BeamParams, ByteLLM, as_engine
from genlm_bytes_smc.alphabet import BYTES, TABLES
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential.power_mean import (
    PowerMean,
    log_power_mean,
    mixture,
    power_mean,
    proxy_tuning,
)
from genlm_bytes_smc.smc import ensembles, smc, smc_repeat
from genlm_bytes_smc.smc.ensembles import Member, lanes_of
from tests.smc.test_weighing import Known, KnownLanes
from tests.smc.worlds import (
    EXACT,
    FREE,
    LONGEST,
    PATTERN,
    RANDOM,
    TEXTS,
    TOPK,
    exact_weights,
    same,
    total_variation,
    toy,
)
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

RUNS = 1000
OTHER_TOKENS = [b"b", b"c", b"a", b"ca", b"bab", b"ac", b"<e>"]
SHARES = [0.5, 0.2, 0.3]
ORDERS = [1.0, 0.0, -1.0, 2.5, 0.001, -0.001, math.inf, -math.inf]
DEFERRED = dataclasses.replace(EXACT, prune="deferred")


def other(seed=3, params=EXACT):
    """A model over the same letters with another tokenizer."""
    return ByteLLM(as_engine(ToyLM(OTHER_TOKENS, seed=seed, sharpness=1.0)), params)


def three(params=EXACT):
    """Three models, of two tokenizers."""
    return [toy(1, params), other(3, params), toy(7, params)]


def mean_of(weights, order, shares=SHARES):
    """The power mean of positive numbers, as one writes it down."""
    if order == math.inf:
        return max(weights)
    if order == -math.inf:
        return min(weights)
    if order < 0 and not all(weights):
        return 0.0
    if order == 0:
        return math.prod(w**s for w, s in zip(weights, shares, strict=True))
    total = sum(s * w**order for w, s in zip(weights, shares, strict=True))
    return total ** (1 / order)


def truth_of(members, combine):
    """The weight of each text of the world under a function of the members' exact weights."""
    each = [exact_weights(m) for m in members]
    return {t: combine([w[t] for w in each]) for t in TEXTS}


def agrees(runs, truth, share=1e-9):
    """Whether the runs' mean is within four standard errors, and a share, of the truth."""
    values = np.exp(runs.log_mls)
    error = values.std(ddof=1) / math.sqrt(len(values))
    return abs(values.mean() - truth) <= 4 * error + share * truth


async def stepped(model, texts=TEXTS):
    """The weight of each text that a model's own lanes say byte by byte, and then of its end.

    Beside it the weight by the end of their row: where that is zero, no run ends.
    """
    weights, forecasts = {}, {}
    for text in texts:
        here, log_weight = await lanes_of(model), 0.0
        for byte in text:
            row = (await here.rows())[0]
            here, weight = await here.step(np.array([byte]))
            log_weight += row[byte].item() if weight is None else weight[0]
        row, end = (await here.rows())[0, 256].item(), await here.ended()
        forecasts[text] = math.exp(log_weight + row)
        weights[text] = math.exp(log_weight + (row if end is None else end[0]))
    return weights, forecasts


async def repeated(target, runs=RUNS, **options):
    return await smc_repeat(target, 4, 0.7, LONGEST, seeds=runs, at_once=runs, **options)


# -- the function ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_the_mean_is_the_one_that_is_written_down(order):
    """Each order agrees with its formula at random weights of very different sizes."""
    logs = np.random.default_rng(0).normal(size=(3, 200)) * 4
    shares = torch.tensor(SHARES, dtype=torch.float64)
    ours = log_power_mean(torch.from_numpy(logs), shares, order).numpy()
    for column, got in zip(logs.T, ours, strict=True):
        assert got == pytest.approx(math.log(mean_of(np.exp(column), order)), rel=1e-6, abs=1e-9)


def test_near_order_zero_no_digit_is_lost():
    """The naive formula loses nine digits at r = 1e-12; ours is the geometric mean."""
    logs = torch.tensor([[-3.0], [-250.0], [0.5]]).double()
    shares = torch.tensor(SHARES, dtype=torch.float64)
    geometric = log_power_mean(logs, shares, 0.0)
    for order in (1e-12, -1e-12):
        assert torch.allclose(log_power_mean(logs, shares, order), geometric, rtol=1e-7)


@pytest.mark.parametrize("order", [*ORDERS, 1e-12])
def test_a_weight_of_zero(order):
    """Zero makes the mean zero for r <= 0, counts as zero for r > 0, and never gives NaN."""
    shares = torch.tensor([0.25, 0.75]).double()
    none = log_power_mean(torch.tensor([[-math.inf], [-math.inf]]).double(), shares, order)
    assert none.item() == -math.inf
    half = log_power_mean(torch.tensor([[-math.inf], [math.log(0.4)]]).double(), shares, order)
    if order <= 0:
        assert half.item() == -math.inf
    else:
        expected = math.log(0.4) + (math.log(0.75) / order if order < math.inf else 0)
        assert half.item() == pytest.approx(expected, rel=1e-3)


# -- the potential ---------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
async def test_weights_of_texts_and_prefixes_are_means_of_the_exact_ones(order):
    """complete and prefix against enumeration; rows are differences of prefixes."""
    members = three()
    ensemble = power_mean(members, order, SHARES)
    truth = truth_of(members, lambda w: mean_of(w, order))
    got = await ensemble.batch_complete(TEXTS)
    assert np.allclose(np.exp(got), [truth[t] for t in TEXTS], rtol=1e-6)
    models = [Enumeration(m.llm.llm, frozenset([EOS_TOKEN])) for m in members]
    for text in (b"", b"a", b"ab", b"cab"):
        prefix = mean_of([m.prefix(text) for m in models], order)
        assert await ensemble.prefix(text) == pytest.approx(math.log(prefix), abs=1e-6)
        row = (await ensemble.logw_next(text)).weights
        for byte in b"abc":
            longer = mean_of([m.prefix(text + bytes([byte])) for m in models], order)
            assert row[byte].item() == pytest.approx(math.log(longer / prefix), abs=1e-6)
        end = mean_of([m.ended(text) for m in models], order)
        assert row[256].item() == pytest.approx(math.log(end / prefix), abs=1e-6)


async def test_it_obeys_the_laws_of_a_potential_and_says_what_it_is():
    """genlm-control's own check of prefix, complete and logw_next; products keep our class."""
    ensemble = mixture([toy(1), other() * ByteRegex(FREE)], [1, 3])
    await ensemble.assert_logw_next_consistency([b"a", b"b"], top=5, verbosity=0)
    await ensemble.assert_autoreg_fact([b"a", b"b"], verbosity=0)
    await ensemble.assert_batch_consistency([[b"a"], [b"a", b"b"]], verbosity=0)
    assert "order=1, weights=[0.25, 0.75]" in repr(ensemble)
    assert (ensemble * ByteRegex("ab")).vocab is BYTES


async def test_genlm_controls_ensemble_is_the_same_function():
    """At the names and shares of its `Ensemble`, weights and rows are equal."""
    a, b = toy(1), other()
    for op in ("sum", "prod", "harmonic", 2.5):
        theirs, ours = Ensemble(a, b, op, a=0.3), power_mean([a, b], op, [0.3, 0.7])
        contexts = [[b"a"], [b"a", b"b"]]
        assert np.allclose(await theirs.batch_prefix(contexts), await ours.batch_prefix(contexts))
        one, two = await theirs.batch_logw_next(contexts), await ours.batch_logw_next(contexts)
        assert np.allclose(one.weights, two.weights)


async def test_an_impossible_text():
    """A text of one member alone lives in a mixture; a text of none is -inf, and no error."""
    ensemble = mixture([toy(1) * ByteRegex("ab"), other() * ByteRegex("ba|bb")])
    lone = math.log(0.5 * exact_weights(toy(1))[b"ab"])
    assert await ensemble.complete(b"ab") == pytest.approx(lone)
    assert await ensemble.prefix(b"cc") == -np.inf
    rows = (await ensemble.batch_logw_next([b"cc", b"b"])).weights
    assert rows[0].isneginf().all()
    assert np.flatnonzero(~rows[1].isneginf()).tolist() == list(b"ab")
    with pytest.raises(ValueError, match="has weight zero under `prefix`"):
        await ensemble.logw_next(b"cc")
    agree = power_mean([toy(1) * ByteRegex("ab"), other() * ByteRegex("ba|bb")], 0)
    assert (await agree.batch_complete([b"ab", b"ba"])).tolist() == [-np.inf, -np.inf]


async def test_members_of_weight_zero_are_left_out():
    """They are not even asked, so one may sweep a share from 0 to 1."""
    a, b = toy(1), other()
    ensemble = power_mean([a, b], 0, [1, 0])
    assert ensemble.members == (a,)
    assert await ensemble.complete(b"ab") == pytest.approx(await a.complete(b"ab"))


def test_refusals():
    """Bad members, orders and weights are named before any work."""
    with pytest.raises(ValueError, match="at least one member"):
        power_mean([])
    with pytest.raises(TypeError, match="Potentials over bytes, got str"):
        mixture(["tiny"])
    with pytest.raises(ValueError, match="weights must be 2 finite numbers"):
        mixture([toy(1), toy(2)], [1.0])
    with pytest.raises(ValueError, match="weights must be 2 finite numbers"):
        mixture([toy(1), toy(2)], [-1.0, 2.0])
    with pytest.raises(ValueError, match="order must be a number or one of sum"):
        power_mean([toy(1)], "median")
    with pytest.raises(TypeError, match="order must be a number"):
        power_mean([toy(1)], None)
    with pytest.raises(TypeError, match="alpha must be a finite number, got None"):
        proxy_tuning(toy(1), toy(2), toy(3), None)


# -- in smc ----------------------------------------------------------------------------


@pytest.mark.parametrize("params", [EXACT, DEFERRED], ids=["topk", "deferred"])
@pytest.mark.parametrize("order", [1.0, 0.0, -1.0, 2.5, math.inf, -math.inf])
async def test_means_are_unbiased(order, params):
    """The mean of exp(log_ml) over a thousand runs is the sum over all texts.

    Deferred beams neglect a little: there the members' weights are what each says when it is
    stepped through a text alone.
    """
    members = three(params)
    truth = truth_of(members, lambda w: mean_of(w, order))
    if params is DEFERRED:
        each, rows = zip(*[await stepped(member) for member in members], strict=True)
        ends = [t for t in TEXTS if mean_of([row[t] for row in rows], order)]
        truth = {t: mean_of([w[t] for w in each], order) for t in ends}
    target = power_mean(members, order, SHARES) * ByteRegex(PATTERN)
    assert agrees(await repeated(target), sum(truth.values()), 0.01 * (params is DEFERRED))


@pytest.mark.parametrize("order", [1.0, 0.0, -1.0])
async def test_an_end_weighs_what_members_say_once_they_have_read_it(order):
    """A run's weight of a whole text is that of `complete`, though rows forecast another."""
    inner = power_mean([toy(7, DEFERRED), other(3, DEFERRED)], 0.0)
    members = [toy(1, DEFERRED) ** 0.5, other(3, DEFERRED) * toy(7), inner]
    ensemble, surprises = power_mean(members, order), []
    for text in TEXTS:
        here, log_weight = await lanes_of(ensemble), 0.0
        for byte in text:
            here, weight = await here.step(np.array([byte]))
            log_weight += weight[0]
        true, row = await ensemble.complete(text), (await here.rows())[0, 256].item()
        assert log_weight + (await here.ended())[0] == pytest.approx(true, abs=1e-9), text
        if row > -math.inf:  # else no run ends there
            surprises.append(abs(log_weight + row - true))
            run = await smc(ensemble * ByteRegex(text.decode()), 2, max_bytes=len(text), seed=0)
            assert run.log_ml == pytest.approx(true, abs=1e-9), text
    assert max(surprises) > 1e-3


async def test_a_mixture_of_random_beams_is_unbiased_for_the_exact_models():
    """Means of unbiased estimates are unbiased; the beams are seeded in each run."""
    members = [toy(9, RANDOM, 0.7), other(3, RANDOM)]
    truth = truth_of(members, lambda w: mean_of(w, 1.0, [0.6, 0.4]))
    target = mixture(members, [0.6, 0.4]) * ByteRegex(PATTERN)
    for shared in (True, False):
        runs = await repeated(target, share_beams=shared)
        assert agrees(runs, sum(truth.values()))
        assert np.std(np.exp(runs.log_mls)) > 0.05 * sum(truth.values())


async def test_members_with_constraints_powers_and_ensembles_inside():
    """Each member may be a tree of its own, and texts may die under some of them."""
    a, b, c = three()
    inner = power_mean([a, c], 0, [1, 1])
    members = [b**0.5 * ByteRegex("a[abc]*"), inner, (c * ByteRegex(FREE)).normalize()]
    target = mixture(members, SHARES) * ByteRegex(PATTERN)
    alone = mixture(members[:2], SHARES[:2]) * ByteRegex(PATTERN)
    x, y, z = (exact_weights(m) for m in (a, b, c))
    truth = {
        t: (0.5 * (y[t] ** 0.5 if t[:1] == b"a" else 0) + 0.2 * math.sqrt(x[t] * z[t])) / 0.7
        for t in TEXTS
    }
    assert agrees(await repeated(alone), sum(truth.values()))
    truth = {t: 0.7 * truth[t] + 0.3 * local(c, t) for t in TEXTS}
    assert agrees(await repeated(target), sum(truth.values()))
    one = await smc(target, 4000, 0.5, LONGEST, seed=1)
    assert total_variation(one.byte_posterior, truth) < 0.05


def local(model, text):
    """The probability of a text under locally normalised rows of the model times `FREE`."""
    exact, allowed = Enumeration(model.llm.llm, frozenset([EOS_TOKEN])), re.compile(FREE)
    out = 1.0
    for k in range(len(text) + 1):
        row = np.exp(exact.logp_next(text[:k]))
        admitted = [b for b in b"abc" if allowed.fullmatch((text[:k] + bytes([b])).decode())]
        symbol = text[k] if k < len(text) else 256
        if symbol not in [*admitted, 256]:
            return 0.0
        out *= row[symbol] / row[[*admitted, 256]].sum()
    return out


@pytest.mark.parametrize("params", [EXACT, DEFERRED], ids=["topk", "deferred"])
async def test_proxy_tuning_is_unbiased(params):
    """A negative power in a product: base * (tuned / untuned)^alpha of the exact weights."""
    models = three(params)
    each = [exact_weights(m) for m in models]
    if params is DEFERRED:
        each, rows = zip(*[await stepped(m) for m in models], strict=True)
        each = [{t: w[t] * all(row[t] for row in rows) for t in TEXTS} for w in each]
    truth = [b * (t / u) ** 0.5 if u else 0.0 for b, t, u in zip(*map(_listed, each), strict=True)]
    target = proxy_tuning(*models, 0.5) * ByteRegex(PATTERN)
    assert agrees(await repeated(target), sum(truth), 0.01 * (params is DEFERRED))
    base, tuned, untuned = models
    assert proxy_tuning(base, tuned, untuned, 0.0) is base


async def test_zero_to_a_negative_power_is_zero():
    """A text that the divisor gives nothing has weight zero, in rows, weights and runs."""
    target = toy(1) * (toy(2) * ByteRegex("ab|ba")) ** -1
    assert await target.complete([b"b", b"b"]) == -np.inf
    result = await smc(target * ByteRegex("ab|ba|bb"), 200, 0.5, 3, seed=0)
    assert set(result.byte_posterior) == {b"ab", b"ba"}


async def test_a_wrong_weight_is_noticed(monkeypatch):
    """A tenth of a nat too much a byte in what members carry along changes the mean."""
    right = Member._gain

    async def wrong(self, read, told):
        return await right(self, read, told) + 0.1

    members = three()
    truth = truth_of(members, lambda w: mean_of(w, 1.0))
    target = mixture(members, SHARES) * ByteRegex(PATTERN)
    monkeypatch.setattr(Member, "_gain", wrong)
    assert not agrees(await repeated(target), sum(truth.values()))


async def test_members_weigh_by_their_steps(monkeypatch):
    """A member whose rows are forecasts is weighed by what it says once it has read the byte."""
    lone = lanes_of

    async def start(potential):
        return KnownLanes(potential, 1) if isinstance(potential, Known) else await lone(potential)

    async def silent(self, symbols):
        return KnownLanes(self.known, self.n, self.age + 1), None

    monkeypatch.setattr(ensembles, "lanes_of", start)
    known = Known([0.9, -0.4, 2.0], [-0.5, 0.8, -1.0])
    x, y = exact_weights(toy(1)), exact_weights(other())
    truth = 0.0
    for t in TEXTS:
        told = math.exp(await known.complete([bytes([b]) for b in t]))
        truth += mean_of([x[t] * told**0.5, y[t]], -1.0, [0.4, 0.6])
    target = power_mean([toy(1) * known**0.5, other()], -1, [0.4, 0.6]) * ByteRegex(PATTERN)
    assert agrees(await repeated(target), truth)
    monkeypatch.setattr(KnownLanes, "step", silent)
    assert not agrees(await repeated(target), truth)


def _listed(weights):
    return [weights[t] for t in TEXTS]


async def test_runs_side_by_side_are_those_of_smc_and_resume(monkeypatch):
    """Ensembles in a batch of runs, and after a stop, give the single run digit by digit."""
    target = power_mean([toy(1, TOPK), other(3, TOPK)], 0.5) * ByteRegex(FREE)
    many = await smc_repeat(target, 6, 0.8, 6, seeds=6, at_once=3)
    for seed, run in enumerate(many.results):
        assert same(run, await smc(target, 6, 0.8, 6, seed=seed))
    part = await smc(target, 6, 0.8, 3, seed=2)
    whole, resumed = await smc(target, 6, 0.8, 6, seed=2), await smc(target, 6, 0.8, 6, resume=part)
    assert whole.texts == resumed.texts
    assert np.allclose(whole.log_weights, resumed.log_weights, atol=1e-12)


async def test_one_forward_a_model_a_byte():
    """An ensemble of three models costs each of them at most a forward a step."""
    members = three(TOPK)
    ensemble = power_mean(members, 0)
    await ensemble.logw_next([])
    before = [m.model.engine.counts.forwards for m in members]
    result = await smc(ensemble * ByteRegex(FREE), 16, 0.5, 8, seed=0)
    made = [m.model.engine.counts.forwards - b for m, b in zip(members, before, strict=True)]

    assert all(0 < k <= len(result.history) + 1 for k in made)
    assert result.forwards == sum(made)


async def test_genlm_controls_ensemble_runs_in_the_fast_loop():
    """Its `Ensemble` gives the same texts and weights as our mean, without asking for contexts."""
    a, b = toy(1), other()
    theirs = Ensemble(a, b, "harmonic", a=0.3)

    async def never(contexts):
        raise AssertionError("asked context by context")

    theirs.batch_logw_next = never
    ours = power_mean([a, b], -1, [0.3, 0.7])
    one = await smc(theirs * ByteRegex(PATTERN), 16, 0.5, LONGEST, seed=0)
    two = await smc(ours * ByteRegex(PATTERN), 16, 0.5, LONGEST, seed=0)
    assert one.texts == two.texts
    assert np.allclose(one.log_weights, two.log_weights)


async def test_genlm_controls_sampler_draws_from_the_mean():
    """The mean of its SMC's estimates over a hundred runs is the sum over all texts."""
    members = three()
    truth = truth_of(members, lambda w: mean_of(w, -1.0))
    target = power_mean(members, -1, SHARES) * ByteRegex(PATTERN)
    sampler, values = direct_token_sampler(target), []
    np.random.seed(0)
    for _ in range(100):
        run = await sampler.smc(n_particles=20, ess_threshold=0.5, max_tokens=LONGEST + 1)
        values.append(math.exp(run.log_ml))
    error = np.std(values, ddof=1) / 10
    assert abs(np.mean(values) - sum(truth.values())) < 4 * error
    assert error < 0.2 * np.mean(values)


class Strict(Potential):
    """A potential of its own kind that refuses to be asked about a text of weight zero."""

    def __init__(self, letter):
        super().__init__(BYTES, tables=TABLES)
        self.letter = letter

    async def prefix(self, context):
        return 0.0 if all(b == self.letter for b in context) else -np.inf

    async def complete(self, context):
        return await self.prefix(context)


async def test_a_member_is_not_asked_about_texts_that_it_excludes():
    """Texts of one member alone go on, though another raises for them."""
    members = [toy(1) * Strict(b"a"), toy(1) * Strict(b"b"), other()]
    target = mixture(members, SHARES) * ByteRegex("aa|bb|ab|ba")
    scores = {
        t: math.exp(await target.complete(list(map(BYTES.__getitem__, t))))
        for t in (b"aa", b"bb", b"ab", b"ba")
    }
    assert agrees(await repeated(target, 300), sum(scores.values()))
    exact = exact_weights(other(), list(scores))
    assert scores[b"ab"] == pytest.approx(0.3 * exact[b"ab"])


async def test_an_ensemble_needs_an_end_where_all_must_agree():
    """A member that never ends is refused for r <= 0 and harmless for r > 0."""
    endless = ByteLLM(as_engine(ToyLM(seed=2)), BeamParams(K=None), model_eos=False)
    with pytest.raises(ValueError, match="ends a text, so every text has weight zero"):
        await smc(power_mean([toy(1), endless], 0), 4)
    result = await smc(mixture([toy(1), endless]) * ByteRegex(PATTERN), 50, 0.5, LONGEST, seed=0)
    assert result.log_ml > -np.inf


def test_it_is_a_potential():
    """`PowerMean` can be told by its class."""
    assert isinstance(mixture([toy(1)]), PowerMean)
