"""Equal numbers: genlm-bytes 0.2 on the same model object, at equal parameters.

genlm-bytes sums token probabilities in float32, and its sum over the whole vocabulary, by
which each token is divided, comes out up to 2.6e-5 nats short; over the 12 tokens of a
record that adds up to 1.6e-4. So it is compared twice: with its sums done in float64,
tightly, and as it is, to 1e-4 plus that loss.
"""

import numpy as np
import pytest
import torch
from genlm.bytes import BeamParams as PeerParams
from genlm.bytes import ByteBeamState as PeerBeam
from genlm.bytes.byte_lm.trie_state import LazyTrieState
from genlm.bytes.trie import AsyncTokenByteTrie, TokenByteTrie

from genlm_bytes_smc import BeamParams, ByteBeamState
from tests.toys import ToyLM

TEXTS = [
    b"An apple a day keeps the doctor",
    "naïve café, 東京, Ελλάδα 😀".encode(),
    b'{"name": "Ann", "age": 31}',
    b"SELECT zqx FROM t",
]
TOLERANCE = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")


class Float64Trie(TokenByteTrie):
    """The peer's trie with its sums in float64."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.M_no_eos, self.M_with_eos = self.M_no_eos.double(), self.M_with_eos.double()

    def _preprocess_ws(self, batch_ws):
        return torch.stack([w.double() for w in batch_ws])


_tries = {}


async def peer_beam(llm, params, trie=Float64Trie):
    """`PeerBeam.initial` with the trie of this process, which takes seconds to build."""
    if (id(llm), trie) not in _tries:
        _tries[id(llm), trie] = llm, trie(llm.byte_vocab)
    state = LazyTrieState.initial(llm, AsyncTokenByteTrie(_tries[id(llm), trie][1]))
    return PeerBeam([await state.materialize()], params)


async def both(ours_llm, peer_llm, text, trie=Float64Trie, **params):
    ours = await (await ByteBeamState.initial(ours_llm, BeamParams(**params))).prefill(text)
    peer = await (await peer_beam(peer_llm, PeerParams(**params), trie)).prefill(text)
    return ours, peer


def same_candidates(ours, peer):
    """The same token strings, in the same order but for ties, with the same weights."""
    vocab = ours.lanes.model.vocab
    mine = sorted(((*c.tokens, c.partial), c.logw) for c in ours)
    theirs = sorted(
        ((*(vocab[t] for t in s.lm_state.context), bytes(s.partial)), s.weight)
        for s in peer
        if s.weight > -np.inf
    )
    assert [k for k, _ in mine] == [k for k, _ in theirs]
    for (_, w), (_, v) in zip(mine, theirs, strict=True):
        # The peer takes logs of float64 masses but adds them to weights in float32.
        assert w == pytest.approx(float(v), abs=TOLERANCE)


def same_row(ours, peer):
    """Equal wherever the other does not read as impossible."""
    finite = np.isfinite(peer.ps)
    np.testing.assert_allclose(np.exp(ours.ps[finite]), np.exp(peer.ps[finite]), atol=TOLERANCE)
    likely = finite & (peer.ps > -12)
    np.testing.assert_allclose(ours.ps[likely], peer.ps[likely], atol=TOLERANCE)
    assert ours.ps.argmax() == peer.ps.argmax()


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("K", [1, 5, 20])
async def test_bundled_model(tiny, K, threshold):
    for text in TEXTS if K < 20 else TEXTS[:1]:
        ours, peer = await both(tiny, tiny, text, K=K, prune_threshold=threshold)
        assert ours.logZ == pytest.approx(float(peer.logZ), abs=TOLERANCE)
        same_candidates(ours, peer)
        same_row(await ours.logp_next(), await peer.logp_next())
        same_candidates(ours.prune(), peer.prune())
        await peer.cleanup()


@pytest.mark.parametrize("threshold", [0.0, 0.05])
async def test_bundled_model_and_the_peer_as_it_is(tiny, threshold):
    for text in (b"An apple a day", TEXTS[2]):
        ours, peer = await both(tiny, tiny, text, TokenByteTrie, K=5, prune_threshold=threshold)
        tokens = max(len(c.tokens) for c in ours)
        lost = 3e-5 * tokens
        assert ours.logZ == pytest.approx(float(peer.logZ), abs=TOLERANCE + lost)
        assert ours.logZ <= float(peer.logZ) + 1e-5, "the peer divides by too small a sum"
        same_row(await ours.logp_next(), await peer.logp_next())
        await peer.cleanup()


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_toy_models_with_duplicates(seed, K):
    lm = ToyLM(seed=seed)
    for text in (b"abcab", b"cabba", b"bbabc"):
        for threshold in (0.0, 0.1):
            ours, peer = await both(lm, lm, text, K=K, prune_threshold=threshold)
            assert ours.logZ == pytest.approx(peer.logZ, abs=1e-5)
            same_candidates(ours, peer)
            same_row(await ours.logp_next(), await peer.logp_next())
            await peer.cleanup()


async def test_greedy_text(tiny):
    ours = await ByteBeamState.initial(tiny, BeamParams(5, 0.05))
    peer = await peer_beam(tiny, PeerParams(5, 0.05))
    prompt = b"An apple a day keeps the "
    assert await ours.greedy(prompt, 12) == await peer.greedy(prompt, 12)
    await peer.cleanup()


async def test_healed_beams_agree():
    """Same path, same weight, where healing must give bytes back (peers' rule)."""

    class Healing(ToyLM):
        def __init__(self):
            super().__init__([b"a", b"b", b"c", b"x", b"abcd"], seed=3)

    lm = Healing()
    for limits in ({}, {"heal_max_backoff": 1}, {"heal_max_splits": 0}, {"heal_max_splits": 2}):
        ours, peer = await both(lm, lm, b"abc", K=1, **limits)
        ours, peer = await (ours.prune() << ord("x")), await (peer.prune() << ord("x"))
        assert len(ours) == len(peer)
        if len(peer):
            same_candidates(ours, peer)
            assert ours.heals == 1
        else:
            assert ours.logZ == -np.inf
        await peer.cleanup()
