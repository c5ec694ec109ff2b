"""The range trie against plain Python sets of strings."""

import gc

import numpy as np
import pytest

from genlm_bytes_smc import TokenTrie, Vocabulary, trie
from studies.bigram_lm import gpt2_tokens


def random_tokens(seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    alphabet = b"ab\x00\xff"
    tokens = [
        bytes(rng.choice(list(alphabet), size=int(rng.integers(0, 6))).tolist()) for _ in range(60)
    ]
    return [*tokens, tokens[3] or b"a", b"", b"a" * 1500, b"a" * 1500 + b"b"]


def check_against_sets(tokens: list[bytes], built: TokenTrie, prefixes: list[bytes]) -> None:
    spelled = [i for i, t in enumerate(tokens) if t]
    for prefix in prefixes:
        node = built.find(prefix)
        below = {i for i in spelled if tokens[i].startswith(prefix)}
        if not below:
            assert node == -1
            continue
        lo, hi = built.lo[node], built.hi[node]
        assert set(built.order[lo:hi].tolist()) == below
        assert set(built.tokens_at(node)) == {i for i in below if tokens[i] == prefix}
        assert built.spell(node) == prefix
        next_bytes = {tokens[i][len(prefix)] for i in below if len(tokens[i]) > len(prefix)}
        assert {b for b in range(256) if built.child(node, b) >= 0} == next_bytes


@pytest.mark.parametrize("seed", range(5))
def test_every_node_holds_the_tokens_with_its_prefix(seed):
    tokens = random_tokens(seed)
    built = TokenTrie.build(Vocabulary.from_tokens(tokens))
    prefixes = {t[:k] for t in tokens for k in range(min(len(t), 9) + 1)} | {b"zz", b"a" * 1499}
    check_against_sets(tokens, built, sorted(prefixes))
    assert len(built) == 1 + len({t[:k] for t in tokens for k in range(1, len(t) + 1)})


def test_real_vocabulary():
    tokens = gpt2_tokens()
    built = TokenTrie.build(Vocabulary.from_tokens(tokens))
    check_against_sets(tokens, built, [b" ", b" the", b"\xe6", b"\n\n", b"zzzz", b" hello"])
    assert built.n_tokens == 50_257
    assert built.nbytes < 4_000_000


def test_tokens_stand_in_the_order_of_their_bytes():
    long = b"z" * 20
    zeros = [b"a\x00", b"a", b"a\x00\x00", b"\x00", b"", long, long + b"\x00", b"a", long[:7]]
    for tokens in (zeros, random_tokens(9)):
        built = TokenTrie.build(Vocabulary.from_tokens(tokens))
        spelled = [i for i, t in enumerate(tokens) if t]
        assert built.order.tolist() == sorted(spelled, key=tokens.__getitem__)


def test_validate_names_the_broken_law():
    built = TokenTrie.build(Vocabulary.from_tokens([b"a", b"ab", b"b"]))
    broken = TokenTrie(
        built.vocab, built.order, built.lo, built.hi, built.ends * 0, built.first_child,
        built.parent, built.byte, built.depth,
    )  # fmt: skip
    with pytest.raises(ValueError, match="this law does not hold"):
        broken.validate()


def test_equal_vocabularies_share_one_trie():
    tokens = [b"a", b"b", bytes([7]), b"unlikely elsewhere"]
    before = trie.builds
    first = trie.shared_trie(Vocabulary.from_tokens(tokens))
    assert trie.shared_trie(Vocabulary.from_tokens(list(tokens))) is first
    assert trie.builds == before + 1
    del first
    gc.collect()
    trie.shared_trie(Vocabulary.from_tokens(tokens))
    assert trie.builds == before + 2, "a trie that nobody uses is not kept"


def test_ids_of_finds_every_duplicate():
    vocab = Vocabulary.from_tokens([b"a", b"", b"ab", b"a"])
    assert vocab.ids_of(b"a") == [0, 3]
    assert vocab.ids_of(b"") == [1]
    assert vocab.ids_of(b"x") == []
    assert [vocab[i] for i in range(4)] == [b"a", b"", b"ab", b"a"]


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        ([], ValueError, "at least one token"),
        (["a"], TypeError, "should be bytes, got str"),
    ],
)
def test_bad_vocabularies(tokens, error, words):
    with pytest.raises(error, match=words):
        Vocabulary.from_tokens(tokens)


def test_all_empty_vocabulary():
    with pytest.raises(ValueError, match="spell nothing"):
        TokenTrie.build(Vocabulary.from_tokens([b"", b""]))


def test_index_out_of_range():
    with pytest.raises(IndexError, match="0 to 0"):
        Vocabulary.from_tokens([b"a"])[1]
