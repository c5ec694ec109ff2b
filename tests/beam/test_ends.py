"""End-of-sequence tokens: one symbol, ordinary inside prompts, nothing after the end."""

import math

import numpy as np
import pytest

from genlm_bytes_smc import BeamParams, ByteBeamState
from tests.toys import EOS_TOKEN, TOY_TOKENS, Enumeration, ToyLM

EOS = frozenset([EOS_TOKEN])
EXACT = BeamParams(None, eos_byte_strings=[EOS_TOKEN])
FIVE = BeamParams(5, eos_byte_strings=[EOS_TOKEN])


class WithAngle(ToyLM):
    """A vocabulary in which the end's spelling can also be spelled by ordinary tokens."""

    def __init__(self, seed=0):
        super().__init__([*TOY_TOKENS[:-1], b"<", b"e", b">", EOS_TOKEN], seed=seed)


async def read(beam, text):
    for byte in text:
        beam = await (beam << byte)
    return beam


async def test_a_prompt_that_ends_inside_the_spelling_leaks_no_mass():
    """genlm-bytes 0.2 keeps the end token's mass: prompt `a<` made `e` far too likely."""
    lm = WithAngle()
    root = await ByteBeamState.initial(lm, EXACT)
    as_prompt = await root.prefill(b"a<")
    as_text = await read(root, b"a<")
    exact = Enumeration(lm, EOS).logp_next(b"a<")
    for beam in (as_prompt, as_text):
        row = (await beam.logp_next()).ps
        np.testing.assert_allclose(np.append(row[:256], row[257]), exact, atol=1e-9)
    assert as_prompt.logZ == pytest.approx(as_text.logZ, abs=1e-9)


async def test_a_prompt_may_begin_with_and_contain_the_spelling():
    lm = WithAngle(seed=1)
    everything = Enumeration(lm)  # in a prompt the end token is a token like any other
    root = await ByteBeamState.initial(lm, EXACT)
    for prompt in (b"<e>a", b"ab<e>b", b"<e><e>ab"):
        beam = await root.prefill(prompt)
        assert any(EOS_TOKEN in c.tokens[1:] for c in beam)
        # Only a token in flight at the prompt's end could still have become the end token.
        assert beam.logZ == pytest.approx(math.log(everything.prefix(prompt)), abs=1e-9)


async def test_a_prompt_that_ends_with_the_spelling_commits_the_token():
    lm = WithAngle(seed=2)
    root = await ByteBeamState.initial(lm, EXACT)
    beam = await root.prefill(b"a<e>")
    assert any(c.tokens[-1] == EOS_TOKEN and c.partial == b"" for c in beam)
    assert beam.logZ == pytest.approx(math.log(Enumeration(lm).prefix(b"a<e>")), abs=1e-9)


async def test_several_end_tokens_merge_into_one_symbol():
    lm = ToyLM([*TOY_TOKENS, b"<stop>", EOS_TOKEN], seed=3)
    both = frozenset([EOS_TOKEN, b"<stop>"])
    beam = await ByteBeamState.initial(lm, BeamParams(None, eos_byte_strings=list(both)))
    beam = await read(beam, b"ab")
    row = await beam.logp_next()
    assert row[257] == pytest.approx(Enumeration(lm, both).logp_next(b"ab")[256], abs=1e-9)
    only = await read(await ByteBeamState.initial(lm, EXACT), b"ab")
    assert (await only.logp_next())[257] < row[257]


class EndsSoon(ToyLM):
    """Almost certainly ends after three tokens."""

    def row(self, context):
        row = super().row(context)
        if len(context) > 3:
            row = row.clone()
            row[self.tokens.index(EOS_TOKEN)] = 20.0
        return row.log_softmax(0)


async def test_greedy_and_sample_stop_at_the_end():
    """genlm-bytes 0.2 raised or went on with an empty beam."""
    beam = await ByteBeamState.initial(EndsSoon(seed=1), FIVE)
    for out in (
        await beam.greedy(b"a", 50),
        await beam.sample(b"a", 50, seed=3),
        await beam.sample(b"a", 50, draw=lambda p: max(p, key=p.get)),
    ):
        assert out.startswith(b"a")
        assert len(out) < 20


async def test_nothing_follows_the_end():
    beam = await ByteBeamState.initial(EndsSoon(seed=1), FIVE)
    ended = await (await read(beam, b"ab") << 257)
    assert ended.ended
    assert ended.logZ > -np.inf
    assert len(ended) == len(ended.prune()) == len(list(ended)) > 0
    total = np.logaddexp.reduce([c.weight for c in ended])
    assert total == pytest.approx(ended.logZ, abs=1e-9), "it ended after these"
    assert all(c.terminated and b"".join(c.tokens[1:]) == b"ab" for c in ended)
    assert "|<EOS>" in repr(ended) and "&lt;EOS&gt;" in ended._repr_html_()
    for nothing in (b"", b"a"):
        with pytest.raises(ValueError, match="has ended"):
            await ended.prefill(nothing)
    with pytest.raises(ValueError, match="has ended"):
        await (ended << ord("a"))
    with pytest.raises(ValueError, match="has ended"):
        await ended.logp_next()


async def test_without_end_strings_no_text_ends():
    beam = await ByteBeamState.initial(ToyLM(), BeamParams(5))
    beam = await (beam << ord("a"))
    assert (await beam.logp_next())[257] == -np.inf
    never = await (beam << 257)
    assert never.logZ == -np.inf and len(never) == 0 and not never.ended
