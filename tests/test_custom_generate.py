"""SMC as a generation recipe of transformers, called by the real `generate`."""

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from genlm_bytes_smc import ByteRegex
from genlm_bytes_smc.custom_generate import smc_generate


@pytest.fixture(scope="module")
def gpt2(tiny):
    torch.manual_seed(0)
    size = len(tiny.vocab)
    config = GPT2Config(
        vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=128,
        bos_token_id=tiny.start[0], eos_token_id=tiny.eos_ids and next(iter(tiny.eos_ids)),
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def test_generate_with_a_constraint(gpt2, tiny):
    """Ids that `generate` returns spell the prompt and a text of the constraint."""
    tokenizer = tiny.tokenizer
    ids = torch.tensor([tokenizer.encode("An apple"), tokenizer.encode("An apple")])
    results = []
    out = gpt2.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=smc_generate,
        smc_tokenizer=tokenizer,
        constraint=ByteRegex(" (yes|no)"),
        n_particles=4,
        max_bytes=6,
        smc_results=results,
        max_length=64,
        pad_token_id=0,
    )
    assert len(results) == 2
    for row, result in zip(out.tolist(), results, strict=True):
        spelled = b"".join(tiny.vocab[t] for t in row[ids.shape[1] :] if t not in tiny.eos_ids)
        assert re.match(rb" (yes|no)", spelled)
        assert any(spelled.startswith(text) for text in result.texts)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"repetition_penalty": 2.0}, "no logits processors, got"),
        ({"max_time": 0.1}, r"no stopping criteria, got \['MaxTimeCriteria'\]"),
    ],
)
def test_what_sees_tokens_one_by_one_is_refused(gpt2, tiny, options, told):
    """It has no place in a byte-level run; limits of the length are `generate`'s own."""
    ids = torch.tensor([tiny.tokenizer.encode("An")])
    with pytest.raises(ValueError, match=told):
        gpt2.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=smc_generate,
            smc_tokenizer=tiny.tokenizer,
            max_length=64,
            pad_token_id=0,
            **options,
        )
