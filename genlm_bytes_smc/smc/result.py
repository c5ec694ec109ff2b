"""Results of runs: weighted texts, how good the estimate is, and how it came about."""

from __future__ import annotations

import json
import os
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
from genlm_bytes_smc.smc import files, records
from genlm_bytes_smc.smc.particles import BoolArray, SMCState, StepInfo, Weights
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

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


class SMCResult(TextSamples):
    """N weighted texts from one run of `smc`; a genlm-control `Sequences`.

    Args:
        state: the particles in the end, and the history.
        resumable: the state to go on from (before the length limit ended particles).

    Attributes:
        texts: the bytes of each particle; ended: bool[N], whether each is complete.
        log_weights: float64[N], nats.
        log_ml: log of the mean weight, nats: the estimated log marginal likelihood.
        ess: effective sample size of the final weights.
    """

    def __init__(self, state: SMCState, resumable: SMCState | None = None) -> None:
        particles = state.particles
        super().__init__(particles.texts(), particles.ended, particles.log_weights)
        self.state = state
        self.resumable = state if resumable is None else resumable

    @property
    def result(self) -> SMCResult:
        """Itself; the error of a run that died has a result too."""
        return self

    @property
    def seed(self) -> int:
        """The seed of the run's draws."""
        return self.state.seed

    @property
    def history(self) -> tuple[StepInfo, ...]:
        """One entry a step."""
        return self.state.history

    @property
    def complete(self) -> bool:
        """True if no particle would read on."""
        return not self.state.particles.active.any()

    # -- how good the estimate is ------------------------------------------------------

    @cached_property
    def ml_relative_variance(self) -> float:
        """Estimated variance of exp(log_ml) over its square, from this run's genealogy.

        V = 1 - (N / (N - 1))^(r + 1) * (sum of W_i W_j over i, j of different ancestry),
        for r resamplings, normalised weights W and the first ancestors (`eve`) of the
        particles: the estimator V of Lee & Whiteley 2018, Biometrika 105:609, with the final
        weights as its test function. It is unbiased (times the squared estimate) for multinomial
        resampling at fixed steps. With resampling triggered by the effective sample size it
        is consistent. With other schemes, the default one too, it can be too low, by half in one
        example: `smc_repeat` measures the spread of runs instead. What particles share is not
        seen: the draws of beams with `prune="unbiased"`. It can come out negative when
        the variance is very small, and nears 1, saying nothing, when all particles have one
        ancestor. NaN for a single particle.
        """
        n = self.size
        if n < 2:
            return float("nan")
        families = np.bincount(self.eve, weights=self.normalized_weights, minlength=n)
        apart = 1.0 - float(np.square(families).sum())
        return 1.0 - (n / (n - 1)) ** (len(self.ancestry) + 1) * apart

    @property
    def log_ml_error(self) -> float:
        """Estimated standard error of `log_ml`, nats: root of `ml_relative_variance`.

        0 where that is negative; to first order in the relative error.
        """
        v = self.ml_relative_variance
        return v if np.isnan(v) else float(np.sqrt(max(v, 0.0)))

    @property
    def eve(self) -> IntArray:
        """Return which of the first particles each descends from, int64[N]."""
        return self.state.particles.eve

    @cached_property
    def ancestry(self) -> list[tuple[int, IntArray]]:
        """(step, ancestors int64[N]) of each resampling."""
        return [(i.step, i.ancestors) for i in self.history if i.ancestors is not None]

    @cached_property
    def ess_path(self) -> FloatArray:
        """Effective sample size after each step, before resampling: float64[steps]."""
        return np.array([i.ess for i in self.history])

    @cached_property
    def log_ml_path(self) -> FloatArray:
        """Log of the mean weight after each step, nats: float64[steps]."""
        return np.array([i.log_ml for i in self.history])

    # -- what it cost ------------------------------------------------------------------

    @cached_property
    def uncovered(self) -> float:
        """The largest share of a target row that the proposal could not propose.

        More than 0 means that texts the target admits were never drawn: `log_ml` is then low
        by what they weigh.
        """
        return max((i.uncovered for i in self.history), default=0.0)

    @cached_property
    def deaths(self) -> dict[str, int]:
        """For each factor that gave weight zero, how many particles it killed in all."""
        out: dict[str, int] = {}
        for info in self.history:
            for name, k in info.deaths:
                out[name] = out.get(name, 0) + k
        return out

    @property
    def rows(self) -> int:
        """Rows that the language models computed."""
        return sum(i.rows for i in self.history)

    @property
    def forwards(self) -> int:
        """Forwards of the language models."""
        return sum(i.forwards for i in self.history)

    @property
    def seconds(self) -> float:
        """Wall time of all steps."""
        return sum(i.seconds for i in self.history)

    def metrics(self) -> dict[str, float]:
        """Return the run in numbers, for a tracker of experiments; a float or int each."""
        return records.metrics(self)

    def summary(self) -> dict[str, str]:
        """Return what is shown above the texts, name by name."""
        out = {
            "log marginal likelihood": f"{self.log_ml:.4f}{self._shown_error()}",
            "effective sample size": f"{self.ess:.1f} of {self.size}",
            "resamplings": f"{len(self.ancestry)} in {len(self.history)} steps",
            "language model": f"{self.rows} rows in {self.forwards} forwards, {self.seconds:.2f} s",
        }
        if self.uncovered > 0:
            out["not covered by the proposal"] = f"up to {self.uncovered:.2%} of a row"
        if not self.complete:
            out["not complete"] = f"{int(self.state.particles.active.sum())} still reading"
        return out

    def _shown_error(self) -> str:
        if self.size < 2 or self.log_ml == -np.inf:
            return ""
        if np.ptp(self.eve[self.log_weights > -np.inf]) == 0:
            return " (error unknown: all particles have one ancestor)"
        return f" ± {self.log_ml_error:.4f}"

    # -- files -------------------------------------------------------------------------

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the run in the format of genlm-control's `InferenceVisualizer`.

        Args:
            path: where to write it as well.

        Returns:
            The JSON text.

        Raises:
            ValueError: the run was not recorded (`record=True`) from its first step.
        """
        text = json.dumps(files.viewer_record(self.state))
        if path is not None:
            files.write(path, text)
        return text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to one JSON file, which `SMCResult.load` reads."""
        files.write(path, json.dumps(files.pack(self.state, self.resumable)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SMCResult:
        """Read what `save` wrote; it can be resumed.

        Raises:
            ValueError: the file is no such thing.
        """
        return cls(*files.unpack(files.read(path)))
