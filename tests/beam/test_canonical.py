"""The tokenizer's own tokens of a text, which `prefill` guesses rows by: they only cost."""

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers

from genlm_bytes_smc import (
    BeamParams,
    ByteBeamState,
    ByteModel,
    FastPathWarning,
    RowTransform,
    as_engine,
    byte_model,
)
from tests.toys import ToyLM

WORDS = ["the", "cat", "sat", "on", "mat"]


def sentencepiece(prepend: bool) -> tf.PreTrainedTokenizerFast:
    """Byte fallback and spaces as `▁`; with `prepend` one before each text (as in Llama 2),
    without none (as in Gemma)."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for name in [*(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "é"]:
        vocab[name] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for i in range(len(word)):
            pair = "▁" + word[:i], word[i]
            if pair not in merges:
                merges.append(pair)
                vocab["".join(pair)] = len(vocab)
    bpe = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(bpe)
    space = normalizers.Replace(" ", "▁")
    before = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*before, space])
    after = [decoders.Strip(" ", 1, 0)] if prepend else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


class Follows(ToyLM):
    """All but certain to go on as the tokenizer cuts `text`."""

    def __init__(self, tokenizer, text: str):
        self.model = byte_model(sentencepiece_llama(tokenizer))
        super().__init__([bytes(t) for t in self.model.engine.byte_vocab])
        self.tokenizer = tokenizer
        self.path = (1, *self.model.canonical(text.encode()))

    def row(self, context):
        logits = np.zeros(len(self.tokens))
        if tuple(context) == self.path[: len(context)] and len(context) < len(self.path):
            logits[self.path[len(context)]] = 20.0
        return torch.log_softmax(torch.as_tensor(logits), 0)


def sentencepiece_llama(tokenizer):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer) + 5,  # a padded head
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    from genlm.backend.llm import AsyncTransformer

    return as_engine(AsyncTransformer(tf.LlamaForCausalLM(config).eval(), tokenizer))


@pytest.mark.parametrize("prepend", [True, False])
def test_sentencepiece_tokens_spell_the_text_whatever_it_begins_with(prepend):
    model = byte_model(sentencepiece_llama(sentencepiece(prepend)))
    for text in (" the cat sat", "the cat", "t", " ", "\nthe cat\n", "  the", "é on", "日本 the"):
        tokens = model.canonical(text.encode())
        assert b"".join(model.vocab[t] for t in tokens) == text.encode(), text
    the_cat = [model.vocab.ids_of(w)[0] for w in (b" the", b" cat")]
    assert model.canonical(b" the cat") == the_cat
    assert model.canonical(b"") == []


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (b" the cat\xff sat", b" the cat"),
        (" the café".encode()[:-1], b" the caf"),  # a character that is cut
        (b"\xff the", b""),
    ],
)
@pytest.mark.parametrize("prepend", [True, False])
def test_tokens_up_to_what_is_no_text(prepend, text, known):
    model = byte_model(sentencepiece_llama(sentencepiece(prepend)))
    assert b"".join(model.vocab[t] for t in model.canonical(text)) == known


def test_a_tokenizer_that_changes_the_text_is_followed_as_far_as_it_keeps_it(tiny):
    class Lower:
        bos_token_id = 8191

        def encode(self, text, add_special_tokens=True):
            return tiny.tokenizer.encode(text.lower(), add_special_tokens=False)

    lm = ToyLM([bytes(t) for t in tiny.byte_vocab])
    lm.tokenizer = Lower()
    model = byte_model(lm)
    assert b"".join(model.vocab[t] for t in model.canonical(b"the cat Sat")) in (
        b"the cat",
        b"the cat ",
    )


@pytest.mark.parametrize(
    ("encode", "cause"),
    [
        ("fail", r"encode fails \(TypeError: .*add_special_tokens"),
        ("beyond", "encode gave 9999 for a token, of 8192"),
        ("words", "encode gave 'the' for a token"),
    ],
)
async def test_a_tokenizer_that_guesses_nothing_is_told_of_once(encode, cause, tiny):
    class Broken:
        bos_token_id = 8191

        def encode(self, text, **options):
            if encode == "fail":
                raise TypeError(f"got an unexpected keyword argument {next(iter(options))!r}")
            return [9999] if encode == "beyond" else text.split()

    lm = ToyLM([bytes(t) for t in tiny.byte_vocab])
    lm.tokenizer = Broken()
    model = byte_model(lm)
    with pytest.warns(FastPathWarning, match=cause):
        assert model.canonical(b"the cat") == []
    assert model.canonical(b"the dog") == []
    beam = await (await ByteBeamState.initial(lm, BeamParams(3))).prefill(b"the cat")
    assert beam.logZ > -np.inf
    model.engine.encoder = None  # nothing to guess by, and nothing to say
    assert ByteModel(model.engine, RowTransform(), 1 << 26).canonical(b"the cat") == []


@pytest.mark.parametrize("prepend", [True, False])
async def test_a_prompt_is_a_few_forwards_with_sentencepiece_too(prepend):
    text = " the cat sat on the mat, é and 日本" * 2
    lm = Follows(sentencepiece(prepend), text)
    engine = as_engine(lm)
    beam = await (await ByteBeamState.initial(lm, BeamParams(5, 0.05))).prefill(text.encode())
    # The start, the tokenizer's path; the bytes of that path alone are ten times as many.
    assert engine.counts.forwards <= 4
    assert len(text.encode()) > 60
    assert [*next(iter(beam)).context] == [*lm.path[: len(next(iter(beam)).context)]]
    slow = await ByteBeamState.initial(lm, BeamParams(5, 0.05))
    for byte in text.encode():
        slow = await (slow.prune() << byte)
    assert beam.logZ == slow.logZ


async def test_rows_wider_than_the_vocabulary_and_byte_fallback_are_exact():
    """No candidate is dropped, so every way to spell the text counts: by hand, for one byte."""
    engine = sentencepiece_llama(sentencepiece(False))
    beam = await ByteBeamState.initial(engine, BeamParams(None))
    row = (await engine.next_token_logprobs([1])).double().exp().numpy()[: len(engine.byte_vocab)]
    spelled = np.array([len(bytes(t)) > 0 for t in engine.byte_vocab])
    begins = np.array([bytes(t).startswith(b"t") for t in engine.byte_vocab])
    assert begins.sum() == 2, "the letter, and the byte that falls back to it"
    exact = np.log(row[begins].sum() / row[spelled].sum())
    assert (await (beam << ord("t"))).logZ == pytest.approx(exact, abs=1e-6)
