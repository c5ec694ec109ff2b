"""Python functions as constraints."""

import math

import numpy as np
import pytest
import torch

from genlm_bytes_smc.constraints import BytePredicate, ConstraintError
from tests.constraints.oracles import accepted


def even(text: bytes) -> bool:
    return len(text) % 2 == 0


def test_only_whole_texts_are_weighed():
    constraint = BytePredicate(even)
    assert constraint.is_terminal_only()
    state = constraint.states([b"", b"a", b"\xff\xfe"])
    assert constraint.log_prefix(state).tolist() == [0.0, 0.0, 0.0]
    assert constraint.log_complete(state).tolist() == [0.0, -math.inf, 0.0]


async def test_prefixes_may_be_weighed_too():
    constraint = BytePredicate(lambda t: -1.0 * len(t), lambda t: t.isascii())
    assert not constraint.is_terminal_only()
    assert await constraint.prefix(b"ab") == 0.0
    assert await constraint.prefix(b"\xc3") == -math.inf
    assert await constraint.complete(b"abc") == -3.0
    row = (await constraint.logw_next(b"ab")).weights
    assert (row[:128] == 0).all()
    assert (row[128:256] == -math.inf).all()
    assert row[256] == -2.0


async def test_a_dead_prefix_kills_what_follows_even_if_the_functions_disagree():
    constraint = BytePredicate(lambda t: True, lambda t: t != b"a")
    assert await constraint.complete(b"ab") == -math.inf
    assert not accepted(constraint, b"a")
    assert accepted(constraint, b"ba")


def test_each_text_is_weighed_once():
    calls: list[bytes] = []

    def weigh(text: bytes) -> bool:
        calls.append(text)
        return True

    constraint = BytePredicate(weigh)
    state = constraint.initial(50)
    for byte in b"ab":
        constraint.block(state)
        state = constraint.step(state, torch.full((50,), byte))
    for _ in range(3):
        constraint.block(state)
    assert calls == [b"", b"a", b"ab"]
    for context in (b"ab", b"abc", b"abcd", b"abc"):
        constraint.log_complete(constraint.states([context] * 3))
    assert calls == [b"", b"a", b"ab", b"abc", b"abcd"]


@pytest.mark.parametrize("value", [np.float32(-1.5), np.bool_(True), 0, -2, np.float64(-math.inf)])
def test_kinds_of_weights(value):
    constraint = BytePredicate(lambda t: value)
    expected = 0.0 if value is np.bool_(True) or value is True else float(value)
    if isinstance(value, np.bool_):
        expected = 0.0
    assert constraint.log_complete(constraint.initial(1)).item() == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")])
def test_a_weight_that_is_none_is_refused(value):
    constraint = BytePredicate(lambda t: value)
    with pytest.raises(ValueError, match=r"fn\(b'a'\) returned (nan|inf); a log weight is"):
        constraint.block(constraint.states([b"a"]))
    with pytest.raises(ValueError, match=r"prefix_fn\(b''\) returned"):
        BytePredicate(even, lambda t: value)


@pytest.mark.parametrize("value", [None, "yes", [0.0], 1j])
def test_something_else_than_a_weight_is_refused(value):
    constraint = BytePredicate(lambda t: value)
    with pytest.raises(TypeError, match=r"fn\(b''\) must return a bool or a log weight"):
        constraint.block(constraint.initial(1))


def test_bad_arguments():
    with pytest.raises(ConstraintError, match="fn must be a function of bytes, got 5"):
        BytePredicate(5)
    with pytest.raises(ConstraintError, match="prefix_fn must be a function"):
        BytePredicate(even, "abc")
    with pytest.raises(ConstraintError, match="empty text weight zero"):
        BytePredicate(even, lambda t: False)
