"""What tokens spell: against genlm-backend where it takes a tokenizer, else against its texts."""

import json
import re

import pytest
from genlm.backend.tokenization.bytes import get_byte_vocab
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from genlm_bytes_smc.lm.spelling import spell_tokens
from tests.lm.families import make_tokenizer

TEXT = "The Cat ate ½ a ﬁsh,\n\tÀ là: 日本 \x00"


def changed(tokenizer, change):
    """Return a tokenizer whose JSON was changed, as a user may have trained it."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    change(told)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)))


def byte_level(normalizer=None, prefix=False):
    tokenizer = make_tokenizer()
    inner = tokenizer.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if normalizer is not None:
        inner.normalizer = normalizer
    return tokenizer


def characters():
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(set(TEXT)))}, []))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def pieces(fallback=True):
    """Return a tokenizer as SentencePiece's: bytes by number, a low line for a space."""
    names = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"Thecat", "<0xZZ>"]
    inner = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    by_number = [decoders.ByteFallback()] if fallback else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), *by_number, decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def with_holes(tokenizer):
    def move(told):
        vocab = told["model"]["vocab"]
        told["model"]["vocab"] = {n: i + 7 * (i > 20) + 9 * (i > 90) for n, i in vocab.items()}

    return changed(tokenizer, move)


@pytest.mark.parametrize(
    ("tokenizer", "spelled"),
    [
        (byte_level(prefix=True), " " + TEXT),
        (byte_level(normalizers.NFKC()), TEXT.replace("½", "1⁄2").replace("ﬁ", "fi")),
        (byte_level(normalizers.Lowercase()), TEXT.lower()),
        (with_holes(make_tokenizer()), TEXT),
        (with_holes(pieces()), TEXT),
        (pieces(), TEXT),
        (pieces(fallback=False), TEXT),
        (characters(), TEXT),
    ],
    ids=["prefix", "NFKC", "lower", "holes", "pieces with holes", "pieces", "text", "characters"],
)
def test_the_tokens_of_a_text_spell_it(tokenizer, spelled):
    by_id = spell_tokens(tokenizer, None)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(by_id[i] for i in ids) == spelled.encode()
    used = set(tokenizer.get_vocab().values())
    assert len(by_id) == max(used) + 1
    assert {i for i, s in enumerate(by_id) if not s} == set(range(len(by_id))) - used


def test_a_byte_level_vocabulary_may_lack_bytes_and_hold_other_letters():
    inner = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "日": 2, "Ã©": 3, "<e>": 4}, []))
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>")
    assert spell_tokens(tokenizer, 5) == [b"a", b" ", "日".encode(), "é".encode(), b"<e>"]


def test_spellings_are_those_of_genlm_backend_where_it_takes_a_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>", "é"], special_tokens=True)
    assert spell_tokens(tokenizer, None) == get_byte_vocab(tokenizer)
    other = changed(pieces(), lambda told: told["model"]["vocab"].pop("<0xZZ>"))
    assert spell_tokens(other, None) == get_byte_vocab(other)


def word_pieces(decoder):
    inner = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    if decoder:
        inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize(
    ("tokenizer", "width", "message"),
    [
        (make_tokenizer(), 200, "rows of width 200, but its tokenizer has token ids up to "),
        (with_holes(pieces()), 270, "rows of width 270, but its tokenizer has token ids up to 281"),
        (word_pieces(True), None, "expected a decoder of ByteLevel, .*, got WordPiece"),
        (word_pieces(False), None, "it has no decoder, and its tokens are not byte-level"),
    ],
    ids=["narrow", "narrow with holes", "word pieces", "no decoder"],
)
def test_what_cannot_be_spelled_is_refused(tokenizer, width, message):
    with pytest.raises(ValueError, match=re.compile(message)):
        spell_tokens(tokenizer, width)
