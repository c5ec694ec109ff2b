"""What a result says of itself, and the files it is written to."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from genlm.control.constant import EOS
from genlm.control.sampler.sequence import Sequences
from genlm.control.sampler.token import DirectTokenSampler
from rich.console import Console

from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.smc import (
    UNDECODABLE,
    UNFINISHED,
    AllParticlesDeadError,
    SMCResult,
    TextSamples,
    smc,
    smc_steps,
)
from genlm_bytes_smc.smc.loop import run
from genlm_bytes_smc.smc.plan import make_plan
from tests.smc.worlds import FREE, LONGEST, TOPK, finite, same, toy


def samples(texts, weights, ended=None):
    ended = np.ones(len(texts), dtype=bool) if ended is None else np.array(ended)
    with np.errstate(divide="ignore"):
        return TextSamples(texts, ended, np.log(np.array(weights, dtype=float)))


def test_it_is_a_sequences_with_the_same_numbers():
    texts, weights = [b"a", b"bc", b"a", b""], [1.0, 2.0, 3.0, 0.0]
    mine = samples(texts, weights)
    theirs = Sequences([[*(bytes([b]) for b in t), EOS] for t in texts], mine.log_weights)
    assert isinstance(mine, Sequences)
    assert list(mine.contexts) == theirs.contexts
    for name in ("size", "log_total", "log_ml", "log_ess", "ess"):
        assert getattr(mine, name) == pytest.approx(getattr(theirs, name)), name
    assert mine.normalized_weights == pytest.approx(theirs.normalized_weights)
    assert mine.log_normalized_weights == pytest.approx(theirs.log_normalized_weights)
    assert dict(mine.decoded_posterior) == pytest.approx(
        {k: v for k, v in theirs.decoded_posterior.items() if v}
    )
    assert dict(mine.posterior) == pytest.approx(dict(theirs.posterior))
    assert len(mine) == 4
    assert mine[1][0] == [b"b", b"c", EOS]
    assert len(list(mine)) == 4


def test_what_cannot_be_decoded_is_counted():
    """Regression: genlm-control reports {'a': 1.0} here, dropping 99% without a word."""
    s = samples([b"\xff", b"a", b"b"], [98.0, 1.0, 1.0], [True, True, False])
    expected = pytest.approx({UNDECODABLE: 0.98, "a": 0.01, UNFINISHED: 0.01})
    assert dict(s.decoded_posterior) == expected
    assert s.undecodable == pytest.approx(0.98)
    assert s.unfinished == pytest.approx(0.01)
    assert next(iter(s.decoded_posterior)) is UNDECODABLE
    assert set(s.byte_posterior) == {b"\xff", b"a", UNFINISHED}
    assert "<not UTF-8>" in str(s)
    clean = samples([b"a"], [1.0])
    assert clean.undecodable == clean.unfinished == 0.0
    assert list(clean.decoded_posterior) == ["a"]


def test_all_weights_zero():
    s = samples([b"a", b"b"], [0.0, 0.0])
    assert s.log_ml == -math.inf
    assert s.ess == 0
    assert s.decoded_posterior == {}
    assert s.normalized_weights.tolist() == [0, 0]
    assert "log_ml=-inf" in repr(s)
    assert str(s)


async def test_it_prints_well():
    result = await smc(toy(params=TOPK) * ByteRegex("[abc<>]{1,4}"), 30, 0.5, 5)
    text = str(result)
    assert "log marginal likelihood" in text
    assert "effective sample size" in text
    assert max(map(len, text.splitlines())) <= 100
    assert repr(result).startswith("SMCResult(30 samples, log_ml=")
    assert "\n" not in repr(result)
    Console(file=io.StringIO()).print(result)
    page = samples([b"<script>"], [1.0])._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "<table>" in result._repr_html_()


async def test_paths_ancestry_and_counts():
    result = await smc(toy() * ByteRegex(FREE), 30, 0.9, 6, seed=2)
    assert result.complete
    assert len(result.ess_path) == len(result.log_ml_path) == len(result.history)
    assert result.log_ml_path[-1] == pytest.approx(result.log_ml)
    assert result.ess_path[-1] == pytest.approx(result.ess)
    assert result.ancestry
    eve = np.arange(30)
    for step, ancestors in result.ancestry:
        assert result.history[step].ess < 0.9 * 30
        eve = eve[ancestors]
    assert (eve == result.eve).all()
    assert result.rows == sum(i.rows for i in result.history) > 0
    assert result.seconds > 0


async def test_deaths_are_counted_by_factor():
    critic = toy() ** 0 * ByteRegex("a*")  # prefixes with b or c are dead
    result = await smc(toy() * ByteRegex("[abc]{2}"), 60, 0, 4, critic=critic, seed=1)
    dead = sum(w == -math.inf for w in result.log_weights)
    assert dead > 0
    assert sum(result.deaths.values()) >= dead
    assert any("critic" in name for name in result.deaths)


# -- the error of one run --------------------------------------------------------------


@pytest.mark.parametrize("always", [False, True])
async def test_the_variance_from_one_run_is_unbiased(always):
    """Lee & Whiteley 2018: E[Z^2 V] = var Z, with multinomial resampling at fixed steps."""
    target = toy(seed=4) * ByteRegex("[ab]{3}")
    z, v = [], []
    for seed in range(400):
        plan = make_plan(target, 8, 0.0, 4, seed=seed, resampling_method="multinomial")
        # above 1: also where all weights are equal
        (r,) = await run([dataclasses.replace(plan, ess_threshold=1.1 if always else 0.0)])
        assert len(r.ancestry) == (3 if always else 0)
        z.append(math.exp(r.log_ml))
        v.append(r.ml_relative_variance * z[-1] ** 2)
    z, v = np.array(z), np.array(v)
    squares = (z - z.mean()) ** 2
    error = math.hypot(v.std(ddof=1), squares.std(ddof=1)) / math.sqrt(len(z))
    assert abs(v.mean() - z.var(ddof=1)) < 4 * error
    assert v.mean() > 4 * v.std(ddof=1) / math.sqrt(len(z))  # and it is not just noise


async def test_the_error_shrinks_with_particles_and_knows_its_limits():
    target = toy(seed=4) * ByteRegex("[ab]{3}")
    few = await smc(target, 50, 0.5, 4)
    many = await smc(target, 5000, 0.5, 4)
    assert many.log_ml_error < 0.3 * few.log_ml_error
    assert abs(many.log_ml - few.log_ml) < 5 * few.log_ml_error
    one = await smc(target, 1, 0.5, 4)
    assert math.isnan(one.log_ml_error)
    assert "±" not in str(one)
    certain = await smc(target.normalize(), 10, 0, 4)
    assert certain.log_ml_error == pytest.approx(0, abs=1e-6)


# -- files -----------------------------------------------------------------------------


async def recorded(**options):
    return await smc(toy(seed=3) * ByteRegex(FREE), 9, 1.0, 5, seed=4, record=True, **options)


@pytest.mark.parametrize("record", [False, True])
async def test_saved_results_come_back_whole(tmp_path, record):
    path = tmp_path / "result.json"
    for limit in (3, 40):
        target = toy(seed=3, params=TOPK) * ByteRegex(FREE)
        result = await smc(target, 9, 0.9, limit, seed=5, record=record)
        result.save(path)
        back = SMCResult.load(path)
        assert same(back, result)
        assert back.log_ml == result.log_ml
        assert back.state.seed == 5
        assert back.resumable.step == result.resumable.step
        assert (back.resumable.particles.text == result.resumable.particles.text).all()
        assert [i.rows for i in back.history] == [i.rows for i in result.history]
    assert json.loads(path.read_text())["format"].startswith("genlm_bytes_smc.SMCResult")
    assert list(tmp_path.iterdir()) == [path]


async def test_dead_results_come_back_too(tmp_path):
    with pytest.raises(AllParticlesDeadError) as caught:
        await smc(toy() * ByteRegex("abx"), 3, record=True)
    caught.value.result.save(tmp_path / "dead.json")
    back = SMCResult.load(tmp_path / "dead.json")
    assert same(back, caught.value.result)
    json.loads(caught.value.result.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"format": "other"}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"no saved result|is due, got other data"):
        SMCResult.load(path)


def rebuilt(record):
    """The contexts as the viewer's page rebuilds them."""
    contexts = []
    for i, entry in enumerate(record):
        if i == 0:
            parents = [""] * len(entry["particles"])
        elif entry["mode"] == "resample":
            parents = [contexts[-1][a] for a in entry["ancestors"]]
        else:
            parents = contexts[-1]
        added = [p["contents_incr"] for p in entry["particles"]]
        contexts.append(
            ["|".join(x for x in (p, a) if x) for p, a in zip(parents, added, strict=True)]
        )
    return contexts


async def test_the_record_is_what_the_viewer_reads(tmp_path):
    result = await recorded()
    text = result.to_json(tmp_path / "run.json")
    assert (tmp_path / "run.json").read_text() == text
    record = json.loads(text, parse_constant=pytest.fail)
    assert [e["step"] for e in record] == list(range(1, len(record) + 1))
    assert record[0]["mode"] == "init"
    assert {e["mode"] for e in record[1:]} == {"smc_step", "resample"}
    assert rebuilt(record)[-1] == ["|".join([*t.decode(), "EOS"]) for t in result.texts]
    for entry, info in zip(record, result.history, strict=True):
        assert [float(p["logweight"]) for p in entry["particles"]] == info.log_weights.tolist()
    weights = np.full(9, result.state.start)
    for entry in record:  # increments add up along the lines of descent
        if entry["mode"] == "resample":
            weights = weights[entry["ancestors"]]
        weights = weights + [float(p["weight_incr"]) for p in entry["particles"]]
        shown = [float(p["logweight"]) for p in entry["particles"]]
        assert weights == pytest.approx(shown)


async def test_the_record_has_the_form_of_genlm_controls(tmp_path, capsys):
    path = tmp_path / "theirs.json"
    sampler = DirectTokenSampler(toy(seed=3) * ByteRegex(FREE))
    await sampler.smc(n_particles=9, ess_threshold=1.0, max_tokens=6, json_path=str(path))
    theirs, mine = json.loads(path.read_text()), json.loads((await recorded()).to_json())

    def shapes(record):
        of = {k: type(v) for e in record for p in e["particles"] for k, v in p.items()}
        return {e["mode"]: sorted(e) for e in record}, of

    assert shapes(mine) == shapes(theirs)
    assert set(shapes(mine)[0]) == {"init", "smc_step", "resample"}
    assert rebuilt(theirs)[-1][0].endswith("EOS")


async def test_an_unrecorded_run_has_no_record():
    result = await smc(finite(toy()), 4, 0.5, LONGEST)
    with pytest.raises(ValueError, match="record=True"):
        result.to_json()


async def test_a_result_on_the_way():
    async for state in smc_steps(toy() * ByteRegex("[abc]{3}"), 5, 0.5, 5):
        result = SMCResult(state)
        if state.step == 2:
            assert not result.complete
            assert result.unfinished == pytest.approx(1)
            assert "still reading" in str(result)
    assert result.complete
