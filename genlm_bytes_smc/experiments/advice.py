"""What a study of a target says: its log marginal likelihood, settings, and the report of both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from genlm_bytes_smc.experiments.experiment import (
    FAINT,
    INK,
    ExperimentError,
    Report,
    Row,
    Section,
    Table,
    figure,
    label,
    legend,
    style,
)
from genlm_bytes_smc.experiments.models import METHODS, log_mean, summarise, table_of


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
    for row in _part(rows, "enumerate"):
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
    for row in _part(rows, "pool"):
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
    n = _part(rows, "pool")[0]["config"]["particles"]
    told = ", ".join(f"{METHODS[m]} {mean:.2f}" for m, mean in means.items())
    how = (
        f"by pooling {len(logs)} runs of {n} particles, since its texts are too many to enumerate "
        f"(the highest of {told}): an estimate itself, and too low if some likely kind of text was "
        "never drawn"
    )
    return Truth(log_ml, error, False, how)


def _part(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row["config"]["part"] == name]


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
    entries = summarise(_part(rows, "runs"), truth.log_ml)
    entries = [e for e in entries if e["method"] != "local"]
    alive = [e for e in entries if math.isfinite(e["log_rmse"])]
    if not alive:
        raise ExperimentError(
            f"every run of every setting died, though the log marginal likelihood is "
            f"{truth.log_ml:.1f} nats: the model all but excludes this constraint; another prompt "
            "may help"
        )
    fine = [e for e in entries if _usable(e, truth)]
    scaled = [_scaled(e, error) for e in fine or alive]
    best = min(scaled, key=lambda e: (e["rows"], e["particles"]))
    point, told = _beam_choice(rows)
    measured = best["measured"]
    reasons = [
        told,
        _pruning_reason(entries, best, truth),
        _method_reason(scaled, best),
        f"{best['particles']} particles: with {measured['particles']} the error was "
        f"{measured['log_rmse']:.2f} nats over {measured['runs']} runs, and it falls as the root "
        f"of their number; {error:g} is wanted.",
    ]
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
    [row] = _part(rows, "beam")
    curve, tolerance = row["result"]["curve"], row["config"]["tolerance"]
    if not curve:
        told = "K and threshold are the usual ones: too few texts came out to calibrate on."
        return {"K": 5, "threshold": 0.001}, told
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
        lost = f" and loses {rival['dead']:.0%} of its runs" if rival["dead"] > 0 else ""
        return (
            "Top-K pruning: its estimates are not measurably off the truth, and with unbiased "
            f"pruning the same method scatters by {rival['log_sd']:.2f} nats at "
            f"{rival['particles']} particles{lost}."
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
    name = METHODS[best["method"]]
    return f"{name[0].upper()}{name[1:]}: expected LM rows for the wanted error are {told}."


# -- the report ------------------------------------------------------------------------------


def report(error: float, rows: list[Row]) -> Report:
    """Return figures and words of the rows of a study; `error` is wanted, nats."""
    truth, advice = truth_of(rows), recommend(rows, error)
    entries = summarise(_part(rows, "runs"), truth.log_ml)
    target = rows[0]["config"]["target"]
    chosen = ", ".join(f"{k} {v}" for k, v in advice.options().items())
    value = f"{truth.log_ml:.3f} ± {truth.error:.2g} nats"
    return Report(
        "Settings for your target",
        "Which beam, how many particles and which proposal does this prompt and constraint need?",
        [f"Recommended: {chosen}.", *advice.reasons],
        [
            Section(
                "The target",
                [
                    f"Prompt `{target['prompt'][-200:]}`, {target['kind']} "
                    f"`{target['source'][:400]}`, texts of at most {target['max_bytes']} bytes.",
                    f"The log marginal likelihood is {value}, found {truth.how}.",
                ],
            ),
            _beam_section(rows),
            _error_section(entries, truth, error),
            table_of("your target", entries),
        ],
        [
            "Runs of all methods use K=5 and threshold 0.001; their errors are those of the log "
            "marginal likelihood against the value above. LM rows are distinct contexts whose "
            "next-token row a run wanted. A look-ahead's byte bigram is fitted once, and its rows "
            "are not counted. With a prompt, unbiased beams are unbiased given the prompt's beam.",
        ],
    )


def _beam_section(rows: list[Row]) -> Section:
    [row] = _part(rows, "beam")
    curve, tolerance = row["result"]["curve"], row["config"]["tolerance"]
    words = [
        "How far the log-probability of texts of the target is from that under a beam of K=128, "
        "per byte, with the margin for texts to come. Points under the line are good "
        "enough; the one furthest left is the cheapest."
    ]
    if not curve:
        return Section("How wide a beam", ["Too few texts came out of the target to say."])
    drawn, (axis,) = figure(1)
    for i, threshold in enumerate(sorted({p["threshold"] for p in curve})):
        mine = sorted((p for p in curve if p["threshold"] == threshold), key=lambda p: int(p["K"]))
        x = [p["rows"] for p in mine]
        y = [max(min(float(p["bound"]), 1e3), 1e-7) for p in mine]
        axis.plot(x, y, label=f"threshold {threshold:g}", **style(i))
        for p, a, b in zip(mine, x, y, strict=True):
            axis.annotate(
                f"{p['K']}", (a, b), fontsize=7.5, xytext=(4, 4), textcoords="offset points"
            )
    axis.axhline(tolerance, color=INK, linewidth=1)
    axis.set(xscale="log", yscale="log")
    label(axis, "Beam width K at each point", "LM rows a byte", "nats a byte, with margin")
    legend(axis)
    shown = [[t.replace("\n", "\\n")[:90]] for t in row["result"]["texts"][:8]]
    table = Table(["some of the texts that were read"], shown)
    return Section("How wide a beam", words, drawn, table, name="beam")


def _error_section(entries: list[dict[str, Any]], truth: Truth, error: float) -> Section:
    drawn, axes = figure(2)
    for axis, prune in zip(axes, ("topk", "unbiased"), strict=True):
        for i, method in enumerate(("is", "smc", "lookahead"), 1):
            mine = [e for e in entries if (e["prune"], e["method"]) == (prune, method)]
            if mine:
                x, y = [e["rows"] for e in mine], [max(e["log_rmse"], 1e-4) for e in mine]
                axis.plot(x, y, label=METHODS[method], **style(i))
        axis.axhline(error, color=INK, linewidth=1)
        if truth.error > 0:
            axis.axhline(truth.error, color=FAINT, linewidth=1, linestyle=":")
        axis.set(xscale="log", yscale="log")
        name = "top K" if prune == "topk" else "unbiased"
        label(axis, name, "LM rows a run", "error of the log, nats (rms)")
    legend(axes[0])
    return Section(
        "Which method",
        [
            "Error of a run's log marginal likelihood against what it costs; dots differ in the "
            "number of particles. The line is the error that is wanted. Below the dotted line "
            "(the error of the truth itself, if it is an estimate) nothing can be told apart.",
        ],
        drawn,
        name="error",
    )
