"""Bias and variance of estimated log marginal likelihoods, against the exact value.

A constraint with finitely many texts is enumerated, so the truth is known; then each method
estimates it many times.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.experiments.experiment import (
    INK,
    Config,
    Experiment,
    Outcome,
    Report,
    Row,
    Section,
    figure,
    label,
    legend,
    style,
)
from genlm_bytes_smc.experiments.models import (
    METHODS,
    WIDE,
    beam,
    beam_name,
    enumerate_texts,
    fresh_engine,
    is_bundled,
    one_run,
    summarise,
    table_of,
)
from genlm_bytes_smc.lookahead import ByteNgram, Lookahead
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc.many import run_blocking

REAL_WIDE = 20  # candidates of the beam that enumerates, on a real model, whose rows are dear


class Target(NamedTuple):
    """A finite constraint: each text takes one part of each slot."""

    slots: tuple[tuple[str, ...], ...]

    @property
    def texts(self) -> list[bytes]:
        """Every text."""
        return ["".join(parts).encode() for parts in product(*self.slots)]

    @property
    def regex(self) -> str:
        """An expression for them (no part needs escaping but for the full stop)."""
        slots = ("|".join(p.replace(".", "\\.") for p in slot) for slot in self.slots)
        return "".join(f"({slot})" for slot in slots)


TARGETS = {
    # Most pairs are likely beginnings with an ending that surprises the model.
    "surprise": Target(
        (("The function", "The dog", "A list", "Laura"), (" sat", " barks", " returns"), (".",))
    ),
    "weekdays": Target(
        (
            ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
            (", ",),
            ("May ", "June ", "July "),
            tuple("123456789"),
        )
    ),
}


def jobs(quick: bool, model: Config) -> list[Config]:
    """List a job for each target, method, beam and number of particles: many seeded runs."""
    beams = [(5, "topk"), (1, "unbiased")] if quick else BEAMS
    bundled = is_bundled(model)
    counts = (8,) if quick else (4, 16, 64) if bundled else (8, 32)
    names = list(TARGETS) if bundled and not quick else ["surprise"]
    return [
        {
            "model": model,
            "target": name,
            "method": method,
            "K": width,
            "prune": prune,
            "threshold": 0.0,
            "particles": n,
            "runs": 60 if bundled and not quick else 12,
            "seed": 0,
        }
        for name in names
        for width, prune in beams
        for method in ("is", "smc", "lookahead", "auto")
        for n in counts
    ]


BEAMS = [(1, "topk"), (5, "topk"), (1, "unbiased"), (4, "unbiased")]


def run(config: Config) -> Outcome:
    """Make all runs of one setting."""
    spec = json.dumps(config["model"], sort_keys=True)
    truth, unsure = _truth(spec, config["target"])
    ahead = Lookahead(bigram(spec)) if config["method"] == "lookahead" else None
    found = run_blocking(_runs(config, ahead))
    result = {"log_truth": truth, "log_unsure": unsure}
    return Outcome(result | {k: [f[k] for f in found] for k in found[0]})


async def _runs(config: Config, ahead: Lookahead | None) -> list[dict[str, float]]:
    target = TARGETS[config["target"]]
    llm = ByteLLM(fresh_engine(config["model"]), beam(config))
    longest = max(map(len, target.texts))
    options: dict[str, Any] = {"ess_threshold": 0.0 if config["method"] == "is" else 0.5}
    if ahead is not None:
        options |= {"proposal": ahead, "twist": ahead}
    if config["method"] == "auto":
        options["lookahead"] = "auto"
    constrained = llm * ByteRegex(target.regex)
    found = []
    for seed in range(config["seed"], config["seed"] + config["runs"]):
        found.append(await one_run(llm, constrained, config["particles"], longest, seed, options))
    return found


def wide(model: Config) -> int:
    """Choose how many candidates the beam keeps that enumerates texts."""
    return WIDE if is_bundled(model) else REAL_WIDE


@lru_cache(maxsize=4)
def _truth(model: str, target: str) -> tuple[float, float]:
    """Return `enumerate_texts` of a target, once a process."""
    source = byte_model(fresh_engine(json.loads(model)))
    return run_blocking(enumerate_texts(source, TARGETS[target].texts, wide(json.loads(model))))


@lru_cache(maxsize=1)
def bigram(model: str) -> ByteNgram:
    """Return the byte bigram of look-aheads, fitted to the model's own texts once a process."""
    llm = ByteLLM(fresh_engine(json.loads(model)), BeamParams(K=5, prune_threshold=0.001))
    return run_blocking(ByteNgram.from_model(llm, order=2, n_texts=64, max_bytes=64, seed=0))


# -- report ------------------------------------------------------------------------------------


def report(rows: list[Row]) -> Report:
    """Return figures and words."""
    entries = summarise(rows)
    middle = sorted({e["particles"] for e in entries})[len({e["particles"] for e in entries}) // 2]
    sections = []
    for target in dict.fromkeys(e["target"] for e in entries):
        mine = [e for e in entries if e["target"] == target]
        sections += [_means(target, mine, middle), _cost(target, mine), table_of(target, mine)]
    results = {r["config"]["target"]: r["result"] for r in rows}
    truths = "; ".join(
        f"{t}: {len(TARGETS[t].texts)} texts, log {float(x['log_truth']):.4f}, off by a factor of "
        f"at most 1 + {math.exp(float(x['log_unsure']) - float(x['log_truth'])):.1e}"
        for t, x in results.items()
    )
    width = wide(rows[0]["config"]["model"])
    return Report(
        "Can the estimate be trusted?",
        "How often a model writes a text that a constraint admits (the marginal likelihood) can "
        "be summed up exactly if there are few such texts. What do the methods estimate, how much "
        "do they scatter, and what do they cost?",
        _findings(entries),
        sections,
        [
            f"The truth is the sum over every text, each read by a beam of {width} candidates "
            f"without threshold, whose dropped mass bounds what is missing ({truths}). Texts "
            "come after the model's start token, without a prompt, so that nothing else "
            "is estimated. Each dot is a mean over seeded runs, with two standard errors.",
            "LM rows are distinct contexts whose next-token row a run wanted, as if "
            "nothing were computed before it. The look-ahead's byte bigram is fitted once, to 64 "
            "texts of 64 bytes that the model writes by itself; those rows are not counted. "
            "Effective samples are one over the relative variance of the estimate over runs: how "
            "many exact draws would scatter as little.",
        ],
    )


def _findings(entries: list[dict[str, Any]]) -> list[str]:
    out = []
    for target in dict.fromkeys(e["target"] for e in entries):
        mine = [e for e in entries if e["target"] == target]
        proper = [e for e in mine if e["prune"] == "unbiased" and e["method"] != "local"]
        within = sum(abs(e["mean"] - 1) <= 4 * e["mean_error"] for e in proper)
        out.append(
            f"{target}: with unbiased beams, {within} of {len(proper)} weighted methods and "
            "sizes average to the exact value within four standard errors."
        )
        most = max(e["particles"] for e in mine)
        wide = [e for e in mine if e["particles"] == most]
        for width, prune in dict.fromkeys((e["K"], e["prune"]) for e in wide):
            at = {e["method"]: e for e in wide if (e["K"], e["prune"]) == (width, prune)}
            plain, ahead, auto, local = (at[m] for m in ("smc", "lookahead", "auto", "local"))
            out.append(
                f"{target}, {beam_name(plain)}, {most} particles: the log estimate scatters by "
                f"{plain['log_sd']:.2f} nats with SMC, {ahead['log_sd']:.2f} with look-ahead and "
                f"{auto['log_sd']:.2f} with auto; "
                f"locally constrained decoding is off by {local['log_bias']:+.2f} nats."
            )
    return out


def _means(target: str, entries: list[dict[str, Any]], particles: int) -> Section:
    drawn, (axis,) = figure(1)
    beams = list(dict.fromkeys(beam_name(e) for e in entries))
    for i, method in enumerate(METHODS):
        mine = [e for e in entries if e["method"] == method and e["particles"] == particles]
        at = [beams.index(beam_name(e)) + 0.14 * (i - 2) for e in mine]
        look = style(i, linestyle="none")
        errors = [2 * e["mean_error"] for e in mine]
        axis.errorbar(at, [e["mean"] for e in mine], errors, label=METHODS[method], **look)
    axis.axhline(1.0, color=INK, linewidth=1)
    axis.set_xticks(range(len(beams)), beams)
    axis.set_ylim(bottom=0)
    title = f"{target}: mean of the estimate over the truth, {particles} particles"
    label(axis, title, "", "estimate / exact value")
    legend(axis, ncols=2)
    return Section(
        f"Bias: {target}",
        [
            "The line is the truth. All but locally constrained decoding are unbiased "
            "for the distribution that the beam stands for. With unbiased beams that is the "
            "model's own, and dots lie on the line within their errors however narrow the beam. "
            "With top K it is another one, and a narrow beam is off by as much, "
            "with any number of particles.",
            "Locally constrained decoding masks bytes and renormalises, and has no weights; what "
            "it has for an estimate (the mean of its log normalisers) is too low, the more so "
            "the more the constraint surprises the model late in a text.",
        ],
        drawn,
        name=f"mean-{target}",
    )


def _cost(target: str, entries: list[dict[str, Any]]) -> Section:
    beams = list(dict.fromkeys((e["K"], e["prune"]) for e in entries))[-2:]
    drawn, axes = figure(2)
    for axis, chosen in zip(axes, beams, strict=False):
        for i, method in enumerate(("is", "smc", "lookahead", "auto"), 1):
            mine = [e for e in entries if e["method"] == method and (e["K"], e["prune"]) == chosen]
            x, y = [e["rows"] for e in mine], [e["log_rmse"] for e in mine]
            axis.plot(x, y, label=METHODS[method], **style(i))
        axis.set_xscale("log")
        axis.set_yscale("log")
        name = beam_name({"K": chosen[0], "prune": chosen[1]})
        label(axis, f"{target}: {name}", "LM rows a run", "error of the log, nats (rms)")
    legend(axes[0])
    return Section(
        f"Error against cost: {target}",
        [
            "Root mean square error of the log estimate (bias and scatter together) against "
            "the rows of the model that a run needs; dots differ in the number of "
            "particles. Lower and further left is better. Runs in which every particle died are "
            "left out here; the table counts them.",
        ],
        drawn,
        name=f"cost-{target}",
    )


EXPERIMENT = Experiment(
    "bias",
    "Bias and variance of marginal likelihoods",
    "estimates against the exact value, by method, beam and cost",
    jobs,
    run,
    report,
)
