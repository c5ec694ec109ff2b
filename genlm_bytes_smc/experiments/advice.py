"""The log marginal likelihood of a target, and the cheapest settings that estimate it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from genlm_bytes_smc.experiments.job import ExperimentError, Row
from genlm_bytes_smc.experiments.runs import METHODS, log_mean, summarise


@dataclass(frozen=True)
class Advice:
    """Settings for a target, and why.

    Attributes:
        K, threshold, prune, particles, ess: as `BeamParams` and `smc` take them.
        proposal: "target", or "lookahead" (then also the twist).
        error: expected error of the log marginal likelihood, nats (standard deviation).
        lm_rows: expected rows of the model for a run.
        reasons: one sentence each.
    """

    K: int
    threshold: float
    prune: str
    particles: int
    ess: float
    proposal: str
    error: float
    lm_rows: float
    reasons: tuple[str, ...]

    def options(self) -> dict[str, Any]:
        """Return the settings by the names that the command line gives them."""
        names = ("K", "threshold", "prune", "particles", "ess", "proposal")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Truth:
    """The value that runs are compared with.

    Attributes:
        log_ml: nats. error: its standard error, nats. exact: whether it was enumerated.
        how: in words.
    """

    log_ml: float
    error: float
    exact: bool
    how: str


def truth_of(rows: list[Row]) -> Truth:
    """Return the enumerated value, or the pooled estimate with its error.

    Raises:
        ExperimentError: the model gives every text weight zero, or every pooled run died.
    """
    for row in rows:
        if row["config"]["part"] == "enumerate":
            r = row["result"]
            log_ml, unsure = float(r["log_truth"]), float(r["log_unsure"])  # "-inf" in a file
            if log_ml == -math.inf:
                raise ExperimentError(
                    f"the model gives each of the {r['texts']} texts that the constraint admits "
                    "probability zero; another prompt or constraint may help"
                )
            how = f"by summing over all {r['texts']} texts that the constraint admits"
            return Truth(log_ml, math.log1p(math.exp(unsure - log_ml)), True, how)
    pooled: dict[str, list[float]] = {}
    for row in (r for r in rows if r["config"]["part"] == "pool"):
        found = pooled.setdefault(row["config"]["method"], [])
        found += [float(x) for x in row["result"]["log_ml"]]
    # All are unbiased. One that never drew some likely kind of text is low and does not
    # know it; one that is high by a factor c has a chance of at most 1 / c (Markov).
    means = {method: log_mean(logs) for method, logs in pooled.items()}
    best = max(means, key=lambda method: means[method])
    log_ml, logs = means[best], np.array(pooled[best])
    if log_ml == -math.inf:
        raise ExperimentError(
            "every particle of every pooled run died: the model all but excludes this constraint; "
            "a larger --max-bytes or another prompt may help"
        )
    ratios = np.exp(logs - log_ml)
    error = float(ratios.std(ddof=1) / math.sqrt(len(ratios)))
    n = next(r["config"]["particles"] for r in rows if r["config"]["part"] == "pool")
    told = ", ".join(f"{METHODS[m]} {mean:.2f}" for m, mean in means.items())
    how = (
        f"by pooling {len(logs)} runs of {n} particles, since its texts are too many to enumerate "
        f"(the highest of {told}): an estimate itself, and too low if some likely kind of text was "
        "never drawn"
    )
    return Truth(log_ml, error, False, how)


def recommend(rows: list[Row], error: float = 0.5) -> Advice:
    """Return the cheapest setting that meets an error, from the rows of a study.

    The variance of a log estimate falls as one over the number of particles, and rows grow
    at most in proportion to it, so each method is taken to the number that it needs.

    Args:
        rows: of `run_study`.
        error: wanted standard deviation of the log marginal likelihood, nats.

    Raises:
        ExperimentError: as `truth_of`, or every run of every setting died.
    """
    truth = truth_of(rows)
    entries = summarise([r for r in rows if r["config"]["part"] == "runs"], truth.log_ml)
    entries = [e for e in entries if e["method"] != "local"]
    fine = [e for e in entries if _usable(e, truth)]
    alive = [e for e in entries if math.isfinite(e["log_rmse"])]
    if not alive:
        raise ExperimentError(
            f"every run of every setting died, though the log marginal likelihood is "
            f"{truth.log_ml:.1f} nats: the model all but excludes this constraint; another prompt "
            "may help"
        )
    scaled = [_scaled(e, error) for e in fine or alive]
    best = min(scaled, key=lambda e: (e["rows"], e["particles"]))
    point, told = _beam_choice(rows)
    reasons = [told, _pruning_reason(entries, best, truth), _method_reason(scaled, best)]
    reasons.append(_particles_reason(best, error))
    if not fine:
        reasons.append(
            "No setting that was tried kept most runs alive and on the truth; take "
            "this as the least bad, and look at the report."
        )
    method = best["method"]
    return Advice(
        K=int(point["K"]),
        threshold=float(point["threshold"]),
        prune=best["prune"],
        particles=best["particles"],
        ess=0.0 if method == "is" else 0.5,
        proposal="lookahead" if method == "lookahead" else "target",
        error=best["log_sd"],
        lm_rows=best["rows"],
        reasons=tuple(reasons),
    )


def _usable(entry: dict[str, Any], truth: Truth) -> bool:
    """Tell whether runs mostly live, scatter, and have a mean not far from the truth."""
    if entry["dead"] > 0.1 or not math.isfinite(entry["log_sd"]):
        return False
    off = abs(entry["mean"] - 1)
    return bool(off <= 4 * math.hypot(entry["mean_error"], truth.error) + 0.1)


def _scaled(entry: dict[str, Any], error: float) -> dict[str, Any]:
    factor = max((entry["log_rmse"] / error) ** 2, 1e-6)
    n = max(1, min(4096, math.ceil(entry["particles"] * factor)))
    ratio = n / entry["particles"]
    scatter = entry["log_rmse"] / math.sqrt(ratio)
    # Fewer particles share fewer texts: rows fall more slowly than particles.
    rows = entry["rows"] * (ratio if ratio >= 1 else math.sqrt(ratio))
    return entry | {"particles": n, "rows": rows, "log_sd": scatter, "measured": entry}


def _beam_choice(rows: list[Row]) -> tuple[dict[str, Any], str]:
    row = next(r for r in rows if r["config"]["part"] == "beam")
    curve, tolerance = row["result"]["curve"], row["config"]["tolerance"]
    usual = {"K": 5, "threshold": 0.001}
    if not curve:
        return usual, "K and threshold are the usual ones: too few texts came out to calibrate on."
    fit = next((p for p in curve if float(p["bound"]) <= tolerance), None)
    n = len(row["result"]["texts"])
    if fit is None:
        best = min(curve, key=lambda p: float(p["bound"]))
        return best, (
            f"K={best['K']} and threshold {best['threshold']:g}: no beam tried stays within "
            f"{tolerance:g} nats a byte of one with K=128 on {n} texts of the target with margin; "
            f"this is the closest ({float(best['bound']):.2g})."
        )
    return fit, (
        f"K={fit['K']} and threshold {fit['threshold']:g}: the cheapest beam ({fit['rows']:.2f} LM "
        f"rows a byte) that stays within {tolerance:g} nats a byte of one with K=128 on {n} texts "
        f"of the target, with margin ({float(fit['bound']):.1e})."
    )


def _pruning_reason(entries: list[dict[str, Any]], best: dict[str, Any], truth: Truth) -> str:
    other = "topk" if best["prune"] == "unbiased" else "unbiased"
    rivals = [e for e in entries if e["prune"] == other and e["method"] == best["method"]]
    rival = max(rivals, key=lambda e: e["particles"])
    if best["prune"] == "topk":
        why = "with unbiased pruning the same method scatters by"
        return (
            f"Top-K pruning: its estimates are not measurably off the truth, and {why} "
            f"{rival['log_sd']:.2f} nats at {rival['particles']} particles"
            + (f" and loses {rival['dead']:.0%} of its runs." if rival["dead"] > 0 else ".")
        )
    return (
        "Unbiased pruning: it meets the error with fewer LM rows; with top K the mean estimate is "
        f"{rival['mean']:.2f} ± {math.hypot(rival['mean_error'], truth.error):.2f} of the truth."
    )


def _method_reason(scaled: list[dict[str, Any]], best: dict[str, Any]) -> str:
    least: dict[str, float] = {}
    for e in scaled:
        least[e["method"]] = min(e["rows"], least.get(e["method"], math.inf))
    told = ", ".join(f"{METHODS[m]} {rows:,.0f}" for m, rows in least.items())
    return (
        f"{METHODS[best['method']][0].upper()}{METHODS[best['method']][1:]}: expected LM "
        f"rows for the wanted error are {told}."
    )


def _particles_reason(best: dict[str, Any], error: float) -> str:
    m = best["measured"]
    return (
        f"{best['particles']} particles: with {m['particles']} the error was {m['log_rmse']:.2f} "
        f"nats over {m['runs']} runs, and it falls as the root of their number; "
        f"{error:g} is wanted."
    )
