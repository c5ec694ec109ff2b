"""`ByteBeamState` as a user meets it: looks, rows, healing, errors."""

import copy
import itertools
import math
import pickle
import random
import re

import numpy as np
import pytest
import torch
from arsenal.maths import sample_dict as peer_draw
from genlm.bytes import BeamParams as PeerParams
from genlm.bytes import ByteBeamState as PeerBeam
from genlm.bytes.util import LazyByteProbs as PeerRow

from genlm_bytes_smc import (
    BadRowError,
    BeamParams,
    ByteBeamState,
    ByteLLM,
    ByteRegex,
    LazyByteProbs,
    RowTransform,
    as_engine,
    load_model,
)
from genlm_bytes_smc.beam.display import as_text
from genlm_bytes_smc.beam.model import Rescues, byte_model
from genlm_bytes_smc.beam.single import sample_dict
from tests.toys import EOS_TOKEN, ToyLM

ANSI = re.compile("\x1b\\[[0-9;]*m")

pytestmark = pytest.mark.filterwarnings("ignore:.*[Ss]parse:UserWarning")


class AbcdLM(ToyLM):
    def __init__(self, seed=3):
        super().__init__([b"a", b"b", b"c", b"x", b"abcd"], seed=seed)


async def read(beam, text):
    for byte in text:
        beam = await (beam.prune() << byte)
    return beam


# -- looks -----------------------------------------------------------------------------


async def test_printed_form(tiny):
    beam = await ByteBeamState.initial(tiny, BeamParams(2))
    beam = (await beam.prefill(b"An apple")).prune()
    lines = repr(beam).splitlines()
    assert lines[0] == f"Z: {beam.logZ}"
    assert lines[1] == "Candidates:"
    assert lines[2].startswith("(") and ": <|endoftext|>|An|␣apple" in lines[2]
    assert "\x1b" not in repr(beam), "no colours where standard output is no terminal"
    assert "\x1b[35m" in as_text(beam.logZ, beam.candidates, colour=True)
    assert "<table>" in beam._repr_html_() and "␣apple" in beam._repr_html_()
    assert len(beam) == len(list(beam)) == 2


async def test_html_is_escaped():
    lm = ToyLM([b"<b>", b"&", b"a"], seed=1)
    beam = await read(await ByteBeamState.initial(lm, BeamParams(3)), b"<b>")
    assert "<b>" not in beam._repr_html_().replace("<b>log Z", "")


async def test_row_reads_as_in_genlm_bytes(tiny):
    beam = await ByteBeamState.initial(tiny, BeamParams(3))
    row = await (await beam.prefill(b"An apple a day keeps the ")).logp_next()
    assert row.ps.shape == (258,)
    assert row[None] == row[256] == -math.inf
    assert row[ord("d")] == row.ps[ord("d")]
    top = row.pretty().top(5)
    assert len(top) == 5 and all(isinstance(k, bytes) for k in top)
    assert row.materialize()[257] == row[257]
    peer = PeerRow(row.ps)
    assert row.materialize() == peer.materialize() and row.pretty() == peer.pretty()
    assert LazyByteProbs(np.exp(row.ps), log_space=False).materialize()["none such"] == 0
    with pytest.raises(ValueError, match="a row has 258 entries, got 257"):
        LazyByteProbs(row.ps[:257])
    assert "LazyByteProbs(" in repr(row) and "<table>" in row._repr_html_()
    for bad, error in ((258, ValueError), (-1, ValueError), ("a", TypeError)):
        with pytest.raises(error):
            row[bad]


async def test_candidates_offer_what_those_of_genlm_bytes_do(tiny):
    """`weight`, `partial`, `terminated`, `lm_state.context`, and the list as `states`."""
    text = "Un café ".encode()
    ours = await (await ByteBeamState.initial(tiny, BeamParams(3))).prefill(text)
    peer = await (await PeerBeam.initial(tiny, PeerParams(3))).prefill(text)
    assert len(ours.states) == len(peer.states) == len(ours)
    for mine, theirs in zip(ours, peer, strict=True):
        assert mine.weight == pytest.approx(float(theirs.weight), abs=1e-3)
        assert list(mine.lm_state.context) == list(theirs.lm_state.context)
        assert list(mine.partial) == list(theirs.partial)
        assert mine.terminated == theirs.terminated
        assert repr(mine) == ANSI.sub("", repr(theirs))
    await peer.cleanup()


async def test_a_candidate_names_what_it_does_not_have(tiny):
    """genlm-bytes' states carry their trie; these are what is shown of one."""
    beam = await ByteBeamState.initial(tiny, BeamParams(2))
    candidate = next(iter(beam))
    for name in ("node", "mass", "mode", "logp_next", "trie", "materialize"):
        with pytest.raises(AttributeError, match=rf"has no {name!r}.*beam.logp_next\(\)"):
            getattr(candidate, name)
        assert not hasattr(candidate, name)
    assert pickle.loads(pickle.dumps(candidate)) == copy.deepcopy(candidate) == candidate


async def test_what_the_model_alone_knows_has_a_form():
    """A start token outside the vocabulary: the rows are the model's affair, the form is ours."""
    lm = ToyLM()
    lm.tokenizer.bos_token_id = 77
    beam = await (await ByteBeamState.initial(lm, BeamParams(2)) << ord("a"))
    assert "<77>|" in repr(beam)
    assert next(iter(beam)).context == (77,)


async def test_copies_share_the_model(tiny):
    beam = await (await ByteBeamState.initial(tiny, BeamParams(2))).prefill(b"An ")
    twin = copy.deepcopy(beam)
    assert repr(twin) == repr(beam)
    assert (await twin.logp_next())[97] == (await beam.logp_next())[97]
    assert copy.deepcopy(tiny) is copy.copy(tiny) is tiny
    assert repr(copy.copy(beam)) == repr(beam)
    llm = ByteLLM(tiny, BeamParams(2))
    assert await copy.copy(llm).prefix(b"An") == await llm.prefix(b"An")
    assert pickle.loads(pickle.dumps(beam.params)) == copy.deepcopy(beam.params) == beam.params


async def test_what_holds_a_model_says_why_it_is_not_pickled(tiny):
    beam = await (await ByteBeamState.initial(tiny, BeamParams(2))).prefill(b"An ")
    llm = ByteLLM(tiny, BeamParams(2))
    for thing in (tiny, beam, beam.lanes, beam.lanes.model, llm, llm * ByteRegex("a+")):
        with pytest.raises(TypeError, match="a language model is not pickled, nor what is made"):
            pickle.dumps(thing)
    assert pickle.loads(pickle.dumps(beam.candidates)) == beam.candidates


async def test_a_model_of_the_user_is_copied_and_pickled_without_its_engine():
    """A copy that shared the engine would answer with the weights of the original."""
    lm = ToyLM(seed=1)
    before = (await (await ByteBeamState.initial(lm, BeamParams(None))).prefill(b"ab")).logZ
    for twin in (copy.copy(lm), copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        assert (
            await (await ByteBeamState.initial(twin, BeamParams(None))).prefill(b"ab")
        ).logZ == (before)
        twin.seed = 2
        fresh = copy.copy(twin)
        after = await (await ByteBeamState.initial(fresh, BeamParams(None))).prefill(b"ab")
        assert after.logZ != before
    assert as_engine(lm) is as_engine(lm)


async def test_verbose_writes_each_beam(capsys):
    beam = await ByteBeamState.initial(ToyLM(), BeamParams(2, verbose=True))
    await (beam << ord("a"))
    assert "Candidates:" in capsys.readouterr().out


async def test_sampling_is_seeded(tiny):
    beam = await ByteBeamState.initial(tiny, BeamParams(3, 0.05))
    first = await beam.sample(b"The ", 12, seed=1)
    assert first == await beam.sample(b"The ", 12, seed=1)
    assert len({await beam.sample(b"The ", 12, seed=s) for s in range(5)}) > 1
    assert len(first) == 4 + 12
    assert len(await beam.sample(b"The ", 3)) == 7


async def test_cleanup_leaves_nothing(tiny):
    beam = await ByteBeamState.initial(tiny, BeamParams(2))
    assert await beam.cleanup() is None


# -- healing ---------------------------------------------------------------------------


async def test_healing_reads_what_no_candidate_can():
    lm = AbcdLM()
    beam = await read(await ByteBeamState.initial(lm, BeamParams(1)), b"abc")
    assert [c.partial for c in beam] == [b"abc"]
    healed = await (beam << ord("x"))
    assert healed.heals == 1
    path = [0, 1, 2, 3]
    rows = [lm.row([4, *path[:i]]) for i in range(4)]
    exact = sum(float(r[t]) for r, t in zip(rows, path, strict=True))
    assert healed.logZ == pytest.approx(exact, abs=1e-9)


async def test_a_byte_that_healing_would_rescue_does_not_read_as_impossible():
    """genlm-bytes 0.2: logp_next says -inf where << succeeds."""
    beam = await read(await ByteBeamState.initial(AbcdLM(), BeamParams(1)), b"abc")
    row = await beam.logp_next()
    assert row[ord("x")] > -math.inf
    assert row[ord("z")] == -math.inf
    assert np.exp(row.ps).sum() == pytest.approx(1)
    off = await read(await ByteBeamState.initial(AbcdLM(), BeamParams(1, heal=False)), b"abc")
    assert (await off.logp_next())[ord("x")] == -math.inf
    assert (await (off << ord("x"))).logZ == -math.inf


@pytest.mark.parametrize("limits", [{"heal_max_backoff": 0}, {"heal_max_splits": 1}])
async def test_healing_limits_hold_in_rows_and_steps_alike(limits):
    beam = await read(await ByteBeamState.initial(AbcdLM(), BeamParams(1, **limits)), b"abc")
    assert (await beam.logp_next())[ord("x")] == -math.inf
    assert (await (beam << ord("x"))).logZ == -math.inf


class DeadEndLM(ToyLM):
    """After "att", ending tokens only where one must leads to "tt", which is no token."""

    def __init__(self):
        super().__init__([b"a", b"t", b" ", b"attack", b"ttx"], seed=2)

    def row(self, context):
        likely = torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0], dtype=torch.float64)
        return torch.log_softmax(super().row(context) + likely, 0)


@pytest.mark.parametrize(
    ("limits", "reads"),
    [
        ({}, True),
        ({"heal_max_splits": 2}, True),
        ({"heal_max_splits": 1}, False),
        ({"heal_max_backoff": 2}, True),
        ({"heal_max_backoff": 1}, False),
    ],
)
async def test_healing_searches_where_the_greedy_spelling_dead_ends(limits, reads):
    """genlm-bytes 0.2 finds nothing: it reads on in "ttx", and "tt" cannot be ended."""
    lm = DeadEndLM()
    beam = await read(await ByteBeamState.initial(lm, BeamParams(1, 0.3, **limits)), b"att")
    beam = beam.prune()
    assert [c.partial for c in beam] == [b"att"]
    healed = await (beam << ord(" "))
    row = await beam.logp_next()
    assert (row[ord(" ")] > -math.inf) == reads
    assert healed.heals == reads
    if reads:
        path = [0, 1, 1, 2]
        rows = [lm.row([len(lm.byte_vocab) - 1, *path[:i]]) for i in range(4)]
        exact = sum(float(r[t]) for r, t in zip(rows, path, strict=True))
        assert healed.logZ == pytest.approx(exact, abs=1e-9)
    else:
        assert healed.logZ == -math.inf


async def test_no_text_dies_where_single_bytes_are_tokens(tiny):
    """The bundled model reads "lett" in "Bartlett" as the beginning of a longer token."""
    for threshold in (0.01, 0.05, 0.1):
        beam = await ByteBeamState.initial(tiny, BeamParams(5, threshold))
        beam = await beam.prefill(b"the Bartlett")
        assert (await (beam.prune() << ord(" "))).logZ > -math.inf


@pytest.mark.parametrize("limits", [{}, {"heal_max_splits": 1}, {"heal_max_backoff": 2}])
async def test_rescued_bytes_are_those_that_healing_reads(limits):
    """Random vocabularies without single bytes, so that much cannot be spelled."""
    rng = random.Random(3)
    seen = set()
    for seed in range(30):
        words = {bytes(rng.choices(b"abc", k=rng.randint(1, 4))) for _ in range(6)} | {b"abcab"}
        lm = ToyLM(sorted(words), seed=seed)
        beam = await ByteBeamState.initial(lm, BeamParams(1, 0.2, **limits))
        for byte in b"abca":
            beam = (await (beam << byte)).prune()
            if beam.logZ == -math.inf:
                break
            row = await beam.logp_next()
            for b in b"abc":
                read_on = await (beam << b)
                seen.add((row[b] > -math.inf, read_on.heals > beam.heals))
                if beam.dropped > -math.inf:
                    assert (row[b] > -math.inf) == (read_on.logZ > -math.inf), (words, b)
    assert {(True, True), (True, False), (False, False)} <= seen


async def test_rows_and_steps_agree_on_what_can_be_read(tiny):
    beam = await ByteBeamState.initial(tiny, BeamParams(2, 0.2))
    beam = (await beam.prefill(b"An app")).prune()
    row = await beam.logp_next()
    for byte in (*b"lxZ \n", 0x00, 0xE6, 0xFF):
        assert (row[byte] > -math.inf) == ((await (beam << byte)).logZ > -math.inf)


@pytest.mark.parametrize("limits", [(None, None), (2, None), (None, 1), (3, 2), (None, 0)])
@pytest.mark.parametrize("seed", range(4))
def test_what_healing_can_read_equals_all_spellings(seed, limits):
    rng = np.random.default_rng(seed)
    words = {bytes(rng.choice(list(b"abc"), size=rng.integers(1, 6)).tolist()) for _ in range(14)}
    words -= {b"a"} if seed % 2 else set()
    model = byte_model(ToyLM(sorted(words), seed=seed))
    backoff, most = limits
    rescues = Rescues(model.trie, (), backoff, most)
    for node in range(1, len(model.trie)):
        partial = model.trie.spell(node)
        least = 1 if backoff is None else max(1, len(partial) - backoff)
        expected = set()
        for byte in b"abc":
            for ends in cuts(len(partial)):
                parts = [partial[i:j] for i, j in zip((0, *ends), ends, strict=False)]
                tail = partial[ends[-1] :] + bytes([byte])
                fits = ends[0] >= least and (most is None or len(ends) - 1 <= most)
                if fits and words.issuperset(parts) and any(w.startswith(tail) for w in words):
                    expected.add(byte)
        rescues.learn(np.array([node]))
        assert set(np.flatnonzero(rescues.lines[rescues.line_of[node]])) == expected


def cuts(length):
    """Every ascending choice of at least one position from 1 to `length`."""
    places = range(1, length + 1)
    return [c for n in places for c in itertools.combinations(places, n)]


# -- what pruning loses ----------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_dropped_mass_bounds_the_truth(seed, threshold):
    lm = ToyLM(seed=seed)
    exact = await ByteBeamState.initial(lm, BeamParams(None))
    beam = await ByteBeamState.initial(lm, BeamParams(2, threshold))
    for byte in b"abcabba":
        exact, beam = await (exact << byte), (await (beam << byte)).prune()
        assert beam.logZ <= exact.logZ + 1e-12
        assert exact.logZ <= np.logaddexp(beam.logZ, beam.dropped) + 1e-12
    assert beam.dropped > -math.inf


async def test_counts_are_there(tiny):
    beam = await ByteBeamState.initial(tiny, BeamParams(2))
    before = beam.counts.rows
    await (await beam.prefill(b"Unheard-of text 31415")).logp_next()
    assert beam.counts.rows > before


# -- temperature, top-k, top-p ---------------------------------------------------------


async def test_transforms_act_on_tokens_before_bytes():
    lm = ToyLM(seed=2)
    p = np.exp(lm.row([9]).numpy())
    for transform, expected in (
        (RowTransform(temperature=2.0), p**0.5 / (p**0.5).sum()),
        (RowTransform(top_k=3), np.where(p >= np.sort(p)[-3], p, 0) / np.sort(p)[-3:].sum()),
        (RowTransform(top_p=1e-9), (p == p.max()).astype(float)),
    ):
        beam = await ByteBeamState.initial(lm, BeamParams(None), transform=transform)
        row = await beam.logp_next()
        starts_with_a = [t.startswith(b"a") for t in lm.tokens]
        mass = expected[starts_with_a].sum()
        assert np.exp(row[ord("a")]) == pytest.approx(mass, abs=1e-12)


@pytest.mark.parametrize(
    "bad", [{"temperature": 0}, {"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}]
)
def test_bad_transforms(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RowTransform(**bad)


# -- bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ({"K": 0}, ValueError, "K must be"),
        ({"K": -1}, ValueError, "K must be"),
        ({"K": 2.5}, TypeError, "K must be"),
        ({"K": True}, TypeError, "K must be"),
        ({"K": 1, "prune_threshold": 1}, ValueError, r"\[0, 1\)"),
        ({"K": 1, "prune_threshold": -0.1}, ValueError, r"\[0, 1\)"),
        ({"K": 1, "prune_threshold": math.nan}, ValueError, r"\[0, 1\)"),
        ({"K": 1, "prune_threshold": "x"}, TypeError, "must be a number"),
        ({"K": 1, "prune": "best"}, ValueError, '"unbiased" or "deferred"'),
        ({"K": 1, "seed": -1}, ValueError, "seed"),
        ({"K": 1, "seed": 2**64}, ValueError, "seed must be below"),
        ({"K": 1, "eos_byte_strings": 5}, TypeError, "list of bytes"),
        ({"K": 1, "heal_max_splits": -1}, ValueError, "heal_max_splits"),
        ({"K": 1, "eos_byte_strings": b"<e>"}, TypeError, "list of bytes"),
        ({"K": 1, "eos_byte_strings": ["<e>"]}, TypeError, "must hold bytes"),
        ({"K": 1, "eos_byte_strings": [b""]}, ValueError, "must not be empty"),
        ({"K": 1, "eos_byte_strings": [b"a"], "eos_tokens": [b"a"]}, TypeError, "not both"),
    ],
)
def test_bad_params(args, error, words):
    with pytest.raises(error, match=words):
        BeamParams(**args)


def test_numbers_of_other_kinds():
    """A threshold out of an array, say, is a number too."""
    params = BeamParams(np.int64(2), np.float32(0.25), seed=2**64 - 1)
    assert params == BeamParams(2, 0.25, seed=2**64 - 1)
    assert type(params.prune_threshold) is float


def test_the_old_name_of_eos_strings_still_works():
    with pytest.warns(DeprecationWarning, match="eos_byte_strings"):
        assert BeamParams(1, eos_tokens=[b"<e>"]).eos == {b"<e>"}


@pytest.mark.parametrize(
    ("byte", "error"), [(256, ValueError), (-1, ValueError), (b"a", TypeError), ("a", TypeError)]
)
async def test_bad_bytes(byte, error):
    beam = await ByteBeamState.initial(ToyLM(), BeamParams(2))
    with pytest.raises(error, match=r"0\.\.255"):
        await (beam << byte)


async def test_bad_calls():
    lm = ToyLM()
    with pytest.raises(ValueError, match="no token of the vocabulary is spelled b'<nope>'"):
        await ByteBeamState.initial(lm, BeamParams(2, eos_byte_strings=[b"<nope>"]))
    with pytest.raises(TypeError, match="must be a BeamParams"):
        await ByteBeamState.initial(lm, 5)
    with pytest.raises(ValueError, match="unknown trie options"):
        await ByteBeamState.initial(lm, BeamParams(2), {"colour": 1})
    with pytest.raises(TypeError, match="must be a RowTransform"):
        await ByteBeamState.initial(lm, BeamParams(2), transform=0.5)
    options = {"max_batch_size": 4, "device": "cpu", "eot_sentinel": None}
    given = dict(options)
    beam = await ByteBeamState.initial(lm, BeamParams(2, eos_byte_strings=[EOS_TOKEN]), options)
    assert options == given, "genlm-bytes 0.2 wrote into the caller's dict"
    with pytest.raises(TypeError, match="got str"):
        await beam.prefill("text")
    with pytest.raises(ValueError, match="steps"):
        await beam.greedy(b"a", -1)
    with pytest.raises(ValueError, match="draw must return"):
        await beam.sample(b"a", 1, draw=lambda p: None)


@pytest.mark.parametrize(
    ("start", "error", "words"),
    [
        ([], ValueError, "one or more token ids"),
        ([-1], ValueError, "at least 0"),
        ([8192], ValueError, "below 8192"),
        ("ab", TypeError, "token ids"),
    ],
)
async def test_bad_starts(tiny, start, error, words):
    with pytest.raises(error, match=words):
        await ByteBeamState.initial(tiny, BeamParams(2), start=start)
    with pytest.raises(error, match=words):
        load_model("tiny", start=start)


async def test_an_impossible_byte_leaves_an_empty_beam_and_clear_errors():
    beam = await ByteBeamState.initial(ToyLM(), BeamParams(2))
    dead = await (beam << ord("z"))
    assert dead.logZ == -math.inf
    assert len(dead) == 0
    assert (await (dead.prune() << ord("a"))).logZ == -math.inf
    with pytest.raises(ValueError, match="beam is empty"):
        await dead.logp_next()
    with pytest.raises(ValueError, match="beam is empty"):
        await beam.greedy(b"z", 1)


class Broken(ToyLM):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def row(self, context):
        row = super().row(context).clone()
        if self.kind == "nan":
            row[2] = math.nan
        elif self.kind == "inf":
            row[2] = math.inf
        elif self.kind == "dead":
            row[:] = -math.inf
        elif self.kind == "narrow":
            row = row[:-1]
        return row


@pytest.mark.parametrize(
    ("kind", "words"),
    [("nan", "NaN"), ("inf", r"\+inf"), ("dead", "no finite entry"), ("narrow", "width 9")],
)
async def test_rows_that_are_no_rows(kind, words):
    with pytest.raises(BadRowError, match=words):
        await ByteBeamState.initial(Broken(kind), BeamParams(2))


async def test_half_precision_rows_are_normalised():
    class Half(ToyLM):
        def row(self, context):
            return super().row(context).to(torch.bfloat16)

    beam = await ByteBeamState.initial(Half(), BeamParams(None))
    assert np.exp((await beam.logp_next()).ps).sum() == pytest.approx(1)
    assert (await (beam << ord("a"))).logZ < 0


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
async def test_pruning_inside_the_read_is_pruning_before_it(threshold, cached):
    """`prune` waits for what comes next, and `<<` does both in one call."""
    beam = await ByteBeamState.initial(ToyLM(seed=6), BeamParams(2, threshold))
    for byte in b"abcabba":
        if not cached:
            beam.lanes.model.store.clear()
        lanes = beam.lanes
        apart = await lanes.prune().read(byte)
        if not cached:
            beam.lanes.model.store.clear()
        beam = await (beam.prune() << byte)
        assert beam.lanes.log_z.tolist() == apart.log_z.tolist()
        assert beam.dropped == pytest.approx(float(apart.log_dropped[0]), abs=1e-12)
        for mine, other in zip(beam.lanes.state, apart.state, strict=True):
            np.testing.assert_array_equal(mine, other)


async def test_a_pruned_beam_shows_what_was_kept():
    beam = await (await ByteBeamState.initial(ToyLM(seed=6), BeamParams(2))).prefill(b"abcab")
    pruned = beam.prune()
    assert len(pruned) == 2 < len(beam)
    assert pruned.logZ == pytest.approx(float(beam.lanes.prune().log_z[0]), abs=1e-12)
    assert pruned.dropped > -math.inf
    assert [c.logw for c in pruned] == [c.logw for c in beam][:2]


def test_the_default_draw_is_that_of_genlm_bytes():
    rng = np.random.default_rng(4)
    for _ in range(50):
        row = dict(enumerate(rng.dirichlet(np.ones(20)) * (rng.random(20) < 0.5) + 1e-9))
        np.random.seed(seed := int(rng.integers(1 << 30)))
        want = peer_draw(row)
        np.random.seed(seed)
        assert sample_dict(row) == want
