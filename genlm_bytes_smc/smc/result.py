"""The result of a run: weighted texts, how good the estimate is, and how it came about."""

from __future__ import annotations

import json
import os
from functools import cached_property

import numpy as np

from genlm_bytes_smc.smc import files
from genlm_bytes_smc.smc.particles import SMCState, StepInfo
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.samples import TextSamples

_VARIANCE = "ml_relative_variance"


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
        """Return what the run found and cost, for a tracker of experiments; a float or int each."""
        return {
            "log_ml": self.log_ml,
            "log_ml_error": self.log_ml_error,
            "ess": self.ess,
            "particles": self.size,
            "dead": int(self.state.particles.dead.sum()),
            "ended": int(np.asarray(self.ended).sum()),
            "unfinished": self.unfinished,
            "undecodable": self.undecodable,
            "distinct_texts": len(self.grouped()),
            "steps": len(self.history),
            "resamplings": len(self.ancestry),
            "uncovered": self.uncovered,
            "rows": self.rows,
            "forwards": self.forwards,
            "seconds": self.seconds,
            "bytes": sum(info.active for info in self.history),
        }

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
        """Return the run as JSON, in the format of genlm-control's `InferenceVisualizer`.

        Args:
            path: where to write it as well.

        Raises:
            ValueError: the run was not recorded (`record=True`) from its first step.
        """
        text = json.dumps(files.viewer_record(self.state))
        if path is not None:
            files.write(path, text)
        return text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to one JSON file, which `SMCResult.load` reads.

        Of a `StagedResult` that is what was pooled, without its stages.
        """
        v = self.ml_relative_variance
        data = files.pack(self.state, self.resumable)
        files.write(path, json.dumps(data | {_VARIANCE: None if np.isnan(v) else v}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SMCResult:
        """Read what `save` wrote; it can be resumed.

        Raises:
            ValueError: the file is no such thing.
        """
        data = files.read(path)
        result = cls(*files.unpack(data))
        variance = files.Field("run", data).members().get(_VARIANCE)
        if variance is not None and variance.value is not None:
            result.__dict__[_VARIANCE] = variance.number()  # of pooled runs it is not computed
        return result
