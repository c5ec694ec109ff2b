"""Forwards written out against the model's own modules, and when they must not be used."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from genlm_bytes_smc.lm import decoder as decoders
from genlm_bytes_smc.lm import linear as linears
from genlm_bytes_smc.lm.decoder import GPT2Decoder, LlamaDecoder, decoder_of
from genlm_bytes_smc.lm.linear import Linear, can_pack
from genlm_bytes_smc.lm.transformer import TreeTransformer
from tests.lm.families import VOCAB, distance, make_model, random_contexts, whole_rows

KNOWN = {
    "gpt2": GPT2Decoder,
    "llama": LlamaDecoder,
    "mistral": LlamaDecoder,
    "qwen2": LlamaDecoder,
    "qwen2-mixed": LlamaDecoder,
    "qwen3": LlamaDecoder,
}
UNKNOWN = ("gpt2-eager", "phi3", "gemma2", "gemma3", "gpt-oss", "mamba")


def rows_of(engine, contexts):
    return engine.rows_sync(np.array([engine.tree.insert(c) for c in contexts]))


def own_rows(engine, contexts):
    """The same rows by the model's own modules."""
    engine.clear_cache()
    engine._forward.direct = False
    rows = rows_of(engine, contexts)
    engine._forward.direct = True
    engine.clear_cache()
    return rows


def test_common_families_are_written_out():
    assert {f: type(decoder_of(make_model(f))) for f in KNOWN} == KNOWN


@pytest.mark.parametrize("family", UNKNOWN)
def test_other_models_keep_their_modules(family):
    assert decoder_of(make_model(family)) is None


@pytest.mark.parametrize("layout", [None, "range", "listed", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", KNOWN)
def test_written_out_equals_modules(family, dtype, layout, tokenizer):
    model = make_model(family).to(dtype)
    engine = TreeTransformer(model, tokenizer)
    assert engine._forward.decoder is not None
    trunk = random_contexts(np.random.default_rng(1), [[5, 6, 7, 8, 9]], 1)[0]
    rows_of(engine, [trunk])
    forks = [[*trunk, t] for t in range(5)]
    expected = own_rows(engine, [trunk, *forks])
    rows_of(engine, [trunk])  # of one token and more, with nothing before
    engine._forward.layout = layout
    assert distance(rows_of(engine, forks), expected[1:]) < 1e-5
    assert distance(rows_of(engine, forks[:1]), expected[1:2]) < 1e-5


@pytest.mark.parametrize("family", KNOWN)
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
    rows_of(engine, [[3, 4]])
    handle.remove()
    rows_of(engine, [[3, 5]])
    assert seen == [1]


@pytest.mark.parametrize("part", ["model.layers.1.mlp", "model.layers.0.self_attn.q_proj"])
def test_hooks_inside_a_model_are_found(part):
    model = make_model("llama")
    model.get_submodule(part).register_forward_hook(lambda *_: None)
    assert decoder_of(model) is None


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
    after = rows_of(engine, [[3, 4, 5]])
    assert engine._forward.decoder is None
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
    monkeypatch.setattr(
        decoders.GPT2Decoder, "last", lambda self, x: self._norm(x) + torch.linspace(-3, 3, 32)
    )
    model = make_model("gpt2")
    engine = TreeTransformer(model, tokenizer)
    assert engine.cached
    assert engine._forward.decoder is None
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
    if not can_pack(layers[0].weight):
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
    assert can_pack(torch.zeros(2, 2))
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float64))
    assert not can_pack(torch.zeros(2, 2, device="meta"))


def test_the_copy_of_the_weights_has_a_limit(tokenizer):
    engine = TreeTransformer(make_model("llama"), tokenizer)
    before = rows_of(engine, [[1, 2], [1, 3]])
    assert engine._forward.decoder.packed
    engine.pack_bytes = 1000
    engine.clear_cache()
    assert distance(rows_of(engine, [[1, 2], [1, 3]]), before) < 1e-5
    assert not engine._forward.decoder.packed


def test_vocabulary_is_whole(tokenizer):
    engine = TreeTransformer(make_model("qwen3"), tokenizer)
    assert rows_of(engine, [[1, 2]]).shape == (1, VOCAB)
