"""`choose`: the distribution over given answers, summed over the ways to cut them into tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text

from genlm_bytes_smc.beam.deferred import DeferredLanes
from genlm_bytes_smc.beam.deferred_text import to_candidates
from genlm_bytes_smc.beam.known_text import read_paths
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.state import EOS_COLUMN, FloatArray
from genlm_bytes_smc.calls import blocking
from genlm_bytes_smc.html import plain, printable, probability, render
from genlm_bytes_smc.lm.adapter import as_engine
from genlm_bytes_smc.lm.load import load_model
from genlm_bytes_smc.lm.rows import RowTransform
from genlm_bytes_smc.potential import ByteLLM

Normalise = Literal["none", "end"]
Option = str | bytes


WIDTH, THRESHOLD = 32, 1e-4  # of the answers' beams where nothing is said: drops are counted


@dataclass(frozen=True, eq=False)
class Choice:
    """The distribution over N answers after a prompt.

    Attributes:
        options: the answers as given, in their order.
        log_weights: float64[N], log probability of each answer given the prompt, nats: as a
            prefix of what follows the prompt, or (`normalise="end"`) as all that follows.
        log_neglected: float64[N], log of the mass that the beam dropped after the prompt, on
            the way to each answer, over the prompt's mass, nats; -inf: none. See `lower`.
        normalise: "none" or "end", as asked for.
    """

    options: tuple[Option, ...]
    log_weights: FloatArray
    log_neglected: FloatArray
    normalise: Normalise

    def __len__(self) -> int:
        """Return the number of answers, N."""
        return len(self.options)

    @cached_property
    def probabilities(self) -> FloatArray:
        """Return the probability of each answer among those given, float64[N], sum 1."""
        return _shares(self.log_weights, self.log_weights)

    @cached_property
    def lower(self) -> FloatArray:
        """Return each probability if all that was dropped belonged to the other answers.

        With `prune="topk"` (healing aside) the exact probability after the prompt's beam lies
        between `lower` and `upper`; what the beam dropped inside the prompt is not counted. With
        "deferred", mass that rides on the row of another context is not counted, and the count
        of the rest is so cautious that it says little; with "unbiased" nothing is dropped but
        estimates are random. There the two are no useful bounds.
        """
        return _shares(self.log_weights, np.logaddexp(self.log_weights, self.log_neglected))

    @cached_property
    def upper(self) -> FloatArray:
        """Return each probability if all that was dropped on the way to it belonged to it."""
        most = np.logaddexp(self.log_weights, self.log_neglected)
        return _shares(most, self.log_weights)

    @property
    def bound(self) -> float:
        """Return the largest distance of a probability to its `lower` or `upper`."""
        p = self.probabilities
        return float(np.maximum(self.upper - p, p - self.lower).max())

    @property
    def best(self) -> Option:
        """Return the likeliest answer, the first of equals."""
        return self.options[int(np.argmax(self.log_weights))]

    def top(self, k: int | None = None) -> list[tuple[Any, float]]:
        """Return the k likeliest answers (None: all) with their probabilities, likeliest first."""
        order = np.argsort(-self.log_weights, kind="stable")[:k]
        return [(self.options[i], float(self.probabilities[i])) for i in order]

    def __getitem__(self, option: Option) -> float:
        """Return the probability of an answer, given as it was given to `choose`.

        Raises:
            KeyError: it is none of them.
        """
        try:
            return float(self.probabilities[self.options.index(option)])
        except ValueError:
            raise KeyError(f"{option!r} is none of the options {list(self.options)}") from None

    def to_records(self) -> list[dict[str, Any]]:
        """Return a dictionary an answer, in the order given, of plain Python values."""
        columns = ("probability", "log_weight", "log_neglected", "lower", "upper")
        arrays = (
            self.probabilities, self.log_weights, self.log_neglected, self.lower, self.upper,
        )  # fmt: skip
        rows = zip(self.options, *(a.tolist() for a in arrays), strict=True)
        return [{"option": option, **dict(zip(columns, row, strict=True))} for option, *row in rows]

    def __rich__(self) -> Table:
        """Return a table of the answers, likeliest first."""
        table = Table()
        for name in ("probability", "log weight"):
            table.add_column(name, justify="right")
        table.add_column("option")
        for p, logw, option in self._shown():
            table.add_row(f"{p:.4f}", f"{logw:.3f}", Text(option))
        return table

    def __str__(self) -> str:
        return plain(self)

    def __repr__(self) -> str:
        shown = ", ".join(f"{option!r}: {p:.4f}" for option, p in self.top(5))
        return f"Choice({shown}{', …' if len(self) > 5 else ''})"

    def _repr_html_(self) -> str:
        return render("choice", rows=[(p, probability(p), *rest) for p, *rest in self._shown()])

    def _shown(self) -> Iterator[tuple[float, float, str]]:
        for i in np.argsort(-self.log_weights, kind="stable").tolist():
            option = printable(self.options[i])
            yield float(self.probabilities[i]), float(self.log_weights[i]), option


async def choose(
    llm: Any,
    prompt: Prompt | str | bytes | None,
    options: Iterable[Option],
    normalise: Normalise = "none",
    *,
    beam_params: BeamParams | None = None,
    transform: RowTransform | None = None,
) -> Choice:
    """Return the model's distribution over given answers after a prompt.

    An answer's weight sums over all ways to cut it into tokens that the beam keeps, the token
    that reaches from the prompt into the answer or beyond the answer's end included. What all
    answers begin with is read once, and then they are read side by side: one forward of the model
    serves them all, and contexts that they share are computed once.

    Args:
        llm: a `ByteLLM`, a model or engine that it can be made from, or a model's name (which
            is loaded anew at each call).
        prompt: what comes before the answer; str is plain text, without special tokens. None
            stands for the prompt that a `ByteLLM` has.
        options: the answers, str (UTF-8) or bytes, all different. One may be a prefix of
            another.
        normalise: "none" weighs an answer by the probability that what follows the prompt
            begins with it; a short answer then holds all that goes on from it. "end" weighs it by
            the probability that the text ends after it.
        beam_params: how to prune; None: as the `ByteLLM` does. For another model, None reads
            the prompt as `ByteLLM` does by default, and the answers with
            `BeamParams(K=32, prune_threshold=1e-4)`, which counts what it drops.
        transform: temperature, top-k and top-p of the token-level rows; likewise.

    Raises:
        TypeError: a prompt or an answer of another type.
        ValueError: no answers, one twice, an empty one (with "none", where it would always have
            probability one), an unknown `normalise`, no token that ends a text (with "end"), or
            answers that are all impossible.
        ContextTooLongError: prompt and answer do not fit the model's window.
    """
    if normalise not in ("none", "end"):
        raise ValueError(f'normalise must be "none" or "end", got {normalise!r}')
    given, texts = _checked(options, normalise)
    counted = beam_params is None and not isinstance(llm, ByteLLM)
    llm = as_byte_llm(llm, prompt, beam_params, transform)
    if normalise == "end" and not llm.params.eos:
        raise ValueError('normalise="end" needs a token that ends a text, and there is none')
    root = await llm.lanes(1)
    if counted:
        wide = {"K": WIDTH, "prune": "topk", "prune_threshold": THRESHOLD}
        root = to_candidates(root, dataclasses.replace(llm.params, **wide)).prune()
    root = uncounted(root)
    least, most = min(texts), max(texts)  # what these two begin with, all do
    shared = next((i for i, byte in enumerate(least) if byte != most[i]), len(least))
    lanes, _ = await read_paths(root, [least[:shared]])
    lanes = lanes.gather([0] * len(texts))
    lanes, _ = await read_paths(lanes, [text[shared:] for text in texts])
    if normalise == "end":
        lanes = await lanes.step([EOS_COLUMN] * len(texts))
    log_weights, log_neglected = lanes.log_z - root.log_z[0], lanes.log_dropped - root.log_z[0]
    if not (log_weights > -np.inf).any():
        raise ValueError(
            f"all {len(texts)} options have probability zero after the prompt; a wider beam or a "
            "lower threshold may help"
        )
    return Choice(given, log_weights, log_neglected, normalise)


choose_sync = blocking(choose)


def as_byte_llm(
    llm: Any,
    prompt: Prompt | str | bytes | None = None,
    beam_params: BeamParams | None = None,
    transform: RowTransform | None = None,
) -> ByteLLM:
    """Return a `ByteLLM` after a prompt; arguments and errors as for `choose`."""
    given = Prompt.text(prompt) if isinstance(prompt, str) else prompt
    if not isinstance(llm, ByteLLM):
        llm = load_model(llm) if isinstance(llm, str) else llm
        ends = bool(as_engine(llm).eos_ids)  # where no text can end, only "end" asks for it
        return ByteLLM(llm, beam_params, prompt=given, transform=transform, model_eos=ends)
    if beam_params is None and transform is None:
        return llm if given is None else llm.with_prompt(given)
    return ByteLLM(
        llm.llm,
        llm.beam_params if beam_params is None else beam_params,
        prompt=llm.prompt if given is None else given,
        transform=llm.transform if transform is None else transform,
        model_eos=llm.model_eos,
    )


def encoded(text: Option, what: str) -> bytes:
    """Return a text as bytes, str as UTF-8.

    Raises:
        TypeError: neither. ValueError: a lone surrogate.
    """
    if isinstance(text, bytes | bytearray):
        return bytes(text)
    if not isinstance(text, str):
        raise TypeError(f"{what} must be str or bytes, got {text!r}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} {text!r} has a lone surrogate; give bytes") from None


def _checked(
    options: Iterable[Option], normalise: Normalise
) -> tuple[tuple[Option, ...], list[bytes]]:
    """Return the options as given, and as bytes."""
    if isinstance(options, str | bytes) or not hasattr(options, "__iter__"):
        raise TypeError(f"options must be a list of str or bytes, got {options!r}")
    given = tuple(options)
    texts = [encoded(option, "an option") for option in given]
    if not texts:
        raise ValueError("options must hold at least one answer, got none")
    if normalise == "none" and b"" in texts:
        raise ValueError('an empty option needs normalise="end": every text begins with it')
    twice = sorted({t for t in texts if texts.count(t) > 1}) if len(set(texts)) < len(texts) else []
    if twice:
        raise ValueError(f"options must differ; more than once among them: {twice}")
    return given, texts


def _shares(weight: FloatArray, others: FloatArray) -> FloatArray:
    """Return w_n / (w_n + the sum of the others' weights), from logs float64[N]."""
    top = max(weight.max(), others.max())
    w, v = np.exp(weight - top), np.exp(others - top)
    total = np.array([v[:n].sum() + v[n + 1 :].sum() for n in range(len(v))])
    with np.errstate(invalid="ignore"):
        return np.where(w > 0, w / (w + total), 0.0)


def uncounted(lanes: Any) -> Any:
    """Return the same lanes with nothing counted as dropped yet.

    What was dropped early in a prompt outweighs all that came after, and says nothing of it.
    """
    if isinstance(lanes, DeferredLanes):
        none = np.full(len(lanes), -np.inf)
        return dataclasses.replace(lanes, forgotten=none, pending=none, _memo={})
    return lanes.replace(lanes.state, log_z=lanes.log_z, log_dropped=np.full(len(lanes), -np.inf))
