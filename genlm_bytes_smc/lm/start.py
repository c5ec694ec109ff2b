"""The tokens that every context of a text begins with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

# Document separators of models trained without a BOS token, likeliest first.
_SEPARATORS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "</s>")


def start_tokens(
    tokenizer: Any, start: int | Sequence[int] | None = None, size: int | None = None
) -> tuple[int, ...]:
    """Token ids to put before a text, so that its first token has a context.

    What the user gives comes first. Else the tokenizer's BOS token. A tokenizer without one
    (the Qwen families) belongs to a model that has seen texts follow one another, so the
    next choice is the token that stood between them: `<|endoftext|>` or another well-known
    separator among the tokenizer's special tokens, then its EOS token, then its padding
    token.

    Args:
        tokenizer: a Hugging Face tokenizer, or anything with `bos_token_id`.
        start: an id or a sequence of ids; None to choose.
        size: token ids that the model takes are below it; None if that is not known.

    Returns:
        At least one token id.

    Raises:
        ValueError: `start` is empty, or has an id that is negative or too large; or nothing is
            given and nothing can be chosen.
        TypeError: `start` is neither an integer nor a sequence of integers.
    """
    if start is not None:
        ids = _given(start)
        if size is not None and max(ids) >= size:
            raise ValueError(f"start must be token ids below {size}, got {start!r}")
        return ids
    for choice in (
        getattr(tokenizer, "bos_token_id", None),
        _separator(tokenizer),
        getattr(tokenizer, "eos_token_id", None),
        getattr(tokenizer, "pad_token_id", None),
    ):
        if isinstance(choice, Integral):
            return (int(choice),)
    raise ValueError(
        "the tokenizer has no BOS, EOS or padding token to begin a text with; say which token "
        "ids to begin with: start=..."
    )


def _given(start: int | Sequence[int]) -> tuple[int, ...]:
    ids: Any = (start,) if isinstance(start, Integral) else start
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"start must be a token id or a sequence of token ids, got {start!r}")
    ids = tuple(ids)
    if not all(isinstance(i, Integral) for i in ids):
        raise TypeError(f"start must be a token id or a sequence of token ids, got {start!r}")
    out = tuple(int(i) for i in ids)
    if not out or min(out) < 0:
        raise ValueError(f"start must be one or more token ids of at least 0, got {start!r}")
    return out


def _separator(tokenizer: Any) -> int | None:
    """Id of a document separator among the special tokens, if there is one."""
    special = getattr(tokenizer, "added_tokens_decoder", None)
    if not isinstance(special, dict):
        return None
    ids = {str(token): i for i, token in special.items()}
    return next((ids[name] for name in _SEPARATORS if name in ids), None)
