import numpy as np
import pytest

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc import Particles, Weights


def test_weights_by_hand():
    w = Weights(np.log(np.array([1.0, 2.0, 5.0])) - 1000)
    assert w.normalised == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert w.ess == pytest.approx(64 / 30)
    assert w.log_mean == pytest.approx(np.log(8 / 3) - 1000)
    assert len(w) == 3


def test_weights_with_dead_particles():
    w = Weights(np.array([-np.inf, 0.0, 0.0]))
    assert w.normalised.tolist() == [0.0, 0.5, 0.5]
    assert w.ess == pytest.approx(2)
    assert w.log_mean == pytest.approx(np.log(2 / 3))
    dead = Weights(np.full(4, -np.inf))
    assert dead.ess == 0.0
    assert dead.log_mean == -np.inf
    assert dead.normalised.tolist() == [0.0] * 4


def test_one_weight():
    assert Weights(np.array([-3.0])).ess == pytest.approx(1)
    assert Weights(np.array([-3.0])).log_mean == pytest.approx(-3)


def test_reading_ends_kills_and_leaves_the_rest_alone():
    p = Particles.first(4, 0.0)
    p = p.read(np.array([97, 98, EOS_COLUMN, 99]), np.array([-1.0, -2.0, -3.0, -np.inf]))
    assert p.texts() == [b"a", b"b", b"", b""]
    assert p.ended.tolist() == [False, False, True, False]
    assert p.dead.tolist() == [False, False, False, True]
    assert p.active.tolist() == [True, True, False, False]
    p = p.read(np.array([98, EOS_COLUMN, 0, 0]), np.array([-1.0, -1.0, 5.0, 5.0]))
    assert p.texts() == [b"ab", b"b", b"", b""]
    assert p.log_weights.tolist() == [-2.0, -3.0, -3.0, -np.inf]


def test_gathering_copies_texts_and_ancestry():
    p = Particles.first(3, 0.0).read(np.array([97, 98, 99]), np.zeros(3))
    q = p.gather(np.array([2, 2, 0]), -1.5)
    assert q.texts() == [b"c", b"c", b"a"]
    assert q.eve.tolist() == [2, 2, 0]
    assert q.log_weights.tolist() == [-1.5] * 3
    assert p.texts() == [b"a", b"b", b"c"]
