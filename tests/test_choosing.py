"""`choose`: exact on enumerable models, one forward for all options, clear errors."""

import math

import numpy as np
import pytest

from genlm_bytes_smc import (
    BeamParams,
    ByteLLM,
    Choice,
    Prompt,
    as_engine,
    choose,
    choose_sync,
    load_model,
)
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

EOS = frozenset({EOS_TOKEN})
EXACT = {
    "topk": BeamParams(K=None, eos_byte_strings=[EOS_TOKEN]),
    "deferred": BeamParams(
        K=None,
        prune="deferred",
        eos_byte_strings=[EOS_TOKEN],
        deferred_share=0.0,
        deferred_merge=0.0,
        deferred_rows=10_000,
        deferred_limit=100_000,
    ),
}
OPTIONS = ["ab", "abc", "a", "cab", "bbbabc", "ba"]  # prefixes of one another, several lengths


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prompt", [b"", b"ab", b"cabb"])
@pytest.mark.parametrize("normalise", ["none", "end"])
@pytest.mark.parametrize("prune", EXACT)
async def test_weights_are_the_enumerated_ones(prune, normalise, prompt, seed):
    """Weights after a prompt equal sums over all coverings, also over the prompt's edge."""
    toy = ToyLM(seed=seed)
    oracle = Enumeration(toy, EOS)
    prompt_weight = await (ByteLLM(toy, EXACT[prune], prompt=prompt)).prompt_weight()
    found = await choose(toy, prompt, OPTIONS, normalise, beam_params=EXACT[prune])
    weigh = oracle.ended if normalise == "end" else oracle.prefix
    if not prompt:
        expected = [weigh(option.encode()) for option in OPTIONS]
    else:  # in a prompt the end token is an ordinary one, so its own weight is the beam's
        expected = [weigh(prompt + o.encode()) / math.exp(prompt_weight) for o in OPTIONS]
    assert np.exp(found.log_weights) == pytest.approx(expected, rel=1e-9)
    assert found.probabilities == pytest.approx(np.array(expected) / sum(expected), rel=1e-9)
    assert found.bound < 1e-9
    assert found.best == OPTIONS[int(np.argmax(expected))]


async def test_bounds_hold_where_the_beam_drops_mass():
    """With top-K pruning the exact probability lies between `lower` and `upper`."""
    widths = []
    for seed in range(10):
        toy = ToyLM(seed=seed, sharpness=1.0)
        params = BeamParams(K=1, heal=False, prune_threshold=0.2, eos_byte_strings=[EOS_TOKEN])
        found = await choose(toy, b"", OPTIONS, beam_params=params)
        exact = np.array([Enumeration(toy, EOS).prefix(o.encode()) for o in OPTIONS])
        exact /= exact.sum()
        assert (found.lower - 1e-12 <= exact).all()
        assert (exact <= found.upper + 1e-12).all()
        widths.append(found.bound)
    assert max(widths) > 0.01  # mass was dropped


async def test_an_option_is_weighed_alike_alone_and_among_others():
    """The other options change nothing in an option's exact weight."""
    toy = ToyLM(seed=4)
    many = await choose(toy, b"a", OPTIONS, beam_params=EXACT["topk"])
    for option, weight in zip(OPTIONS, many.log_weights, strict=True):
        alone = await choose(toy, b"a", [option], beam_params=EXACT["topk"])
        assert alone.log_weights[0] == pytest.approx(weight, rel=1e-12)
        assert alone.probabilities.tolist() == [1.0]


@pytest.mark.parametrize("prune", ["topk", "deferred"])
async def test_what_options_share_costs_once(prune):
    """Options with one long beginning cost few more rows than one of them, and forwards of the
    deepest only."""
    params = BeamParams(K=5, prune_threshold=0.01, prune=prune)
    prompt, shared = b"An apple a day", b" keeps the doctor away, said the old man to the "
    names = [b"king", b"queen", b"boy", b"girl", b"dog", b"cat", b"mayor", b"miller"]
    costs = []
    for options in ([shared + names[0]], [shared + name for name in names]):
        tiny = load_model("tiny", device="cpu")  # which has no rows yet
        llm = ByteLLM(tiny, params, prompt=prompt)
        await llm.prompt_weight()
        before = tiny.counts.forwards, tiny.counts.rows
        await choose(llm, None, options)
        costs.append((tiny.counts.forwards - before[0], tiny.counts.rows - before[1]))
    (_, one_rows), (forwards, rows) = costs
    assert forwards <= len(shared) + max(map(len, names))
    assert rows < one_rows + 4 * len(names)


async def test_empty_option_with_end():
    """An empty answer is one that ends at once."""
    toy = ToyLM(seed=1)
    found = await choose(toy, b"", ["", "a"], "end", beam_params=EXACT["topk"])
    oracle = Enumeration(toy, EOS)
    assert np.exp(found.log_weights) == pytest.approx([oracle.ended(b""), oracle.ended(b"a")])


async def test_impossible_options_weigh_nothing():
    """A dead branch has weight zero and leaves the others alone; all dead is an error."""
    toy = ToyLM(seed=1)
    for params in EXACT.values():
        found = await choose(toy, b"", [b"ab", b"\xff", b"a\xffb"], beam_params=params)
        assert found.probabilities.tolist() == [1.0, 0.0, 0.0]
        assert found.log_weights[1] == -math.inf
        with pytest.raises(ValueError, match="all 2 options have probability zero"):
            await choose(toy, b"", [b"\xff", b"\xfe"], beam_params=params)


@pytest.mark.parametrize(
    ("options", "normalise", "error", "told"),
    [
        ([], "none", ValueError, "at least one answer, got none"),
        (["a", b"a"], "none", ValueError, r"more than once among them: \[b'a'\]"),
        (["a", ""], "none", ValueError, "empty option needs"),
        ("ab", "none", TypeError, "options must be a list"),
        (3, "none", TypeError, "options must be a list"),
        (["a", 1], "none", TypeError, "an option must be str or bytes, got 1"),
        (["\ud800"], "none", ValueError, "lone surrogate"),
        (["a"], "length", ValueError, "normalise must be"),
    ],
)
async def test_bad_input_is_told_before_any_work(options, normalise, error, told):
    """What is wrong is said, with what was got, and the model is not asked."""
    toy = ToyLM()
    with pytest.raises(error, match=told):
        await choose(toy, b"", options, normalise)
    assert toy.calls == []


async def test_other_bad_input():
    """A prompt of another type, and an end where no token ends a text."""
    with pytest.raises(TypeError, match="prompt is bytes"):
        await choose(ToyLM(), 1.5, ["a"])
    llm = ByteLLM(ToyLM(), BeamParams(K=3), model_eos=False)
    with pytest.raises(ValueError, match="needs a token that ends a text"):
        await choose(llm, b"", ["a"], "end")


async def test_models_and_prompts_in_every_form():
    """A `ByteLLM`, an engine and a model say the same; so do str, bytes and `Prompt`."""
    toy, params = ToyLM(seed=2), EXACT["topk"]
    llm = ByteLLM(toy, params, prompt=b"ab")
    wanted = (await choose(llm, None, OPTIONS)).log_weights
    for model, given in [(llm, "ab"), (toy, Prompt.text("ab")), (as_engine(toy), b"ab")]:
        own = None if model is llm else params
        found = await choose(model, given, OPTIONS, beam_params=own)
        assert found.log_weights == pytest.approx(wanted)
    again = await choose(llm, None, OPTIONS, beam_params=EXACT["deferred"])
    assert again.log_weights == pytest.approx(wanted)
    assert choose_sync(llm, None, OPTIONS).log_weights == pytest.approx(wanted)


async def test_how_a_choice_is_shown():
    """Records, the table, the notebook's table and look-ups."""
    found = Choice(("yes", "<no>"), np.log([0.3, 0.1]), np.full(2, -np.inf), "none")
    assert found.top(1) == [("yes", pytest.approx(0.75))]
    assert found["<no>"] == pytest.approx(0.25)
    with pytest.raises(KeyError, match="none of the options"):
        found["maybe"]
    records = found.to_records()
    assert [r["option"] for r in records] == ["yes", "<no>"]
    assert records[0]["lower"] == records[0]["upper"] == pytest.approx(0.75)
    assert "0.7500" in str(found) and "<no>" in str(found)
    assert "&lt;no&gt;" in found._repr_html_()
    assert repr(found) == "Choice('yes': 0.7500, '<no>': 0.2500)"


def test_by_name():
    """A model's name is loaded, by `ByteLLM` too, which needs no parameters."""
    assert ByteLLM("tiny").params.prune == "deferred"
    found = choose_sync("tiny", "An apple a day keeps the ", (o for o in ("doctor", "cat")))
    assert found.best == "doctor"
