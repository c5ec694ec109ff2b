"""Weighted texts, whatever drew them: their posterior, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from genlm.control.constant import EOS
from genlm.control.sampler.sequence import Sequences
from genlm.grammar import Float
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from genlm_bytes_smc.alphabet import BYTES
from genlm_bytes_smc.html import render
from genlm_bytes_smc.smc import records
from genlm_bytes_smc.smc.particles import BoolArray, Weights
from genlm_bytes_smc.smc.resampling import FloatArray

SHOWN = 10  # texts of a posterior that are printed


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
        self.log_total = weights.log_mean + float(np.log(n))
        self.ess = weights.ess
        with np.errstate(divide="ignore"):
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
        return self._chart(_decoded)

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
        return records.records(self)

    def to_frame(self) -> Any:
        """Return `to_records` as a pandas `DataFrame`; `ImportError` where there is none."""
        return records.frame(self.to_records())

    def to_sequences(self) -> Sequences:
        """Return the same samples as a plain `Sequences` of genlm-control."""
        return Sequences(self.contexts, self.log_weights.copy())

    @classmethod
    def from_sequences(cls, sequences: Any) -> TextSamples:
        """Return a `Sequences` of genlm-control, over bytes or tokens; EOS last is a text's end.

        Raises:
            TypeError: no such samples, or a token that spells no bytes.
        """
        return TextSamples(*records.of_sequences(sequences))

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
            table.add_row(f"{p:.4f}", Text(_quoted(text)))
        left = len(self.decoded_posterior) - SHOWN
        if left > 0:
            table.add_row("", f"and {left} more")
        return Group(*(Text(f"{k}: {v}") for k, v in self.summary().items()), table)

    def __str__(self) -> str:
        console = Console(width=100, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def __repr__(self) -> str:
        best = next(iter(self.decoded_posterior.items()), None)
        likeliest = "" if best is None else f", likeliest {_quoted(best[0])}: {best[1]:.4f}"
        return (
            f"{type(self).__name__}({self.size} samples, log_ml={self.log_ml:.4f}, "
            f"ess={self.ess:.1f}{likeliest})"
        )

    def _repr_html_(self) -> str:
        best = [(p, _quoted(text)) for text, p in list(self.decoded_posterior.items())[:SHOWN]]
        return render("samples", rows=self.summary(), texts=best)


def _decoded(text: bytes) -> str | NoText:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return UNDECODABLE


def _quoted(text: str | bytes | NoText) -> str:
    shown = repr(text)
    return shown if len(shown) <= 200 else shown[:199] + "…"
