"""Surprisal: exact on enumerable models, parts add up, batches, long texts, how it is shown."""

import math

import numpy as np
import pytest

from genlm_bytes_smc import (
    BeamParams,
    ByteBeamState,
    ByteLLM,
    as_engine,
    compare_surprisal,
    surprisal,
    surprisal_sync,
)
from genlm_bytes_smc.scoring import score
from genlm_bytes_smc.surprisal_figure import draw
from genlm_bytes_smc.surprisals import level, spans_of
from tests.test_choosing import EXACT
from tests.toys import Enumeration, ToyLM

TEXTS = [b"abcab", b"a", b"cabba", b"", b"bbbabc"]


@pytest.mark.parametrize("prune", EXACT)
async def test_each_byte_is_the_enumerated_one(prune):
    """Batched surprisals are differences of enumerated log prefix probabilities."""
    toy = ToyLM(seed=5)
    oracle = Enumeration(toy)
    found = await surprisal(toy, TEXTS, beam_params=EXACT[prune])
    for text, result in zip(TEXTS, found, strict=True):
        logs = [math.log(oracle.prefix(text[:i])) for i in range(len(text) + 1)]
        assert result.bytewise == pytest.approx(-np.diff(logs), abs=1e-9)
        assert result.total == pytest.approx(-logs[-1])
        alone = await surprisal(toy, text, beam_params=EXACT[prune])
        assert alone.bytewise == pytest.approx(result.bytewise, abs=1e-9)


@pytest.mark.parametrize("prune", ["topk", "deferred"])
async def test_parts_add_up_to_the_score(tiny, prune):
    """Whatever the parts, their sum is minus the log probability that `score` says."""
    params = BeamParams(K=5, prune_threshold=0.01, prune=prune)
    text = "An apple a day keeps the doctor away, naïve as it is."
    begin = await ByteBeamState.initial(tiny, params)
    wanted = -(await score(begin, text.encode())).log_p
    for per in ("byte", "character", "word"):
        found = await surprisal(tiny, text, per, beam_params=params)
        assert found.nats.sum() == pytest.approx(found.total, abs=1e-9)
        assert found.total == pytest.approx(wanted, abs=1e-6)
        assert b"".join(found.parts) == text.encode()
        assert found.bits == pytest.approx(found.nats / math.log(2))


async def test_a_prompt_is_not_counted():
    """Surprisal after a prompt is that of the text given the prompt."""
    toy = ToyLM(seed=5)
    oracle = Enumeration(toy)
    found = await surprisal(toy, b"cab", prompt=b"ab", beam_params=EXACT["topk"])
    given = math.log(oracle.prefix(b"abcab") / oracle.prefix(b"ab"))
    assert found.total == pytest.approx(-given, abs=0.05)  # the end token is special
    assert len(found.bytewise) == 3


@pytest.mark.parametrize("prune", ["topk", "deferred"])
async def test_texts_longer_than_the_window(prune):
    """A text that may not fit is read in stretches, as `score` reads it."""
    toy = ToyLM(seed=3)
    engine = as_engine(toy)
    engine.window = 24
    text = b"abcabbacab" * 6
    params = BeamParams(K=8, prune=prune)
    wanted = -(await score(await ByteBeamState.initial(engine, params), text)).log_p
    llm = ByteLLM(engine, params, model_eos=False)
    long, short = await surprisal(llm, [text, b"ab"])
    assert long.total == pytest.approx(wanted, rel=1e-6)
    assert long.cuts == () and short.cuts
    assert len(long.bytewise) == len(text)
    assert len(short.bytewise) == 2


def coverings(lm, text, start):
    """(probability, ends inside the text) of each string of tokens that covers it, enumerated.

    The start token ends at 0."""
    stack = [((*start,), 1.0, 0, [])]
    while stack:
        context, p, at, ends = stack.pop()
        row = lm.row(context).exp().tolist()
        for token, spelling in enumerate(lm.tokens):
            if not spelling.startswith(text[at : at + len(spelling)]):
                continue
            if at + len(spelling) >= len(text):
                yield p * row[token], (0, *ends)
            else:
                then = at + len(spelling)
                stack.append(((*context, token), p * row[token], then, [*ends, then]))


@pytest.mark.parametrize("prune", EXACT)
async def test_cuts_are_the_enumerated_ones(prune):
    """Without pruning, each cut's share is what its token strings weigh of all that cover it."""
    toy = ToyLM(seed=5)
    for text in (b"abcab", b"a", b"cabba"):
        wanted = {}
        for p, ends in coverings(toy, text, (toy.tokenizer.bos_token_id,)):
            wanted[ends] = wanted.get(ends, 0.0) + p
        total = sum(wanted.values())
        found = (await surprisal(toy, text, beam_params=EXACT[prune])).cuts
        best = sorted(wanted, key=lambda ends: -wanted[ends])[:4]
        assert [c.ends for c in found] == best
        assert [c.share for c in found] == pytest.approx([wanted[e] / total for e in best])


async def test_cuts_say_where_a_token_reaches_from_the_prompt(tiny):
    """A cut has an end at 0 exactly if a token ends where the prompt does."""
    (whole,) = (await surprisal(tiny, " was a dog", prompt="There")).cuts[:1]
    (inside,) = (await surprisal(tiny, "ere was a dog", prompt="Th")).cuts[:1]
    assert whole.ends[0] == 0 and 0 not in inside.ends
    assert [e + 3 for e in whole.ends] == list(inside.ends)


async def test_what_cannot_be_read_is_infinite():
    """A byte without a token has infinite surprisal; the other texts are as they were."""
    toy = ToyLM(seed=5)
    for params in EXACT.values():
        bad, good = await surprisal(toy, [b"a\xffb", b"ab"], beam_params=params)
        assert np.isfinite(bad.bytewise[0]) and np.isinf(bad.bytewise[1:]).all()
        assert good.total == pytest.approx(-math.log(Enumeration(toy).prefix(b"ab")))
        assert "inf" in str(bad) and bad.to_html() and bad.figure()


async def test_many_texts_share_forwards(tiny):
    """Twenty texts side by side take far fewer forwards than twenty times one."""
    texts = [f"The number {i} is followed by {i + 1}." for i in range(20)]
    before = tiny.counts.forwards
    await surprisal(tiny, texts[:1])
    one = tiny.counts.forwards - before
    await surprisal(tiny, texts[1:])
    assert tiny.counts.forwards - before - one < 4 * max(one, 3)


def test_parts():
    """Characters, words and spans; bytes that are no UTF-8 stand alone."""
    assert spans_of("aé".encode(), "character").tolist() == [[0, 1], [1, 3]]
    assert spans_of(b"a\xff\xc3", "character").tolist() == [[0, 1], [1, 2], [2, 3]]
    assert spans_of(b" a  bc \n", "word").tolist() == [[0, 2], [2, 6], [6, 8]]
    assert spans_of(b"abc", [(1, 3), (0, 0)]).tolist() == [[1, 3], [0, 0]]
    assert len(spans_of(b"", "word")) == len(spans_of(b"abc", [])) == 0


@pytest.mark.parametrize(
    "per",
    [[(0, 1.5)], [(0, math.nan)], [(0, 1), (2,)], ["ab"], [(0, 10**30)], None, 3, iter([(0, 1)])],
)
def test_spans_that_are_no_pairs_of_integers_are_refused(per):
    """Nothing is rounded, and the error says what was due."""
    with pytest.raises(ValueError, match=r"spans must be pairs .* of bytes, got"):
        spans_of(b"abcd", per)


@pytest.mark.parametrize(
    ("text", "per", "error", "told"),
    [
        (b"a", "token", ValueError, "per must be one of"),
        (b"a", [(0, 2)], ValueError, r"span \(0, 2\) is none of a text of 1 bytes"),
        (b"a", [0, 1], ValueError, "pairs"),
        (3, "byte", TypeError, "text must be str, bytes or a list"),
        ([3], "byte", TypeError, "a text must be str or bytes"),
    ],
)
async def test_bad_input(text, per, error, told):
    """What is wrong is said before the model is asked."""
    toy = ToyLM()
    with pytest.raises(error, match=told):
        await surprisal(toy, text, per)
    assert toy.calls == []


async def test_two_models_of_different_tokenizers(tiny):
    """The same parts of one text under models that cut it differently."""
    bytewise = ToyLM([bytes([b]) for b in range(97, 123)] + [b" ", b"<e>"], seed=1)
    found = await compare_surprisal([tiny, bytewise], "an apple a day")
    assert [r.spans.tolist() for r in found] == [found[0].spans.tolist()] * 2
    assert found[0].total < found[1].total
    assert draw(found).axes[0].get_ylabel() == "bits"
    with pytest.raises(ValueError, match="list of one model or more"):
        await compare_surprisal([], "a")
    with pytest.raises(ValueError, match="different"):
        draw([found[0], await surprisal(tiny, "another")])


async def test_how_it_is_shown(tiny):
    """Records, lines, the notebook's view and the page, escaped and without the network."""
    found = await surprisal(tiny, "a <b> & $c$", "word")
    records = found.to_records()
    assert [r["text"] for r in records] == ["a", " <b>", " &", " $c$"]
    assert sum(r["nats"] for r in records) == pytest.approx(found.total)
    assert "&lt;b&gt;" in found._repr_html_() and "<b> " not in found._repr_html_()
    page = found.to_html()
    assert "http" not in page and "prefers-color-scheme:dark" in page
    assert repr(found).startswith("Surprisal(4 parts of 11 bytes")
    assert len(found.figure().axes[0].patches) == 4
    assert surprisal_sync(tiny, "a <b> & $c$", "word").total == pytest.approx(found.total)


async def test_characters_are_shown_whole_with_their_tokens(tiny):
    """Bytes of a character have one colour, of their sum; tokens stand under the characters."""
    found = await surprisal(tiny, "déjà\n\tvu\x07")
    view = found.view()
    cells = view["cells"]
    assert "".join(c["text"] for c in cells) == "déjà↵⇥vu\\x07"
    assert [c["breaks"] for c in cells] == [False] * 4 + [True] + [False] * 4
    assert cells[1]["told"] == f"{found.bits[1:3].sum():.2f} bits"
    assert len(view["cuts"]) == len(found.cuts) >= 1
    starts = np.cumsum([0, 1, 2, 1, 2, 1, 1, 1, 1])
    ends = set(found.cuts[0].ends)
    marks = [c["marks"][0] for c in cells]
    for a, b, one, other in zip(starts, starts[1:], marks, marks[1:], strict=False):
        inside = any(a < e < b for e in ends)
        assert (one == "u") is inside
        if "u" not in (one, other):
            assert (one != other) is (b in ends)
    words = (await surprisal(tiny, "déjà\n\tvu\x07", "word")).view()
    assert [c["text"] for c in words["cells"]] == ["déjà", "↵\n⇥vu\\x07"] and not words["cuts"]
    assert [level(x) for x in (0, 0.5, 0.6, 3, 16, 17, math.inf)] == [0, 0, 1, 3, 5, 6, 7]
