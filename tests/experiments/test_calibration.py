"""Calibrated settings are the cheapest that meet the tolerance, and meet it on other texts."""

import math

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams, byte_model
from genlm_bytes_smc.experiments import CalibrationError, calibrate, calibrate_sync
from genlm_bytes_smc.experiments.calibration import margin, student_quantile
from genlm_bytes_smc.experiments.models import read_texts
from studies.texts import held_out

GRID = {"widths": (1, 2, 4), "thresholds": (0.01, 0.001), "reference": BeamParams(K=16)}


def texts_of(kinds, nth, most=32):
    chosen = [held_out()[kind][nth][:most] for kind in kinds]
    return [t.decode("utf-8", "ignore").encode() for t in chosen]


async def test_calibrated_settings_meet_the_tolerance_on_kinds_of_text_not_seen(tiny):
    kinds = list(held_out())
    seen, unseen = kinds[::2], kinds[1::2]
    found = await calibrate(tiny, texts_of(seen, 0), 0.01, **GRID)
    chosen = found.chosen
    assert chosen.excess <= chosen.bound <= 0.01
    cheaper = [p for p in found.curve if p.rows < chosen.rows]
    assert cheaper and all(p.bound > 0.01 for p in cheaper)
    # Independently of the curve: both beams over other texts of other kinds.
    model, new = byte_model(tiny), texts_of(unseen, 1)
    mine = await read_texts(model, found.params, new)
    good = await read_texts(model, BeamParams(K=16), new)
    apart = [abs(a.sum() - b.sum()) for a, b in zip(mine.logp, good.logp, strict=True)]
    assert sum(apart) / sum(map(len, new)) <= 0.01
    # and the tolerance is not met by accident of being loose
    rough = await read_texts(model, BeamParams(K=1, prune_threshold=0.01), new)
    far = [abs(a.sum() - b.sum()) for a, b in zip(rough.logp, good.logp, strict=True)]
    assert sum(far) / sum(map(len, new)) > 0.01
    assert "K=" in repr(found)


async def test_no_setting_that_meets_it_is_an_error_with_the_curve(tiny):
    texts = texts_of(list(held_out())[:4], 0, 20)
    with pytest.raises(CalibrationError, match="none of 1 settings meets") as caught:
        await calibrate(tiny, texts, 1e-9, widths=(1,), thresholds=(0.01,))
    assert len(caught.value.curve) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tolerance": 0}, "tolerance must be above 0"),
        ({"tolerance": -1.0}, "tolerance must be above 0"),
        ({"tolerance": math.nan}, "tolerance must be above 0"),
        ({"tolerance": "low"}, "tolerance must be a number"),
        ({"texts": []}, "at least 3 texts"),
        ({"texts": [b"", "a", "b"]}, "at least 3 texts"),
        ({"texts": "one text"}, "texts must be a list"),
        ({"texts": [1, 2, 3]}, "texts must be str or bytes"),
        ({"confidence": 1.0}, "confidence must be in"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
        ({"widths": ()}, "widths must be a list"),
        ({"widths": (0,)}, "K must be"),
        ({"prune": ("best",)}, "prune must be"),
        ({"reference": 5}, "reference must be a BeamParams"),
    ],
)
def test_bad_arguments_cost_nothing(tiny, change, message):
    before = tiny.counts.rows
    with pytest.raises((TypeError, ValueError), match=message):
        calibrate_sync(tiny, **({"texts": ["a", "b", "c"], "tolerance": 0.01} | change))
    assert tiny.counts.rows == before


def test_the_margin_covers_new_texts_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside, runs, n = 0, 2000, 12
    for _ in range(runs):
        lengths = rng.integers(20, 200, size=(2, n)).astype(float)
        apart = lengths * rng.gamma(2.0, 0.01, size=(2, n))
        _, bound = margin(apart[0], lengths[0], 0.95)
        inside += apart[1].sum() / lengths[1].sum() <= bound
    assert 0.93 < inside / runs < 0.99


def test_a_dead_beam_has_no_bound():
    assert margin(np.array([1.0, math.inf, 0.5]), np.ones(3), 0.95) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("p", "degrees", "value"), [(0.95, 2, 2.920), (0.95, 10, 1.812), (0.99, 5, 3.365)]
)
def test_student_quantiles_of_the_tables(p, degrees, value):
    assert student_quantile(p, degrees) == pytest.approx(value, rel=0.012)
