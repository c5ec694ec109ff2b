"""Forwards written out against the model's own modules, and when they must not be used."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from genlm_bytes_smc.fast_path import FastPathWarning
from genlm_bytes_smc.lm import decoder as decoders
from genlm_bytes_smc.lm import devices as linears
from genlm_bytes_smc.lm.decoder import GPT2Decoder, LlamaDecoder, decoder_of
from genlm_bytes_smc.lm.devices import Linear, layout
from genlm_bytes_smc.lm.transformer import TreeTransformer
from tests.lm.families import (
    VOCAB,
    WRITTEN_OUT,
    distance,
    make_model,
    random_contexts,
    use_forward,
    whole_rows,
)


def rows_of(engine, contexts):
    return engine.rows_sync(np.array([engine.tree.insert(c) for c in contexts]))


def own_rows(engine, contexts):
    """The same rows by the model's own modules."""
    engine.clear_cache()
    use_forward(engine, "modules")
    rows = rows_of(engine, contexts)
    use_forward(engine, "written out")
    engine.clear_cache()
    return rows


def test_common_families_are_written_out():
    for family in WRITTEN_OUT:
        kind = GPT2Decoder if family == "gpt2" else LlamaDecoder
        assert type(decoder_of(make_model(family))) is kind


@pytest.mark.parametrize("layout", [None, "range", "listed", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_written_out_equals_modules(family, dtype, layout, tokenizer):
    model = make_model(family).to(dtype)
    engine = TreeTransformer(model, tokenizer)
    assert engine.forward == "written out"
    trunk = random_contexts(np.random.default_rng(1), [[5, 6, 7, 8, 9]], 1)[0]
    rows_of(engine, [trunk])
    forks = [[*trunk, t] for t in range(5)]
    expected = own_rows(engine, [trunk, *forks])
    rows_of(engine, [trunk])  # of one token and more, with nothing before
    engine._forward.layout = layout
    assert distance(rows_of(engine, forks), expected[1:]) < 1e-5
    assert distance(rows_of(engine, forks[:1]), expected[1:2]) < 1e-5


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_half_precision_is_as_near_as_the_modules(family, tokenizer):
    exact = make_model(family)
    half = TreeTransformer(copy.deepcopy(exact).to(torch.bfloat16), tokenizer)
    contexts = random_contexts(np.random.default_rng(2), [[1]], 6)
    truth = whole_rows(exact, contexts)
    modules = distance(own_rows(half, contexts), truth)
    assert distance(rows_of(half, contexts), truth) <= 1.5 * modules + 0.01


def test_a_watched_model_runs_by_its_modules(tokenizer):
    engine = TreeTransformer(make_model("llama"), tokenizer)
    seen = []
    handle = engine.model.register_forward_pre_hook(lambda *_: seen.append(1))
    assert engine.forward == "modules"
    with pytest.warns(FastPathWarning, match="LlamaForCausalLM .*'modules'.* watches or replaces"):
        rows_of(engine, [[3, 4]])
    rows_of(engine, [[3, 4, 5]])  # once an engine
    handle.remove()
    assert engine.forward == "written out"
    rows_of(engine, [[3, 5]])
    assert seen == [1, 1]


@pytest.mark.parametrize("part", ["model.layers.1.mlp", "model.layers.0.self_attn.q_proj"])
def test_hooks_inside_a_model_are_found(part):
    model = make_model("llama")
    model.get_submodule(part).register_forward_hook(lambda *_: None)
    assert decoder_of(model) == f"something watches or replaces the forward of {part}"


class Adapted(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


def test_adapters_are_found_and_obeyed_after_the_cache_is_cleared(tokenizer):
    model = make_model("llama")
    engine = TreeTransformer(model, tokenizer)
    before = rows_of(engine, [[3, 4, 5]])
    old = model.model.layers[0].mlp.up_proj
    new = Adapted(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.model.layers[0].mlp.up_proj = new
    engine.clear_cache()
    with pytest.warns(FastPathWarning, match=r"model.layers.0.mlp.up_proj is a .*\.Adapted"):
        after = rows_of(engine, [[3, 4, 5]])
    assert engine.forward == "modules"
    assert distance(after, whole_rows(model, [[3, 4, 5]])) < 1e-5
    assert distance(after, before) > 1e-3


def test_changed_weights_count_after_the_cache_is_cleared(tokenizer):
    model = make_model("gpt2")
    engine = TreeTransformer(model, tokenizer)
    rows_of(engine, [[3, 4, 5]])
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    engine.clear_cache()
    assert distance(rows_of(engine, [[3, 4, 5]]), whole_rows(model, [[3, 4, 5]])) < 1e-5


def test_a_wrong_decoder_is_found_out_and_the_cache_stays(tokenizer, monkeypatch):
    norm = decoders._layer_norm
    wrong = torch.linspace(-3, 3, 32)
    monkeypatch.setattr(decoders, "_layer_norm", lambda m: lambda x: norm(m)(x) + wrong)
    model = make_model("gpt2")
    with pytest.warns(FastPathWarning, match="'modules', as a small tree .* gave other rows"):
        engine = TreeTransformer(model, tokenizer)
    assert (engine.forward, engine.cached) == ("modules", True)
    contexts = random_contexts(np.random.default_rng(3), [[1]], 5)
    assert distance(rows_of(engine, contexts), whole_rows(model, contexts)) < 1e-5


@pytest.mark.parametrize("positions", [1, 2, 7, 40, 128, 129])
@pytest.mark.parametrize("sizes", [(700, 900), (5, 3), (16, 40000)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_equal_plain_ones(positions, sizes, bias, dtype):
    torch.manual_seed(0)
    into, out = sizes
    layers = [nn.Linear(into, n, bias=bias, dtype=dtype) for n in (out, 8)]
    x = torch.randn(positions, into, dtype=dtype)
    if layout(layers[0].weight) != "packed":
        pytest.skip("this processor has no such products")
    with torch.inference_mode():
        expected = torch.cat([m(x) for m in layers], dim=1)
        for packed in (True, False):
            torch.testing.assert_close(Linear(layers, packed)(x), expected)


def test_few_numbers_of_positions_occur_in_packed_products(monkeypatch):
    """Each costs memory for good: oneDNN compiles a product for it."""
    seen, apply = set(), linears._apply

    def noted(x, *args):
        seen.add(len(x))
        return apply(x, *args)

    monkeypatch.setattr(linears, "_apply", noted)
    layer = Linear([nn.Linear(1000, 600)], True)
    with torch.inference_mode():
        for positions in range(1, 300):
            assert layer(torch.zeros(positions, 1000)).shape == (positions, 600)
    assert len(seen) <= 13 and max(seen) <= 128


def test_only_what_a_cpu_lays_out_is_packed():
    assert layout(torch.zeros(2, 2)) == "packed"
    for weight in (torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, device="meta")):
        assert (layout(weight), layout(weight).lost) == ("plain", False)


def test_the_copy_of_the_weights_has_a_limit(tokenizer):
    engine = TreeTransformer(make_model("llama"), tokenizer)
    before = rows_of(engine, [[1, 2], [1, 3]])
    assert "weights packed" in engine.forward.reason
    engine.pack_bytes = 1000
    engine.clear_cache()
    assert distance(rows_of(engine, [[1, 2], [1, 3]]), before) < 1e-5
    assert "weights plain: they take" in engine.forward.reason
    assert not engine.forward.lost


def test_vocabulary_is_whole(tokenizer):
    engine = TreeTransformer(make_model("qwen3"), tokenizer)
    assert rows_of(engine, [[1, 2]]).shape == (1, VOCAB)


# -- paths that are lost ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_forward_written_out_depends_on_no_argument_of_the_model(family, tokenizer, monkeypatch):
    """As when transformers 5.24 renamed the cache: nothing is lost, and nothing is said."""
    model = make_model(family)
    forward = type(model).forward

    def renamed(self, input_ids, attention_mask=None, logits_to_keep=0, use_cache=None):
        return forward(
            self, input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep
        )

    monkeypatch.setattr(type(model), "forward", renamed)
    engine = TreeTransformer(model, tokenizer)
    assert engine.forward == "written out"
    contexts = random_contexts(np.random.default_rng(4), [[1]], 5)
    assert distance(rows_of(engine, contexts), whole_rows(model, contexts)) < 1e-5


def test_modules_that_are_built_otherwise_are_told_of(tokenizer):
    model = make_model("llama")
    model.model.layers[1].mlp.act = model.model.layers[1].mlp.act_fn
    del model.model.layers[1].mlp.act_fn
    assert "no attribute 'act_fn'" in decoder_of(model)


def test_weights_that_cannot_be_packed_though_they_should_are_told_of(tokenizer, monkeypatch):
    def gone(weight):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder'")

    monkeypatch.setattr(linears, "_reorder", gone)
    linears._tried.cache_clear()
    try:
        with pytest.warns(FastPathWarning, match="weights plain: oneDNN's products fail"):
            engine = TreeTransformer(make_model("llama"), tokenizer)
        assert (engine.forward, engine.forward.lost) == ("written out", True)
        rows_of(engine, [[1, 2]])  # said once
    finally:
        linears._tried.cache_clear()


def test_packing_that_this_machine_never_had_is_not_warned_of(tokenizer, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    linears._tried.cache_clear()
    try:
        engine = TreeTransformer(make_model("llama"), tokenizer)
        assert engine.forward.reason.endswith("this build of torch has no oneDNN")
        assert not engine.forward.lost
    finally:
        linears._tried.cache_clear()
