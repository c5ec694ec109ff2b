"""What a text begins with: bytes, text, token ids or chat messages."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genlm_bytes_smc.beam.model import ByteModel, byte_model
from genlm_bytes_smc.trie import Vocabulary


@dataclass(frozen=True)
class Spelled:
    """Bytes that any tokens may spell; with `literal`, any but special tokens."""

    spelling: bytes
    literal: bool = False


@dataclass(frozen=True)
class Tokens:
    """Exactly these token ids."""

    ids: tuple[int, ...]


Segment = Spelled | Tokens


@dataclass(frozen=True)
class Prompt:
    """A prompt as a value: equal prompts are equal, and `+` joins them.

    Make one with `Prompt.from_bytes`, `Prompt.text`, `Prompt.tokens` or `Prompt.chat`.

    Attributes:
        segments: what it is made of, in order.
    """

    segments: tuple[Segment, ...] = ()

    def __add__(self, other: Prompt) -> Prompt:
        """Return the two prompts one after the other."""
        return Prompt(self.segments + other.segments)

    def spell(self, vocab: Vocabulary) -> bytes:
        """Return the bytes it spells in a vocabulary."""
        return b"".join(
            s.spelling if isinstance(s, Spelled) else b"".join(vocab[i] for i in s.ids)
            for s in self.segments
        )

    @classmethod
    def of(cls, prompt: Prompt | bytes | Sequence[int]) -> Prompt:
        """Return a prompt from itself or from bytes.

        Raises:
            TypeError: text, where bytes or a `Prompt` are due; or anything else.
        """
        if isinstance(prompt, cls):
            return prompt
        if isinstance(prompt, str):
            raise TypeError(
                f"a prompt is bytes or a Prompt, got str {prompt[:40]!r}; "
                "use .encode() or Prompt.text(...)"
            )
        return cls.from_bytes(prompt)  # type: ignore[arg-type]

    @classmethod
    def from_bytes(cls, spelling: bytes | Sequence[int], *, literal: bool = False) -> Prompt:
        """Bytes, spelled by any tokens, special ones included (as genlm-bytes reads them).

        Args:
            spelling: bytes, or a sequence of integers 0..255.
            literal: leave special tokens out, as `text` does.

        Raises:
            TypeError, ValueError: anything else.
        """
        if isinstance(spelling, str):
            raise TypeError(f"bytes are due, got str {spelling[:40]!r}; use Prompt.text")
        if isinstance(spelling, bytes | bytearray | memoryview):
            spelled = bytes(spelling)
        else:  # neither a number nor an array of wide integers, which bytes() reads otherwise
            try:
                numbers = [operator.index(b) for b in spelling]
                if any(isinstance(b, bool) for b in spelling):
                    raise TypeError
                spelled = bytes(numbers)
            except (TypeError, ValueError) as error:
                told = f"a prompt is bytes or integers 0..255, got {spelling!r}"
                raise type(error)(told) from None
        return cls((Spelled(spelled, literal),) if spelled else ())

    @classmethod
    def text(cls, text: str, *, special_tokens: bool = False, model: Any = None) -> Prompt:
        """Text, encoded as UTF-8.

        Args:
            text: the text.
            special_tokens: whether spellings of special tokens stand for those tokens. If
                not (the default), they are plain text, spelled from ordinary tokens, so
                that a text from outside cannot inject control tokens.
            model: with `special_tokens`, the model (AsyncLM or `ByteModel`) that has them.

        Raises:
            TypeError: not str. ValueError: a lone surrogate, or no model where one is due.
        """
        if not isinstance(text, str):
            raise TypeError(
                f"text is due, got {type(text).__name__}; use Prompt.from_bytes for bytes"
            )
        if not special_tokens:
            return cls.from_bytes(_utf8(text), literal=True)
        if model is None:
            raise ValueError("special tokens are a model's: give model= with special_tokens=True")
        return cls(tuple(_split_special(text, _as_model(model))))

    @classmethod
    def tokens(cls, ids: Sequence[int]) -> Prompt:
        """Exactly these token ids (after the model's start tokens).

        Raises:
            TypeError: an id that is no integer. ValueError: a negative id.
        """
        checked = []
        for i in ids:
            if isinstance(i, bool) or not hasattr(i, "__index__"):
                raise TypeError(f"token ids are integers, got {i!r}")
            if i.__index__() < 0:
                raise ValueError(f"token ids are not negative, got {i}")
            checked.append(i.__index__())
        return cls((Tokens(tuple(checked)),) if checked else ())

    @classmethod
    def chat(
        cls, messages: Sequence[Mapping[str, str]], model: Any, *, special_tokens: bool = False
    ) -> Prompt:
        """Chat messages through the tokenizer's template, ready for the answer.

        Args:
            messages: dictionaries with "role" and "content".
            model: AsyncLM or `ByteModel` whose tokenizer has a chat template.
            special_tokens: whether spellings of special tokens inside a message's content
                stand for those tokens; the template's own always do.

        Raises:
            ValueError: no messages, one without role or content, or no template.
            TypeError: a message that is no dictionary, or a content that is no text.
        """
        source = _as_model(model)
        tokenizer = source.engine.tokenizer
        if not messages:
            raise ValueError("a chat needs at least one message, got none")
        for message in messages:
            if not isinstance(message, Mapping):
                raise TypeError(f"a message is a dictionary, got {message!r}")
            if not {"role", "content"} <= set(message):
                raise ValueError(f'a message needs "role" and "content", got {dict(message)!r}')
            if not isinstance(message["content"], str):
                raise TypeError(f"a message's content is text, got {message['content']!r}")
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("this model's tokenizer has no chat template; use Prompt.text")
        plain = _split_special(_render(source, messages), source)
        # The template sees marks from the private-use area in place of the contents, so that
        # what is the template's and what is a user's can be told apart afterwards.
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        marked = [dict(m, content=k) for m, k in zip(messages, marks, strict=True)]
        segments: list[Segment] = []
        for piece in re.split("(\ue000\\d+\ue001)", _render(source, marked)):
            if piece in marks:
                content = messages[marks.index(piece)]["content"]
                part = cls.text(content, special_tokens=special_tokens, model=source)
                segments.extend(part.segments)
            elif piece:
                segments.extend(_split_special(piece, source))
        # Templates may look into contents (to trim them, say). Where no content could pass for
        # a special token, what the template makes of it counts.
        contents = [_split_special(m["content"], source) for m in messages]
        harmless = special_tokens or not any(map(_special, contents))
        same = _special(plain) == _special(segments)
        return cls(tuple(plain if harmless and same else segments))


def _special(segments: Sequence[Segment]) -> list[Tokens]:
    return [s for s in segments if isinstance(s, Tokens)]


def _render(model: ByteModel, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages through the template, without a BOS token that the engine's start has already."""
    tokenizer = model.engine.tokenizer
    text: str = tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
    )
    if getattr(tokenizer, "bos_token_id", None) not in model.engine.start:
        return text
    return text.removeprefix(getattr(tokenizer, "bos_token", None) or "")


def _as_model(model: Any) -> ByteModel:
    return model if isinstance(model, ByteModel) else byte_model(model)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate at position {error.start}; use Prompt.from_bytes"
        ) from None


def _split_special(text: str, model: ByteModel) -> list[Segment]:
    """Text cut at the spellings of special tokens, longest first."""
    by_spelling = {model.vocab[i]: i for i in reversed(model.special_ids)}
    if not by_spelling:
        return [Spelled(_utf8(text), literal=True)] if text else []
    longest_first = sorted(by_spelling, key=len, reverse=True)
    pattern = b"(" + b"|".join(re.escape(s) for s in longest_first) + b")"
    segments: list[Segment] = []
    for piece in re.split(pattern, _utf8(text)):
        if piece in by_spelling:
            segments.append(Tokens((by_spelling[piece],)))
        elif piece:
            segments.append(Spelled(piece, literal=True))
    return segments
