"""What the tokens of a Hugging Face tokenizer spell, by the rules of its decoder."""

from __future__ import annotations

import json
import re
from typing import Any

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
BYTE_OF = {chr(256 + i): b for i, b in enumerate(_OTHERS)} | {chr(b): b for b in _PRINTABLE}
"""The letters that stand for bytes in byte-level vocabularies (GPT-2's)."""


def decode_vocab(tokenizer: Any, width: int | None) -> tuple[list[Any], list[str]]:
    """Return the tokens, by id, as genlm-backend has them: as `Token`s, and as strings.

    Raises:
        ValueError: see `spell_tokens`.
    """
    from genlm.backend.tokenization import Token
    from genlm.backend.tokenization.vocab import bytes_to_strs

    spelled = spell_tokens(tokenizer, width)
    tokens = [Token(token_id=i, byte_string=b) for i, b in enumerate(spelled)]
    return tokens, bytes_to_strs(tokenizer, spelled, "tokenizer")


def spell_tokens(tokenizer: Any, width: int | None) -> list[bytes]:
    """Return what each id spells: b"" for an id below the greatest that no token has.

    Spellings are those of genlm-backend's `get_byte_vocab`, which also wants every id to have a
    token, and a byte-level tokenizer to keep every text as it is (no normalisation, no space
    put before it). Neither matters for what a token spells.

    Args:
        tokenizer: the tokenizer, as transformers has it.
        width: columns of the model's rows, or None while unknown.

    Raises:
        ValueError: an id has no column in the rows, or the spellings are not told by the decoder.
    """
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if width is not None and size > width:
        raise ValueError(
            f"the model returns rows of width {width}, but its tokenizer has token ids up to "
            f"{size - 1}; rows may be wider (padding), not narrower"
        )
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return _spelled_without_decoder(tokenizer)
    told = json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False)
    kinds = set(re.findall(r'"type": "(\w+)"', told))
    if kinds & {"ByteFallback", "Metaspace"} or ("Replace" in kinds and '"▁"' in told):
        spell = _piece
    elif "ByteLevel" in kinds:
        spell = _letters
    elif kinds <= {"Fuse", "Sequence"}:  # tokens, as they stand, one after the other
        spell = _itself
    else:
        raise ValueError(
            f"cannot tell which bytes the tokens of {tokenizer.name_or_path!r} spell: expected a "
            f"decoder of ByteLevel, ByteFallback or Metaspace, got {', '.join(sorted(kinds))}"
        )
    added = set(tokenizer.get_added_vocab().values())
    names = tokenizer.convert_ids_to_tokens(list(range(size)))
    return [b"" if name is None else spell(name, i in added) for i, name in enumerate(names)]


def _itself(name: str, added: bool) -> bytes:
    return name.encode()


def _piece(name: str, added: bool) -> bytes:
    """Return what a piece of SentencePiece spells: one byte by its number, or text."""
    byte = None if added else re.fullmatch("<0x([0-9A-Fa-f]{2})>", name)
    return name.replace("▁", " ").encode() if byte is None else bytes.fromhex(byte[1])


def _letters(name: str, added: bool) -> bytes:
    """Return what a token of a byte-level vocabulary spells; other letters mean themselves."""
    if added:
        return name.encode()
    try:
        return bytes(map(BYTE_OF.__getitem__, name))
    except KeyError:
        return name.encode()


def _spelled_without_decoder(tokenizer: Any) -> list[bytes]:
    from genlm.backend.tokenization.bytes import get_byte_vocab

    try:
        spelled: list[bytes] = get_byte_vocab(tokenizer)
    except Exception as error:  # of any kind, where tokens are not what it takes them for
        raise ValueError(
            f"cannot tell which bytes the tokens of {tokenizer.name_or_path!r} spell: it has no "
            f"decoder, and its tokens are not byte-level ({type(error).__name__}: {error})"
        ) from error
    return spelled
