"""Results of `exact`: what it drew, and the tree of prefixes by which it drew."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.smc.particles import Weights
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
        read_off: whether the texts are those of `seen`, weighted by what they weigh; else they
            are the draws.
        log_ml_bounds: low, high (nats), between which the log marginal likelihood lies for sure.
        log_ml_of_draws: log of the mean weight of the draws, nats; unbiased on the linear scale if
            `draws` of them were made, so that the budget did not end them.
        log_ml: the same, moved between the bounds where it is outside.
    """

    def __init__(
        self, finished: list[Draw], seen: dict[bytes, float], rows: int, low: float, high: float
    ) -> None:
        with np.errstate(divide="ignore"):
            weights = np.log([d.weight for d in finished])
            bounds = np.log([low, high])
        log_ml = float(np.logaddexp.reduce(weights) - np.log(len(weights)))
        self.read_off = bool(bounds[0] >= bounds[1] + np.log(READ_OFF))
        texts = list(seen) if self.read_off else [d.text for d in finished]
        logs = np.array(list(seen.values())) if self.read_off else weights
        ended = np.isfinite(logs)
        super().__init__(texts, ended, logs)
        self.draws, self.rows, self.seen = len(finished), rows, seen
        self.log_ml_of_draws = log_ml
        self.log_ml_bounds = LogMLBounds(float(bounds[0]), float(bounds[1]), 1.0)
        self.log_ml = self.log_ml_bounds.nearest(log_ml)

    def summary(self) -> dict[str, str]:
        """Return what is shown above the texts, name by name."""
        low, high = self.log_ml_bounds[:2] if self.log_ml_bounds else (-np.inf, np.inf)
        source = "texts that were seen, by their weights" if self.read_off else "weighted draws"
        return {
            "log marginal likelihood": f"{self.log_ml:.4f}, between {low:.4f} and {high:.4f}",
            "from": f"{source}; {self.draws} draws",
            "effective sample size": f"{self.ess:.1f} of {self.size}",
            "language model": f"{self.rows} rows",
        }
