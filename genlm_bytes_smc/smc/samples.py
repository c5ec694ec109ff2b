"""Weighted texts, whatever drew them: their posterior, as plain data, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from genlm.control.constant import EOS
from genlm.control.sampler.sequence import Sequences
from genlm.grammar import Float
from rich.console import Group
from rich.table import Table
from rich.text import Text

from genlm_bytes_smc.alphabet import BYTES
from genlm_bytes_smc.constraints.base import show
from genlm_bytes_smc.html import plain, render
from genlm_bytes_smc.smc.particles import BoolArray, Weights
from genlm_bytes_smc.smc.resampling import FloatArray

SHOWN = 10  # texts of a posterior that are printed
LONGEST = 200  # characters of each


class NoText:
    """A key of a decoded posterior that stands for samples that are no text."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


UNDECODABLE = NoText("not UTF-8")
UNFINISHED = NoText("not ended")


class LogMLBounds(NamedTuple):
    """An interval for a log marginal likelihood, nats.

    Attributes:
        low, high: the bounds.
        confidence: probability with which the interval covers the truth; 1 where that is certain.
    """

    low: float
    high: float
    confidence: float

    def nearest(self, estimate: float) -> float:
        """Return the value between the bounds that is nearest to an estimate."""
        return min(max(estimate, self.low), self.high)

    def shown(self, estimate: float) -> str:
        """Return an estimate and the bounds, for a summary."""
        return f"{estimate:.4f}, between {self.low:.4f} and {self.high:.4f}"


class TextSamples(Sequences):  # type: ignore[misc]
    """N weighted texts.

    All that genlm-control's `Sequences` has is here with the same meaning, except that
    `decoded_posterior` counts samples that it cannot decode instead of leaving them out.

    Args:
        texts: the bytes of each, N of them.
        ended: bool[N], whether each is complete.
        log_weights: float64[N], nats.

    Attributes:
        log_ml: log of the mean weight, nats: the estimated log marginal likelihood.
        ess: effective sample size of the weights.
        log_ml_bounds: bounds on the log marginal likelihood, where they were asked for; else None.
    """

    log_ml_bounds: LogMLBounds | None = None

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, texts: Sequence[bytes], ended: BoolArray, log_weights: FloatArray) -> None:
        weights = Weights(log_weights)
        n = len(weights)
        self.texts = list(texts)
        self.ended = ended
        self.log_weights = log_weights
        self.size = n
        self.log_ml = weights.log_mean
        self.ess = weights.ess
        with np.errstate(divide="ignore"):
            self.log_total = weights.log_mean + float(np.log(n))
            self.log_normalized_weights = np.log(weights.normalised)
            self.log_ess = float(np.log(weights.ess))
        self._weights = weights

    @cached_property
    def contexts(self) -> list[list[Any]]:
        """Each sample as one-byte tokens, with EOS last if it is complete."""
        return [
            [*map(BYTES.__getitem__, text), *([EOS] if ended else [])]
            for text, ended in zip(self.texts, self.ended.tolist(), strict=True)
        ]

    @property
    def normalized_weights(self) -> FloatArray:
        """Weights that sum to one, float64[N]; all zero if every one is."""
        return self._weights.normalised

    @cached_property
    def posterior(self) -> Any:
        """Probability of each sequence of tokens (a tuple), largest first."""
        chart = Float.chart()
        for context, p in zip(self.contexts, self.normalized_weights.tolist(), strict=True):
            chart[tuple(context)] += p
        return chart.sort_descending()

    @cached_property
    def byte_posterior(self) -> Any:
        """Probability of each complete text, as bytes, largest first (`UNFINISHED`: the rest)."""
        return self._chart(lambda text: text)

    @cached_property
    def decoded_posterior(self) -> Any:
        """Probability of each complete text, as str, largest first.

        Samples that are no UTF-8 are counted under the key `UNDECODABLE`, and those that have
        not ended under `UNFINISHED`; neither key is there if there are none with weight.
        """
        return self._chart(lambda text: _decoded(text, UNDECODABLE))

    def _chart(self, key: Any) -> Any:
        chart = Float.chart()
        samples = zip(self.texts, self.ended.tolist(), self.normalized_weights, strict=True)
        for text, ended, p in samples:
            if p > 0:
                chart[key(text) if ended else UNFINISHED] += float(p)
        return chart.sort_descending()

    def grouped(self) -> list[tuple[bytes, float, int, bool]]:
        """Return each text of weight, likeliest first: (text, probability, particles, ended)."""
        found: dict[tuple[bytes, bool], tuple[float, int]] = {}
        weights = self.normalized_weights.tolist()
        for text, ended, p in zip(self.texts, self.ended.tolist(), weights, strict=True):
            if p > 0:
                q, n = found.get((text, ended), (0.0, 0))
                found[text, ended] = p + q, n + 1
        ordered = sorted(found.items(), key=lambda item: -item[1][0])
        return [(text, p, n, ended) for (text, ended), (p, n) in ordered]

    # -- as plain data -----------------------------------------------------------------

    def to_records(self) -> list[dict[str, Any]]:
        """Return a dictionary a particle: text (str; bytes if no UTF-8), ended, weights."""
        weights = zip(self.log_weights.tolist(), self.normalized_weights.tolist(), strict=True)
        samples = zip(self.texts, self.ended.tolist(), weights, strict=True)
        return [
            {
                "text": _decoded(text, text),
                "bytes": len(text),
                "ended": ended,
                "log_weight": log_weight,
                "probability": p,
            }
            for text, ended, (log_weight, p) in samples
        ]

    def to_frame(self) -> Any:
        """Return `to_records` as a pandas `DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")  # no dependency: only who asks for a frame needs it
        except ImportError:
            raise ImportError(
                "a data frame needs pandas, which is not installed; to_records() needs nothing"
            ) from None
        return pandas.DataFrame.from_records(self.to_records())

    def to_sequences(self) -> Sequences:
        """Return the same samples as a plain `Sequences` of genlm-control."""
        return Sequences(self.contexts, self.log_weights.copy())

    @classmethod
    def from_sequences(cls, sequences: Any) -> TextSamples:
        """Return a `Sequences` of genlm-control, over bytes or tokens; EOS last is a text's end.

        Raises:
            TypeError: no such samples, or a token that spells no bytes.
        """
        if not hasattr(sequences, "contexts") or not hasattr(sequences, "log_weights"):
            told = type(sequences).__name__
            raise TypeError(f"samples with contexts and log_weights are due, got {told}")
        contexts = [list(context) for context in sequences.contexts]
        ended = [bool(c) and c[-1] is EOS for c in contexts]
        texts = [_spelled(c[:-1] if e else c) for c, e in zip(contexts, ended, strict=True)]
        log_weights = np.array(sequences.log_weights, dtype=np.float64)
        return TextSamples(texts, np.array(ended, dtype=bool), log_weights)

    @cached_property
    def undecodable(self) -> float:
        """Posterior probability of the complete texts that are no UTF-8."""
        return float(self.decoded_posterior[UNDECODABLE])

    @cached_property
    def unfinished(self) -> float:
        """Posterior probability of the texts that have not ended."""
        return float(self.decoded_posterior[UNFINISHED])

    # -- how it is shown ---------------------------------------------------------------

    def summary(self) -> dict[str, str]:
        """Return what is shown above the texts, name by name."""
        return {
            "log marginal likelihood": f"{self.log_ml:.4f}",
            "effective sample size": f"{self.ess:.1f} of {self.size}",
        }

    def __rich__(self) -> Group:
        """Return a summary, and a table of the likeliest texts."""
        table = Table()
        table.add_column("probability", justify="right")
        table.add_column("text")
        for text, p in list(self.decoded_posterior.items())[:SHOWN]:
            table.add_row(f"{p:.4f}", Text(show(text, LONGEST)))
        left = len(self.decoded_posterior) - SHOWN
        if left > 0:
            table.add_row("", f"and {left} more")
        return Group(*(Text(f"{k}: {v}") for k, v in self.summary().items()), table)

    def __str__(self) -> str:
        return plain(self)

    def __repr__(self) -> str:
        best = next(iter(self.decoded_posterior.items()), None)
        likeliest = "" if best is None else f", likeliest {show(best[0], LONGEST)}: {best[1]:.4f}"
        return (
            f"{type(self).__name__}({self.size} samples, log_ml={self.log_ml:.4f}, "
            f"ess={self.ess:.1f}{likeliest})"
        )

    def _repr_html_(self) -> str:
        best = [
            (p, show(text, LONGEST)) for text, p in list(self.decoded_posterior.items())[:SHOWN]
        ]
        return render("samples", rows=self.summary(), texts=best)


class ExactSamples(TextSamples):
    """Independent texts of exactly the target's law, equally weighted.

    Args:
        texts: the accepted ones.
        begun: of each draw, also the rejected ones, the bound on all mass that it began with, or
            0 if it was rejected; their mean estimates the marginal likelihood.
        rows, bounds: see below.

    Attributes:
        draws: how many were made, the rejected ones included.
        rows: rows that the language models computed.
        log_ml_bounds: low, high (nats), between which the log marginal likelihood lies for sure.
            What was seen of whole texts bounds it from below, what is not known to be dead from
            above.
        log_ml_of_draws: an estimate of it from the share of accepted draws, nats. That draws stop
            with the n-th accepted one biases it a little.
        log_ml: the same, moved between the bounds where it is outside.
    """

    log_ml_bounds: LogMLBounds

    def __init__(
        self, texts: Sequence[bytes], begun: Sequence[float], rows: int, bounds: LogMLBounds
    ) -> None:
        with np.errstate(divide="ignore"):
            self.log_ml_of_draws = float(np.log(np.mean(begun))) if begun else np.nan
        n = len(texts)
        super().__init__(texts, np.ones(n, dtype=bool), np.full(n, self.log_ml_of_draws))
        self.draws, self.rows, self.log_ml_bounds = len(begun), rows, bounds
        self.log_ml = bounds.nearest(self.log_ml_of_draws)

    def summary(self) -> dict[str, str]:
        """Return what is shown above the texts, name by name."""
        return {
            "log marginal likelihood": self.log_ml_bounds.shown(self.log_ml),
            "draws": f"{self.size} accepted of {self.draws}",
            "language model": f"{self.rows} rows",
        }


Weighted = tuple[Sequence[bytes], FloatArray, float]
"""Texts, their log weights (float64[N], nats), and the expected error of what they say."""


class Posterior(TextSamples):
    """Weighted texts from a given number of rows.

    Args:
        found: what the texts may be, by `source`; those of the least error are taken.
        draws: float64[draws], log weights, nats.
        seen, rows, bounds: see below.

    Attributes:
        draws: how many were made, dead ones included.
        rows: rows that the language models computed.
        seen: log weights of all texts whose weight is known, nats, by text.
        source: what the texts are. "seen": those whose weight is known, weighted by it; "draws";
            "particles": of the last of some runs of `smc`, and texts that were known before it.
        error: the total variation from the target's law that is to be expected, estimated.
        log_ml_bounds: low, high (nats), between which the log marginal likelihood lies for sure.
        log_ml_of_draws: log of the mean weight of the draws, nats; unbiased on the linear scale if
            `draws` of them were made, so that the budget did not end them. NaN without any.
        log_ml: the same, or that of the particles, moved between the bounds where it is outside.
    """

    log_ml_bounds: LogMLBounds

    def __init__(
        self,
        found: Mapping[str, Weighted],
        draws: FloatArray,
        seen: dict[bytes, float],
        rows: int,
        bounds: LogMLBounds,
    ) -> None:
        self.source = min(found, key=lambda name: found[name][2])
        texts, logs, self.error = found[self.source]
        super().__init__(texts, np.isfinite(logs), logs)
        n = self.draws = len(draws)
        self.rows, self.seen, self.log_ml_bounds = rows, seen, bounds
        self.log_ml_of_draws = float(np.logaddexp.reduce(draws) - np.log(n)) if n else np.nan
        of_texts = self.source == "particles" or not n
        self.log_ml = bounds.nearest(self.log_total if of_texts else self.log_ml_of_draws)

    @property
    def read_off(self) -> bool:
        """Whether the texts are those of `seen`."""
        return self.source == "seen"

    def summary(self) -> dict[str, str]:
        """Return what is shown above the texts, name by name."""
        source = {
            "seen": "texts that were seen, by their weights",
            "draws": "weighted draws",
            "particles": "texts that were seen, and particles of smc for the rest",
        }[self.source]
        return {
            "log marginal likelihood": self.log_ml_bounds.shown(self.log_ml),
            "from": f"{source}; {self.draws} draws; expected error {self.error:.3f}",
            "effective sample size": f"{self.ess:.1f} of {self.size}",
            "language model": f"{self.rows} rows",
        }


def _decoded(text: bytes, otherwise: bytes | NoText) -> str | bytes | NoText:
    """Return a text as str, or something else if it is no UTF-8."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return otherwise


def _spelled(tokens: Iterable[Any]) -> bytes:
    """Return the bytes of tokens: bytes, a byte as an integer, or genlm-backend's `Token`."""
    out = bytearray()
    for token in tokens:
        if isinstance(token, int) and not isinstance(token, bool):
            out.append(token)
        elif isinstance(token, bytes | bytearray):
            out += token
        elif hasattr(token, "byte_string"):
            out += token.byte_string
        else:
            raise TypeError(f"a token is bytes, or a byte as an integer, got {token!r}")
    return bytes(out)
