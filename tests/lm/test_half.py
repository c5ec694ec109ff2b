"""Half-precision models: everything after the model is summed in float32 or better."""

import asyncio

import numpy as np
import pytest
import torch

from genlm_bytes_smc.lm.rows import RowStore
from genlm_bytes_smc.lm.transformer import TreeTransformer
from genlm_bytes_smc.trie import TokenTrie, Vocabulary
from tests.lm.families import make_model, use_forward

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
CONTEXTS = [[1, 5], [1, 5, 9], [1, 7, 8, 9, 10]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_are_the_softmax_of_the_logits_in_full_precision(family, dtype, device, tokenizer):
    model = make_model(family).to(device, dtype)
    engine = TreeTransformer(model, tokenizer)
    use_forward(engine, "whole")  # so that the logits are the same to the bit
    rows = engine.batch_next_token_logprobs_sync(CONTEXTS)
    assert rows.dtype == torch.float32
    assert engine.model.dtype == dtype
    for row, context in zip(rows, CONTEXTS, strict=True):
        with torch.no_grad():
            ids = torch.tensor([context], device=device)
            logits = engine.model(ids, use_cache=False).logits[0, -1]
        assert logits.dtype == dtype
        exact = torch.log_softmax(logits.double(), dim=-1)
        # Padding of the batch may change a logit's last bit, of 8 or 11; a sum in half
        # precision would be off by more, and all of one sign.
        apart = row.double() - exact
        assert float(apart.abs().max()) < (0.13 if dtype == torch.bfloat16 else 0.02)
        assert abs(float(row.double().exp().sum()) - 1) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_rows_sum_to_one_in_double_precision(dtype, device, tokenizer):
    engine = TreeTransformer(make_model("llama").to(device, dtype), tokenizer)
    store = RowStore(engine, TokenTrie.build(Vocabulary.from_tokens(engine.byte_vocab)))
    nodes = np.array([engine.tree.insert(c) for c in CONTEXTS])
    with engine.tree.pinned(nodes):
        asyncio.run(store.ensure(nodes))
        slots, rows = store.slot_of[nodes], store.host
        sums = rows.probs[slots][:, rows.order].sum(axis=1) * rows.scale[slots]
    assert rows.probs.dtype == np.float64
    assert np.abs(sums - 1).max() < 1e-6
