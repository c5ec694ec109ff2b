"""Results of `exact`: what it drew, and the tree of prefixes by which it drew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.smc.particles import Weights
from genlm_bytes_smc.smc.pooled import StagedResult
from genlm_bytes_smc.smc.resampling import FloatArray
from genlm_bytes_smc.smc.samples import LogMLBounds, TextSamples

READ_OFF = (
    0.9  # share of the most mass there can be from which on a posterior is read off what was seen
)


@dataclass(eq=False)
class Prefix:
    """A text whose row is known.

    Attributes:
        text: its bytes.
        row: float64[257], what the target gives to each symbol after it.
        upper, lower: float64[257], bounds on the mass below each symbol, over the row's entry.
        above: the prefix one byte shorter; None at the root.
        after: the prefixes one byte longer that are known, by byte.
    """

    text: bytes
    row: FloatArray
    above: Prefix | None
    after: dict[int, Prefix] = field(default_factory=dict)
    upper: FloatArray = field(init=False)
    lower: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.upper = np.ones(N_SYMBOLS)
        self.lower = np.zeros(N_SYMBOLS)
        self.lower[EOS_COLUMN] = 1.0

    @property
    def bound(self) -> float:
        """Most mass that is below, over the mass that led here."""
        return float(self.row @ self.upper)

    def tell(self) -> None:
        """Tell the prefixes above what is known here."""
        here = self
        while here.above is not None:
            byte = here.text[-1]
            here.above.upper[byte] = here.row @ here.upper
            here.above.lower[byte] = here.row @ here.lower
            here = here.above


@dataclass
class Draw:
    """A draw under way.

    Attributes:
        at: the prefix it has come to; None before its row is known.
        text: its bytes.
        above: the prefix one byte shorter.
        promised: the bound on the mass below that it was drawn by.
        begun: the bound at the root when it began.
        weight: gamma of the text over the probability of having drawn it, where none is rejected.
    """

    at: Prefix | None
    text: bytes
    above: Prefix | None
    promised: float
    begun: float
    weight: float


class ExactSamples(TextSamples):
    """Independent texts of exactly the target's law, equally weighted.

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

    def __init__(
        self, texts: list[bytes], estimate: float, draws: int, rows: int, low: float, high: float
    ) -> None:
        with np.errstate(divide="ignore"):
            logs = np.log(np.array([estimate, low, high]))
        if texts:
            super().__init__(texts, np.ones(len(texts), dtype=bool), np.full(len(texts), logs[0]))
        else:
            self._without_texts()
        self.draws, self.rows = draws, rows
        self.log_ml_of_draws = float(logs[0])
        self.log_ml_bounds = LogMLBounds(float(logs[1]), float(logs[2]), 1.0)
        self.log_ml = self.log_ml_bounds.nearest(self.log_ml_of_draws)

    def _without_texts(self) -> None:
        """Set what is set for some texts, where rows were used up before the first."""
        none: FloatArray = np.empty(0)
        self.texts, self.ended, self.size, self.ess = [], np.empty(0, dtype=bool), 0, 0.0
        self.log_weights = self.log_normalized_weights = none
        self.log_total = self.log_ess = -np.inf
        self._weights = Weights(np.array([-np.inf]))

    @property
    def normalized_weights(self) -> FloatArray:
        """Weights that sum to one, float64[N]."""
        return np.full(self.size, 1 / max(self.size, 1))

    def summary(self) -> dict[str, str]:
        """Return what is shown above the texts, name by name."""
        low, high = self.log_ml_bounds[:2] if self.log_ml_bounds else (-np.inf, np.inf)
        return {
            "log marginal likelihood": f"{self.log_ml:.4f}, between {low:.4f} and {high:.4f}",
            "draws": f"{self.size} accepted of {self.draws}",
            "language model": f"{self.rows} rows",
        }


class Posterior(TextSamples):
    """Weighted texts from a given number of rows.

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

    def __init__(
        self,
        finished: list[Draw],
        seen: dict[bytes, float],
        rows: int,
        low: float,
        high: float,
        run: StagedResult | None = None,
    ) -> None:
        drawn, log_ml = [d.text for d in finished], np.nan
        with np.errstate(divide="ignore"):
            weights = np.log(np.array([d.weight for d in finished]))
            bounds = np.log([low, high])
        found: dict[str, tuple[list[bytes], FloatArray, float]] = {}
        if finished:
            log_ml = float(np.logaddexp.reduce(weights) - np.log(len(weights)))
            found["draws"] = drawn, weights, expected_error(drawn, weights)
        if bounds[0] >= bounds[1] + np.log(READ_OFF):
            known = np.array(list(seen.values()))
            found = {"seen": (list(seen), known, float(-np.expm1(bounds[0] - bounds[1])))}
        estimate = log_ml
        if run is not None:
            found["particles"] = particles_of(run)
        self.source = min(found, key=lambda name: found[name][2])
        texts, logs, self.error = found[self.source]
        super().__init__(texts, np.isfinite(logs), logs)
        if self.source == "particles" or not finished:
            estimate = self.log_total
        self.draws, self.rows, self.seen = len(finished), rows, seen
        self.log_ml_of_draws = log_ml
        self.log_ml_bounds = LogMLBounds(float(bounds[0]), float(bounds[1]), 1.0)
        self.log_ml = self.log_ml_bounds.nearest(estimate)

    @property
    def read_off(self) -> bool:
        """Whether the texts are those of `seen`."""
        return self.source == "seen"

    def summary(self) -> dict[str, str]:
        """Return what is shown above the texts, name by name."""
        low, high = self.log_ml_bounds[:2] if self.log_ml_bounds else (-np.inf, np.inf)
        source = {
            "seen": "texts that were seen, by their weights",
            "draws": "weighted draws",
            "particles": "texts that were seen, and particles of smc for the rest",
        }[self.source]
        return {
            "log marginal likelihood": f"{self.log_ml:.4f}, between {low:.4f} and {high:.4f}",
            "from": f"{source}; {self.draws} draws; expected error {self.error:.3f}",
            "effective sample size": f"{self.ess:.1f} of {self.size}",
            "language model": f"{self.rows} rows",
        }


def particles_of(run: StagedResult) -> tuple[list[bytes], FloatArray, float]:
    """Return texts with log weights (nats) that sum to the marginal likelihood, and their error.

    They are the texts that were known before the last run, and its particles with other texts.
    """
    last = run.stages[-1]
    logs = last.rest().particles.log_weights - np.log(last.result.size)
    kept = np.flatnonzero(logs > -np.inf)
    texts = [last.result.texts[i] for i in kept]
    known = np.array(list(last.known.values()))
    total = np.logaddexp.reduce(np.concatenate([known, logs[kept]]))
    rest = float(np.exp(np.logaddexp.reduce(logs[kept]) - total)) if len(kept) else 0.0
    if run.search is not None and last.known:
        # What is not known is on few texts, if it is not missed.
        error = max(rest, 1 - run.search.share)
    else:
        # A run of N particles that found nothing else may have missed a share of 1 / N.
        error = rest * expected_error(texts, logs[kept]) + (1 - rest) / (last.result.size + 1)
    if total == -np.inf:
        error = 1.0
    return [*last.known, *texts], np.concatenate([known, logs[kept]]), min(error, 1.0)


def expected_error(texts: Sequence[bytes], logs: FloatArray) -> float:
    """Estimate the expected total variation of weighted texts from their law.

    As of independent draws as many as the effective sample size n: the mean of |p' - p| is
    sqrt(2 p (1 - p) / (pi n)) for a share p. To it comes 1 / (n + 1) for what was missed.

    Args:
        texts: of the draws.
        logs: float64[N], their log weights, nats.
    """
    weights = Weights(logs) if len(logs) else None
    if weights is None or weights.ess == 0:
        return 1.0
    share: dict[bytes, float] = {}
    for text, w in zip(texts, weights.normalised.tolist(), strict=True):
        share[text] = share.get(text, 0.0) + w
    p = np.array(list(share.values())).clip(0, 1)
    spread = float(np.sqrt(p * (1 - p) / (2 * np.pi * weights.ess)).sum())
    return min(spread + 1 / (weights.ess + 1), 1.0)
