"""TreeTransformer against whole forwards, its counts and its limits."""

import inspect
import pickle
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import XLNetConfig, XLNetLMHeadModel

from genlm_bytes_smc.fast_path import FastPathWarning
from genlm_bytes_smc.lm.engine import ContextTooLongError
from genlm_bytes_smc.lm.rows import BadRowError
from genlm_bytes_smc.lm.transformer import TreeTransformer
from genlm_bytes_smc.lm.tree_forward import Architecture
from tests.lm.families import (
    CACHED,
    SLIDING,
    UNCACHED,
    VOCAB,
    WINDOW,
    WINDOWED,
    distance,
    forward_of,
    make_engine,
    make_model,
    random_contexts,
    whole_rows,
)

TOLERANCE = 1e-4
LAYOUTS = (None, "range", "listed")


def insert(engine, contexts):
    return np.array([engine.tree.insert(c) for c in contexts], dtype=np.int64)


def rows_of(engine, contexts):
    return engine.rows_sync(insert(engine, contexts))


def branches(rng, count, length, trunk=()):
    return [[*trunk, *rng.integers(0, VOCAB, size=length).tolist()] for _ in range(count)]


class ModelCalls:
    """Counts the calls of a model while it stands in for its forward, so that its modules run."""

    def __init__(self, engine):
        engine._told_forward = True
        self.forward, self.inputs = engine.model.forward, []
        self.patch = patch.object(engine.model, "forward", self)

    def __call__(self, *args, **kwargs):
        self.inputs.append(kwargs)
        return self.forward(*args, **kwargs)

    def __enter__(self):
        self.patch.__enter__()
        return self.inputs

    def __exit__(self, *exc):
        return self.patch.__exit__(*exc)


# -- rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CACHED)
def test_rows_equal_whole_forwards_on_random_trees(family, tokenizer):
    model = make_model(family)
    engine = make_engine(model, tokenizer)
    assert engine.cached
    rng = np.random.default_rng(0)
    known = [[1]]
    for step in range(12):
        if step == 5:
            engine.clear_cache()
            engine._forward.limit_slots = 30  # evictions and compactions from here on
        if step == 3:
            engine.tree.collect()
        engine._forward.layout = LAYOUTS[step % 3]
        asked = random_contexts(rng, known, int(rng.integers(1, 5)), longest=25)
        known = known[-20:]
        assert distance(rows_of(engine, asked), whole_rows(model, asked)) < TOLERANCE
    assert engine.counts.evicted > 0 or engine._architecture.reach


@pytest.mark.parametrize("family", CACHED)
def test_gathered_and_packed_plans_agree(family, tokenizer):
    model = make_model(family)
    rng = np.random.default_rng(1)
    trunk = rng.integers(0, VOCAB, size=3).tolist()
    parents = [*branches(rng, 3, 2, trunk), *branches(rng, 2, 11), *branches(rng, 1, 1)]
    children = [[*p, 7] for p in parents]
    want = whole_rows(model, children)
    for layout in (None, "range", "listed", "rows"):
        engine = make_engine(model, tokenizer)
        rows_of(engine, parents)
        engine._forward.layout = layout
        assert distance(rows_of(engine, children), want) < TOLERANCE
        again = rows_of(engine, children)  # entries exist: only rows are computed again
        assert distance(again, want) < TOLERANCE


@pytest.mark.parametrize("family", WINDOWED)
def test_sliding_windows_go_by_depth(family, tokenizer):
    model = make_model(family)
    engine = TreeTransformer(model, tokenizer)
    rng = np.random.default_rng(2)
    # Strangers lie in the buffer between a context and its ancestors.
    lanes = branches(rng, 3, 2)
    for _ in range(2 * SLIDING):
        lanes = [[*lane, int(rng.integers(VOCAB))] for lane in lanes]
        assert distance(rows_of(engine, lanes), whole_rows(model, lanes)) < TOLERANCE
    # And the window does matter here: without it rows are others.
    cut = [lane[-2:] for lane in lanes]
    assert distance(whole_rows(model, cut), whole_rows(model, lanes)) > 0.1


@pytest.mark.parametrize("family", UNCACHED)
def test_models_without_a_tree_cache_are_found_out(family, tokenizer):
    model = make_model(family)
    engine = TreeTransformer(model, tokenizer)
    assert not engine.cached
    rng = np.random.default_rng(3)
    known = [[1]]
    for _ in range(4):
        asked = random_contexts(rng, known, 4)
        assert distance(rows_of(engine, asked), whole_rows(model, asked)) < TOLERANCE
    assert engine.memory()["bytes"] == 0


def test_model_that_ignores_its_mask_is_found_out(tokenizer):
    model = make_model("gpt2")
    forward = model.forward

    def careless(attention_mask=None, **kwargs):
        return forward(**kwargs)

    careless.__signature__ = __import__("inspect").signature(forward)
    model.forward = careless
    with pytest.warns(FastPathWarning, match="'whole', as something watches .* other rows than"):
        engine = TreeTransformer(model, tokenizer)
    assert not engine.cached


@pytest.mark.parametrize("layout", [None, "range", "listed", "rows"])
def test_long_contexts_side_by_side(tokenizer, layout):
    config = make_model("gpt2").config
    config.n_positions = 1100
    model = type(make_model("gpt2"))(config).eval()
    engine = TreeTransformer(model, tokenizer)
    rng = np.random.default_rng(8)
    lanes = branches(rng, 3, 1000)  # whole blocks of keys are masked for the later ones
    assert distance(rows_of(engine, lanes), whole_rows(model, lanes)) < TOLERANCE
    engine._forward.layout = layout
    steps = [[*lane, 5] for lane in lanes]
    assert distance(rows_of(engine, steps), whole_rows(model, steps)) < TOLERANCE
    assert (engine.counts.forwards, engine.counts.positions) == (2, 3003)


def test_rows_asked_again_leave_the_cache_as_it_was(engine, gpt2):
    contexts = [[1, 5, 6], [1, 5, 7], [1, 5, 6, 8]]
    first = rows_of(engine, contexts)
    entries = engine.memory()["entries"]
    for _ in range(3):
        assert distance(rows_of(engine, contexts[::-1]).flip(0), first) < 1e-5
    assert engine.memory()["entries"] == entries
    child = [[1, 5, 6, 8, 9]]
    assert distance(rows_of(engine, child), whole_rows(gpt2, child)) < TOLERANCE


def test_duplicates_and_order_of_a_request(engine, gpt2):
    contexts = [[1, 9], [1], [1, 9], [1, 4, 4], [1]]
    rows = rows_of(engine, contexts)
    assert distance(rows, whole_rows(gpt2, contexts)) < TOLERANCE
    assert engine.counts.rows == 3


def test_rows_are_ordinary_tensors(engine):
    row = rows_of(engine, [[1, 2]])
    row[0, 0] = 0.0  # an inference tensor would refuse
    assert row.dtype == torch.float32


def test_no_contexts_give_no_rows(engine):
    assert engine.rows_sync(np.zeros(0, dtype=np.int64)).shape == (0, VOCAB)
    assert engine.counts.forwards == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_half_precision_models_give_float32_rows(family, dtype, tokenizer):
    model = make_model(family).to(dtype)
    engine = TreeTransformer(model, tokenizer)
    assert engine.cached
    rows = rows_of(engine, [[1, 5], [1, 5, 6], [1, 7]])
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.exp().sum(1), torch.ones(3), atol=1e-5)
    want = whole_rows(model, [[1, 5], [1, 5, 6], [1, 7]]).float()
    assert float((rows.exp() - want.exp()).abs().sum(1).max()) < 0.1


# -- which forward runs ----------------------------------------------------------------


@pytest.mark.parametrize("family", [*CACHED, *UNCACHED])
def test_each_family_runs_by_the_forward_that_it_should(family, tokenizer):
    engine = make_engine(make_model(family), tokenizer)
    assert engine.forward == forward_of(family)
    assert engine.cached == (forward_of(family) != "whole")
    assert engine.forward.reason
    assert engine.forward.lost == (family == "gpt2-eager")


def test_the_forward_is_a_string_that_keeps_its_reason(engine):
    way = pickle.loads(pickle.dumps(engine.forward))
    assert (way, way.reason, way.lost) == (engine.forward, engine.forward.reason, False)
    assert f"{way}" == "written out"


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_keys_and_values_are_passed_by_the_name_that_the_forward_takes(
    name, tokenizer, monkeypatch
):
    model = make_model("gemma")
    forward, takes = type(model).forward, inspect.signature(model.forward).parameters
    known = "cache" if "cache" in takes else "past_key_values"

    def renamed(self, *args, **kwargs):
        if name in kwargs:
            kwargs[known] = kwargs.pop(name)
        return forward(self, *args, **kwargs)

    renamed.__signature__ = inspect.Signature(
        [p.replace(name=name if p.name == known else p.name) for p in takes.values()]
    )
    monkeypatch.setattr(type(model), "forward", renamed)
    assert TreeTransformer(model, tokenizer).forward == "modules"


def test_a_family_that_loses_its_cache_is_told_of_once(tokenizer, monkeypatch):
    """As all families did when transformers 5.24 renamed the argument."""
    model = make_model("gemma")
    forward = type(model).forward

    def renamed(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, kv=None):
        return forward(self, input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", renamed)
    cause = "Gemma.*'whole', as its forward takes no argument cache or past_key_values"
    with pytest.warns(FastPathWarning, match=cause) as told:
        engine = TreeTransformer(model, tokenizer)
    assert len(told) == 1
    asked = [[1, 5], [1, 5, 6]]
    assert distance(rows_of(engine, asked), whole_rows(model, asked)) < TOLERANCE


# -- counts ----------------------------------------------------------------------------


def test_a_prompt_is_one_forward_and_so_is_a_step_of_many_lanes(gpt2, tokenizer):
    engine = TreeTransformer(gpt2, tokenizer)
    rng = np.random.default_rng(4)
    prompt = [1, *rng.integers(0, VOCAB, size=20).tolist()]
    with ModelCalls(engine) as calls:
        rows_of(engine, [prompt])
        assert (engine.counts.forwards, engine.counts.positions) == (1, 21)
        lanes = [[*prompt, t] for t in range(40)]
        rows_of(engine, lanes)
        assert (engine.counts.forwards, engine.counts.positions) == (2, 61)
        rows_of(engine, [[*lanes[0], 1, 2], [*lanes[1], 3]])
        assert (engine.counts.forwards, engine.counts.positions) == (3, 64)
        assert len(calls) == 3
    assert engine.counts.rows == 43
    assert engine.counts.evicted == 0


def test_the_head_is_applied_only_where_a_row_is_asked(gpt2, tokenizer):
    engine = TreeTransformer(gpt2, tokenizer)
    sizes = []
    engine._told_forward = True
    handle = gpt2.lm_head.register_forward_hook(lambda m, i, o: sizes.append(o.shape[1]))
    rows_of(engine, [[1, 5, 6, 7, 8]])
    handle.remove()
    assert sizes == [1]


def test_every_row_of_a_prompt_is_one_forward(engine, gpt2):
    prompt = [1, 5, 6, 7, 8, 9]
    prefixes = [prompt[:n] for n in range(1, 7)]
    assert distance(rows_of(engine, prefixes), whole_rows(gpt2, prefixes)) < TOLERANCE
    assert (engine.counts.forwards, engine.counts.positions) == (1, 6)


def test_making_an_engine_counts_nothing(engine):
    assert engine.counts.forwards == engine.counts.rows == engine.counts.positions == 0
    assert engine.memory() == {"entries": 0, "bytes": 0, "evicted": 0}
    assert len(engine.tree) == 1


def test_a_plain_chain_needs_no_mask(gpt2, tokenizer):
    engine = TreeTransformer(gpt2, tokenizer)
    with ModelCalls(engine) as calls:
        rows_of(engine, [[1, 5, 6, 7]])
        rows_of(engine, [[1, 5, 6, 7, 8]])
        rows_of(engine, [[1, 5, 6, 7, 8, 9, 10]])
    assert [c["attention_mask"] is None for c in calls] == [True, True, False]


# -- limits ----------------------------------------------------------------------------


def test_a_context_beyond_the_window_is_refused_before_the_model_runs(engine):
    rows_of(engine, [[1] * WINDOW])
    engine.counts.reset()
    with pytest.raises(ContextTooLongError, match=f"{WINDOW + 1} tokens.*window of {WINDOW}"):
        rows_of(engine, [[1] * (WINDOW + 1)])
    assert engine.counts.forwards == 0


def test_the_empty_context_is_refused(engine):
    with pytest.raises(ValueError, match="at least one token"):
        engine.rows_sync(np.array([0]))


@pytest.mark.parametrize("limit_slots", [30, 70])
def test_memory_stays_under_the_limit_over_a_long_walk(gpt2, tokenizer, limit_slots):
    slot = 2 * 2 * 32 * 4  # layers, keys and values, width, bytes of a float
    limit = limit_slots * slot
    engine = TreeTransformer(gpt2, tokenizer, limit_bytes=limit)
    rng = np.random.default_rng(5)
    known = [[1]]
    for step in range(40):
        asked = random_contexts(rng, known, 3, longest=12)
        known = known[-15:]
        rows = rows_of(engine, asked)
        assert engine.memory()["bytes"] <= limit
        if step % 10 == 0:
            assert distance(rows, whole_rows(engine.model, asked)) < TOLERANCE
    assert engine.counts.evicted > 0


def test_requests_larger_than_the_cache_are_still_answered(gpt2, tokenizer):
    engine = TreeTransformer(gpt2, tokenizer, limit_bytes=20 * 512)
    rng = np.random.default_rng(6)
    together = branches(rng, 6, 5)  # 30 entries in all: in several forwards
    assert distance(rows_of(engine, together), whole_rows(gpt2, together)) < TOLERANCE
    assert engine.memory()["bytes"] <= 20 * 512
    alone = branches(rng, 1, 30)  # no room for one: without the cache
    with pytest.warns(FastPathWarning, match="context of 30 tokens .* limit_bytes=10,240"):
        rows = rows_of(engine, alone)
    assert distance(rows, whole_rows(gpt2, alone)) < TOLERANCE
    assert distance(rows_of(engine, alone), rows) < TOLERANCE  # said once


def test_reachable_and_recent_contexts_outlive_the_others(gpt2, tokenizer):
    engine = TreeTransformer(gpt2, tokenizer, limit_bytes=40 * 768)
    assert engine._forward.limit_slots == 40
    kept, lost = [1, *range(20, 30)], [1, *range(40, 50)]
    node = insert(engine, [kept])
    with engine.tree.pinned(node):
        rows_of(engine, [kept])
        rows_of(engine, [lost])
        rows_of(engine, [[1, *range(60, 80)]])
        assert engine.counts.evicted > 0
        engine.counts.reset()
        rows_of(engine, [[*kept, 5]])
        assert engine.counts.positions == 1
        rows_of(engine, [[*lost, 5]])
        assert engine.counts.positions > 2


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_large_requests_are_cut_by_the_bytes_of_their_logits(family, tokenizer):
    model = make_model(family)
    engine = TreeTransformer(model, tokenizer)
    engine._told_forward = True
    engine.logit_bytes = 4 * engine._row_bytes
    prompt = list(range(1, 20))
    prefixes = [prompt[:n] for n in range(1, 20)]
    largest = []
    handle = model.lm_head.register_forward_hook(
        lambda m, i, o: largest.append(o.shape[0] * o.shape[1])
    )
    rows = rows_of(engine, prefixes)
    handle.remove()
    assert distance(rows, whole_rows(model, prefixes)) < TOLERANCE
    assert max(largest) <= 4
    assert engine.counts.forwards == len(largest) >= 5
    if engine.cached:
        assert (engine.counts.forwards, engine.counts.positions) == (5, 19)


def test_masks_are_cut_by_their_bytes(engine, gpt2):
    engine.mask_bytes = 4 * 30 * 10  # ten positions against thirty
    rng = np.random.default_rng(7)
    contexts = branches(rng, 3, 10)
    assert distance(rows_of(engine, contexts), whole_rows(gpt2, contexts)) < TOLERANCE
    assert (engine.counts.forwards, engine.counts.positions) == (3, 30)


def test_cleared_and_closed_engines_still_answer(engine, gpt2):
    contexts = [[1, 5, 6], [1, 5, 7]]
    want = rows_of(engine, contexts)
    for end in (engine.clear_cache, engine.close, engine.cleanup):
        end()
        assert engine.memory()["bytes"] == engine.memory()["entries"] == 0
        assert distance(rows_of(engine, contexts), want) < 1e-5


# -- errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_logits_are_named(gpt2, tokenizer, bad):
    engine = TreeTransformer(gpt2, tokenizer)
    engine._told_forward = True

    def spoil(module, inputs, output):
        output[..., 3] = bad
        return output

    handle = gpt2.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(BadRowError, match=r"in 2 of 2 rows \(contexts of 3, 4 tokens\)"):
            rows_of(engine, [[1, 5, 6], [1, 5, 6, 7]])
    finally:
        handle.remove()


def test_rows_narrower_than_the_vocabulary_are_refused(tokenizer):
    config = make_model("gpt2").config
    config.vocab_size = 200
    model = type(make_model("gpt2"))(config)
    with pytest.raises(ValueError, match=f"width 200.*up to {VOCAB - 1}"):
        TreeTransformer(model, tokenizer)


def test_wider_rows_are_padding(tokenizer):
    config = make_model("gpt2").config
    config.vocab_size = VOCAB + 30
    engine = TreeTransformer(type(make_model("gpt2"))(config), tokenizer)
    assert rows_of(engine, [[1]]).shape == (1, VOCAB + 30)
    assert engine.width == VOCAB + 30


def test_a_failing_forward_leaves_the_engine_usable(gpt2, tokenizer):
    engine = TreeTransformer(gpt2, tokenizer)
    engine._told_forward = True
    rows_of(engine, [[1, 5]])
    with (
        patch.object(gpt2, "forward", side_effect=RuntimeError("out of memory")),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        rows_of(engine, [[1, 5, 6, 7]])
    assert engine.memory()["entries"] == 2
    assert distance(rows_of(engine, [[1, 5, 6]]), whole_rows(gpt2, [[1, 5, 6]])) < TOLERANCE


def test_a_limit_must_be_positive(gpt2, tokenizer):
    with pytest.raises(ValueError, match="limit_bytes must be positive"):
        TreeTransformer(gpt2, tokenizer, limit_bytes=0)


def test_a_model_whose_positions_see_later_ones_is_refused(tokenizer):
    model = make_model("gemma3")
    model.config.use_bidirectional_attention = True
    with pytest.raises(ValueError, match="expected a causal language model"):
        TreeTransformer(model, tokenizer)


def test_a_model_that_says_it_has_no_window_has_none():
    config = XLNetConfig(vocab_size=300, d_model=8, n_layer=1, n_head=2, d_inner=8)
    assert Architecture(XLNetLMHeadModel(config)).window is None
