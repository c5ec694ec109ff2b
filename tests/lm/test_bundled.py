"""The bundled model and its tokenizer without transformers, against transformers' own."""

import pytest
import torch
from genlm.backend.llm import AsyncLM
from genlm.backend.tokenization import decode_vocab

from genlm_bytes_smc.lm.bundled import Conv1D

TEXTS = ["", "An apple a day", " two  spaces\n\n", "naïve £ 漢字 🙂", "a<|endoftext|>b"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [False, True])
def test_a_text_is_cut_into_the_same_tokens(tiny, text, special):
    got = tiny.encoder.encode(text, add_special_tokens=special)
    assert got == tiny.tokenizer.encode(text, add_special_tokens=special)


def test_tokens_spell_the_same_and_mean_the_same(tiny):
    tokens, strings = decode_vocab(tiny.tokenizer)
    assert tiny.encoder.token_bytes() == [bytes(t) for t in tokens]
    assert (tiny.byte_vocab, tiny.str_vocab) == (tokens, strings)
    assert len(tiny.vocab) == len(tokens)
    for name in ("all_special_ids", "bos_token_id", "eos_token_id"):
        assert getattr(tiny.encoder, name) == getattr(tiny.tokenizer, name)
    assert tiny.eos_ids == (tiny.tokenizer.eos_token_id,)


def test_its_linear_layer_computes_what_transformers_does():
    from transformers.pytorch_utils import Conv1D as Theirs

    ours, theirs, x = Conv1D(5, 3), Theirs(5, 3), torch.randn(4, 3)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


async def test_what_an_async_lm_does_beside_rows(tiny):
    assert isinstance(tiny, AsyncLM)
    drawn = await tiny.sample(list(tiny.start), 3, [], seed=1)
    assert (await tiny.batch_sample([list(tiny.start)], 3, [], seed=1)) == [drawn]
    assert len(drawn) == 3
    with pytest.raises(NotImplementedError, match="add_new_lora"):
        tiny.add_new_lora("path", "name")
    with pytest.raises(RuntimeError, match="lora_name"):
        tiny.clear_lora()
