import numpy as np
import pytest

from genlm_bytes_smc.smc.resampling import RESAMPLING, resampler

METHODS = sorted(RESAMPLING)
WEIGHTS = [
    np.array([0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0, 0.0, 0.0]),
    np.array([0.0, 0.0, 0.3, 0.3, 0.4]),
    np.full(7, 1 / 7),
    np.array([1.0]),
    np.random.default_rng(3).dirichlet(np.full(16, 0.3)),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: f"n{len(w)}")
def test_offspring_counts_are_unbiased(method, weights):
    n, runs = len(weights), 2000
    rng = np.random.default_rng(0)
    draw = resampler(method)
    counts = np.array([np.bincount(draw(weights, rng), minlength=n) for _ in range(runs)])
    assert (counts.sum(1) == n).all()
    error = counts.std(0, ddof=1) / np.sqrt(runs)
    rare = n * weights * runs < 30  # too rare for its spread to be known: Poisson
    error[rare] = np.sqrt(n * weights[rare] / runs)
    assert (np.abs(counts.mean(0) - n * weights) <= 4 * error + 1e-9).all()
    assert (counts[:, weights == 0] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_ancestors_are_ascending_integers_and_follow_the_seed(method):
    weights = WEIGHTS[-1]
    a, b = (resampler(method)(weights, np.random.default_rng(5)) for _ in range(2))
    assert a.dtype == np.int64
    assert a.shape == weights.shape
    assert (np.diff(a) >= 0).all()
    assert (a == b).all()


def test_low_variance_schemes_keep_to_their_bounds():
    weights, n = WEIGHTS[-1], 16
    rng = np.random.default_rng(1)
    for _ in range(200):
        systematic = np.bincount(resampler("systematic")(weights, rng), minlength=n)
        assert (systematic >= np.floor(n * weights)).all()
        assert (systematic <= np.ceil(n * weights)).all()
        residual = np.bincount(resampler("residual")(weights, rng), minlength=n)
        assert (residual >= np.floor(n * weights)).all()


@pytest.mark.parametrize("method", METHODS)
def test_equal_weights_and_one_survivor(method):
    rng = np.random.default_rng(2)
    alone = np.zeros(9)
    alone[4] = 1.0
    assert (resampler(method)(alone, rng) == 4).all()
    if method != "multinomial" and method != "stratified":
        assert (resampler(method)(np.full(8, 0.125), rng) == np.arange(8)).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_zero_weight_at_the_edges_of_the_unit_interval(method):
    class Edge:
        def __init__(self, value):
            self.value = value

        def random(self, n=None):
            return self.value if n is None else np.full(n, self.value)

    weights = np.array([0.0, 0.1, 0.2, 0.7, 0.0])
    for value in (0.0, 1 - 2.0**-53):
        drawn = resampler(method)(weights, Edge(value))
        assert (weights[drawn] > 0).all()


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"'best'; known: multinomial, residual, strat"):
        resampler("best")
