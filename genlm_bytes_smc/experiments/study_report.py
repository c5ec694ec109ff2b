"""The report of a study of the user's target."""

from __future__ import annotations

from typing import Any

from genlm_bytes_smc.experiments import figures
from genlm_bytes_smc.experiments.advice import Truth, recommend, truth_of
from genlm_bytes_smc.experiments.job import Row
from genlm_bytes_smc.experiments.report import Report, Section, Table
from genlm_bytes_smc.experiments.runs import METHODS, summarise, table_of


def report(error: float, rows: list[Row]) -> Report:
    """Return figures and words."""
    truth, advice = truth_of(rows), recommend(rows, error)
    entries = summarise([r for r in rows if r["config"]["part"] == "runs"], truth.log_ml)
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
    row = next(r for r in rows if r["config"]["part"] == "beam")
    curve, tolerance = row["result"]["curve"], row["config"]["tolerance"]
    words = [
        "How far the log-probability of texts of the target is from that under a beam of K=128, "
        "per byte, with the margin for texts to come. Points under the line are good "
        "enough; the one furthest left is the cheapest."
    ]
    if not curve:
        return Section("How wide a beam", ["Too few texts came out of the target to say."])
    drawn, (axis,) = figures.figure(1)
    for i, threshold in enumerate(sorted({p["threshold"] for p in curve})):
        mine = sorted((p for p in curve if p["threshold"] == threshold), key=lambda p: int(p["K"]))
        x = [p["rows"] for p in mine]
        y = [max(min(float(p["bound"]), 1e3), 1e-7) for p in mine]
        axis.plot(x, y, label=f"threshold {threshold:g}", **figures.style(i))
        for p, a, b in zip(mine, x, y, strict=True):
            axis.annotate(
                f"{p['K']}", (a, b), fontsize=7.5, xytext=(4, 4), textcoords="offset points"
            )
    axis.axhline(tolerance, color=figures.INK, linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    figures.label(axis, "Beam width K at each point", "LM rows a byte", "nats a byte, with margin")
    figures.legend(axis)
    shown = [[t.replace("\n", "\\n")[:90]] for t in row["result"]["texts"][:8]]
    table = Table(["some of the texts that were read"], shown)
    return Section("How wide a beam", words, drawn, table, name="beam")


def _error_section(entries: list[dict[str, Any]], truth: Truth, error: float) -> Section:
    drawn, axes = figures.figure(2)
    for axis, prune in zip(axes, ("topk", "unbiased"), strict=True):
        for i, method in enumerate(("is", "smc", "lookahead"), 1):
            mine = [e for e in entries if (e["prune"], e["method"]) == (prune, method)]
            if mine:
                x, y = [e["rows"] for e in mine], [max(e["log_rmse"], 1e-4) for e in mine]
                axis.plot(x, y, label=METHODS[method], **figures.style(i))
        axis.axhline(error, color=figures.INK, linewidth=1)
        if truth.error > 0:
            axis.axhline(truth.error, color=figures.FAINT, linewidth=1, linestyle=":")
        axis.set_xscale("log")
        axis.set_yscale("log")
        name = "top K" if prune == "topk" else "unbiased"
        figures.label(axis, name, "LM rows a run", "error of the log, nats (rms)")
    figures.legend(axes[0])
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
