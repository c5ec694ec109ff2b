"""What a constraint remembers, and how it forgets."""

import numpy as np
import torch

from genlm_bytes_smc.constraints import ByteGrammar, BytePredicate, ByteRegex, ByteWFSA

DIGITS = 'start: NUM ("," NUM)*\nNUM: /[0-9]+/\n'


def random_digits(rng, n, length):
    return [bytes(rng.integers(48, 58, size=length).astype(np.uint8)) for _ in range(n)]


def test_keep_drops_texts_that_are_no_prefix_of_a_kept_one():
    constraint = ByteGrammar(DIGITS)
    texts = random_digits(np.random.default_rng(0), 20, 8)
    state = constraint.states(texts)
    constraint.block(state)
    assert constraint.n_texts > 100
    constraint.keep([state[:2]])
    assert constraint.n_texts == len({t[:k] for t in texts[:2] for k in range(9)})
    assert constraint.n_snapshots <= constraint.n_texts
    assert [constraint.text(s) for s in state[:2].tolist()] == texts[:2]
    constraint.release()
    assert constraint.n_texts == 1


def test_numbers_of_dropped_texts_are_used_again_without_mixing_up():
    constraint, fresh = ByteGrammar(DIGITS), ByteGrammar(DIGITS)
    rng = np.random.default_rng(1)
    for _ in range(5):
        texts = [t + b"," * (i % 2) for i, t in enumerate(random_digits(rng, 10, 4))]
        state = constraint.states(texts)
        assert torch.equal(constraint.block(state), fresh.block(fresh.states(texts)))
        constraint.keep([state[:3]])
        assert torch.equal(constraint.block(state[:3]), fresh.block(fresh.states(texts[:3])))
    assert constraint.n_texts < 50


async def test_a_potential_in_long_use_forgets_by_itself():
    constraint = BytePredicate(lambda t: True, max_states=20)
    rng = np.random.default_rng(2)
    most = 0
    for text in random_digits(rng, 300, 6):
        assert await constraint.complete(text) == 0.0
        most = max(most, constraint.n_texts)
    assert most < 4 * 20 + 7 + 20 * 6
    assert constraint.n_snapshots <= 20


async def test_states_that_were_lent_are_not_forgotten():
    constraint = BytePredicate(lambda t: b"7" in t, max_states=5)
    state = constraint.step(constraint.initial(1), torch.tensor([ord("7")]))
    for text in random_digits(np.random.default_rng(3), 50, 4):
        await constraint.complete(text)
    assert constraint.text(int(state[0])) == b"7"
    assert constraint.log_complete(state).item() == 0.0


def test_a_growing_text_hands_its_matcher_on_and_a_fork_copies_it():
    constraint, fresh = ByteGrammar(DIGITS), ByteGrammar(DIGITS)
    state = constraint.initial(2)
    for byte in b"123,45":
        constraint.block(state)
        state = constraint.step(state, torch.full((2,), byte))
    constraint.block(state)
    assert constraint.n_snapshots == 2  # of the empty text and of this one
    state = constraint.step(state, torch.tensor([ord("6"), ord(",")]))
    assert torch.equal(constraint.block(state), fresh.block(fresh.states([b"123,456", b"123,45,"])))
    assert constraint.n_snapshots == 3
    assert constraint.reads == 8
    # Going back to a text that handed its matcher on reads nothing again.
    texts = [b"123", b"123,", b"", b"123,45"]
    after = constraint.step(constraint.states(texts), torch.tensor([ord(c) for c in "9877"]))
    expected = fresh.states([b"1239", b"123,8", b"7", b"123,457"])
    assert torch.equal(constraint.block(after), fresh.block(expected))
    assert constraint.reads == 8 + 4


def test_random_walks_over_a_tree_of_texts_mix_nothing_up():
    rng = np.random.default_rng(7)
    constraint, oracle = ByteGrammar(DIGITS, max_states=6), ByteRegex("[0-9]+(,[0-9]+)*")
    texts = [b""] * 5
    for turn in range(60):
        texts += [texts[rng.integers(len(texts))] + bytes(rng.choice([48, 55, 44], size=2).tolist())
                  for _ in range(3)]  # fmt: skip
        texts = [t for t, q in zip(texts, oracle.states(texts).tolist(), strict=True) if q >= 0]
        asked = [texts[i] for i in rng.integers(len(texts), size=4)]
        state = constraint.states(asked)
        assert torch.equal(constraint.block(state), oracle.block(oracle.states(asked)))
        assert constraint.n_snapshots <= 6
        if turn % 7 == 6:
            constraint.keep([state[:2]])
            texts = [*asked[:2], b""]


def test_a_table_of_vectors_does_not_grow_past_its_limit():
    constraint = ByteWFSA([0.0], [(0, b, 0, -4.0) for b in range(48, 58)], [0.0], max_states=8)
    for text in random_digits(np.random.default_rng(4), 40, 6):
        constraint.block(constraint.states([text]))
    assert constraint.n_snapshots <= 8
    assert len(constraint._vectors) <= 32


def test_more_lanes_than_snapshots_is_no_trouble():
    constraint = ByteWFSA([0.0], [(0, b, 0, -4.0) for b in range(48, 58)], [0.0], max_states=3)
    texts = random_digits(np.random.default_rng(5), 30, 5)
    prefix = constraint.log_prefix(constraint.states(texts))
    assert torch.allclose(prefix - constraint.log_total, torch.tensor(-20.0).double())


def test_an_automaton_remembers_nothing_per_text():
    constraint = ByteRegex("[0-9]*")
    before = set(constraint.__dict__)
    state = constraint.initial(4)
    for _ in range(100):
        state = constraint.step(state, torch.full((4,), 55))
    assert (state == constraint.initial(4)).all()
    assert set(constraint.__dict__) == before
