"""The distance of a pruned beam's next-byte rows from a wide beam's, and the cost of a byte.

The study of Vieira et al. 2025 ("From Language Models over Tokens to Language Models over
Characters"), with thresholds and unbiased pruning beside the width.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.experiments.experiment import (
    Config,
    Experiment,
    Outcome,
    Report,
    Row,
    Section,
    Table,
    counts,
    figure,
    label,
    legend,
    style,
)
from genlm_bytes_smc.experiments.models import (
    Reading,
    beam,
    ending,
    fresh_engine,
    is_bundled,
    read_texts,
)
from genlm_bytes_smc.smc.many import run_blocking

from .measures import LN2, jensen_shannon
from .texts import one_of_each

REFERENCE = 128
REAL_REFERENCE = 20  # of a real model, whose rows are dear: 20 is within 0.1 nats of wider ones
EXACT_BYTES = 9
REAL_EXACT_BYTES = 6  # every byte more doubles the ways to cut the text
GROUP = 4  # texts of a job


def settings(quick: bool, bundled: bool = True) -> list[Config]:
    """List the grid: width, threshold, pruning; a coarser one for models that take longer."""
    widths = (1, 2, 4, 8) if quick else (1, 2, 3, 4, 6, 8, 16, 32) if bundled else (1, 2, 5, 10)
    thresholds = (0.0, 0.01) if quick else (0.0, 0.001, 0.01, 0.05)
    grid = [{"K": k, "threshold": t, "prune": "topk"} for t in thresholds for k in widths]
    random = (1, 4) if quick else (1, 2, 4, 8, 16) if bundled else (1, 5, 10)
    return grid + [{"K": k, "threshold": 0.0, "prune": "unbiased"} for k in random]


def jobs(quick: bool, model: Config) -> list[Config]:
    """List a job for each setting and group of texts; and the reference against the exact rows."""
    bundled = is_bundled(model)
    kinds, most = (4, 40) if quick else (16, 96) if bundled else (6, 40)
    texts = [t.decode() for t in one_of_each(kinds, most, model=model)]
    common = {"model": model} if bundled else {"model": model, "reference": REAL_REFERENCE}
    groups = [texts[i : i + GROUP] for i in range(0, len(texts), GROUP)]
    out = [{**common, **s, "texts": g} for g in groups for s in settings(quick, bundled)]
    exact = EXACT_BYTES if bundled else REAL_EXACT_BYTES
    start = [t.encode()[:exact].decode("utf-8", "ignore") for t in texts]
    return [
        *out,
        {**common, "K": common.get("reference", REFERENCE), "exact": True, "texts": start},
    ]


def run(config: Config) -> Outcome:
    """Read the texts one by one and compare each row with the reference's."""
    texts = [t.encode() for t in config["texts"]]
    if config.get("exact"):
        return _reference_against_exact(config, texts)
    reference = _reference(
        json.dumps(config["model"], sort_keys=True),
        config.get("reference", REFERENCE),
        tuple(texts),
    )
    model = byte_model(fresh_engine(config["model"]))
    params = ending(model, beam(config))
    compared, cost = [], []
    for text, good in zip(texts, reference, strict=True):
        model.store.clear()
        found = run_blocking(read_texts(model, params, [text], keep_rows=True))
        compared.append(_compare(found, good))
        cost.append(found)
    n = sum(map(len, texts))
    alive = sum(c["bytes"] for c in compared)
    result = {
        "bytes": n,
        "jsd": sum(c["jsd"] for c in compared) / n,
        "jsd_distance": sum(c["distance"] for c in compared) / n,
        "excess_bits": sum(c["excess"] for c in compared) / max(alive, 1),
        "apart_bits": sum(abs(c["excess"]) for c in compared) / max(alive, 1),
        "alive_bytes": alive,
        "dead_texts": sum(c["bytes"] < len(t) for c, t in zip(compared, texts, strict=True)),
        "lm_rows": sum(c.lm_rows for c in cost),
    }
    times = {"seconds": sum(c.seconds for c in cost), "cpu": sum(c.cpu for c in cost)}
    return Outcome(result, times)


@lru_cache(maxsize=2)
def _reference(model: str, width: int, texts: tuple[bytes, ...]) -> list[Reading]:
    """Return rows of the reference beam, once a process."""
    source = byte_model(fresh_engine(json.loads(model)))
    params = ending(source, BeamParams(K=width))
    return [run_blocking(read_texts(source, params, [t], keep_rows=True)) for t in texts]


def _compare(found: Reading, good: Reading) -> dict[str, float]:
    """Return sums over the bytes of one text; the excess over those read before the beam died."""
    divergence = jensen_shannon(found.rows[0], good.rows[0])
    alive = np.isfinite(found.logp[0])
    return {
        "jsd": float(divergence.sum()),
        "distance": float(np.sqrt(divergence).sum()),
        "excess": float((good.logp[0] - found.logp[0])[alive].sum()) / LN2,
        "bytes": int(alive.sum()),
    }


def _reference_against_exact(config: Config, texts: list[bytes]) -> Outcome:
    model = byte_model(fresh_engine(config["model"]))
    exact, good = (
        run_blocking(read_texts(model, ending(model, BeamParams(K=k)), texts, keep_rows=True))
        for k in (None, config["K"])
    )
    jsd = np.concatenate([jensen_shannon(a, b) for a, b in zip(good.rows, exact.rows, strict=True)])
    gap = np.concatenate(exact.logp) - np.concatenate(good.logp)
    result = {
        "bytes": sum(map(len, texts)),
        "jsd": float(jsd.mean()),
        "jsd_distance": float(np.sqrt(jsd).mean()),
        "excess_bits": float(gap.mean()) / LN2,
        "lm_rows_exact": exact.lm_rows,
        "lm_rows": good.lm_rows,
    }
    return Outcome(result, {"seconds": exact.seconds + good.seconds})


# -- report ------------------------------------------------------------------------------------


def summarise(rows: list[Row]) -> list[dict[str, Any]]:
    """Return one entry a setting, over all texts."""
    found: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        c = row["config"]
        found[c["prune"], c["threshold"], c["K"]].append(row)
    out = []
    for (prune, threshold, width), mine in found.items():
        n = sum(r["result"]["bytes"] for r in mine)
        alive = sum(r["result"]["alive_bytes"] for r in mine)

        def mean(name: str, mine: list[Row] = mine) -> float:
            whole = sum(r["result"][name] * r["result"]["bytes"] for r in mine)
            return float(whole / sum(r["result"]["bytes"] for r in mine))

        excess, apart = (
            sum(r["result"][name] * r["result"]["alive_bytes"] for r in mine)
            for name in ("excess_bits", "apart_bits")
        )
        out.append(
            {
                "prune": prune,
                "threshold": threshold,
                "K": width,
                "jsd": mean("jsd"),
                "distance": mean("jsd_distance"),
                "excess": excess / max(alive, 1),
                "apart": apart / max(alive, 1),
                "dead": sum(r["result"]["dead_texts"] for r in mine),
                "texts": sum(len(r["config"]["texts"]) for r in mine),
                "rows": sum(r["result"]["lm_rows"] for r in mine) / n,
                "speed": n / sum(r["run"]["times"]["seconds"] for r in mine),
            }
        )
    return out


def report(rows: list[Row]) -> Report:
    """Return figures and words."""
    exact = [r["result"] for r in rows if r["config"].get("exact")]
    grid = summarise([r for r in rows if not r["config"].get("exact")])
    n = max(sum(r["result"]["bytes"] for r in rows if not r["config"].get("exact")), 1)
    n //= max(len(grid), 1)
    wide = [g for g in grid if (g["threshold"], g["prune"]) == (0, "topk")]
    shown = min(wide, key=lambda g: abs(g["K"] - 8), default=None)
    reference = max((r["config"].get("reference", REFERENCE) for r in rows), default=REFERENCE)
    near = [g for g in grid if g["prune"] == "topk" and g["apart"] <= 0.01]
    cheap = min(near, key=lambda g: float(g["rows"]), default=None)
    findings = []
    if shown is not None:
        findings.append(
            f"At K={shown['K']} without a threshold the mean Jensen-Shannon divergence from the "
            f"K={reference} beam is {shown['jsd']:.1e} bits a byte (mean distance "
            f"{shown['distance']:.1e}), and a text's probability is {shown['apart']:.1e} bits a "
            "byte off."
        )
    if cheap is not None:
        findings.append(
            f"The cheapest setting within 0.01 bits a byte is K={cheap['K']} with threshold "
            f"{cheap['threshold']:g}: {cheap['rows']:.2f} rows of the model a byte, "
            f"{cheap['apart']:.4f} bits a byte apart."
        )
    for result in exact:
        findings.append(
            f"The reference is good enough to measure against: over the first bytes of each text "
            f"({result['bytes']} in all), where every candidate can be kept, K={reference} differs "
            f"from the exact rows by a divergence of {result['jsd']:.1e} bits a byte."
        )
    return Report(
        "How good is a pruned beam?",
        "A byte beam keeps K ways to cut the text into tokens. How far are its next-byte "
        "distributions from those of a very wide beam, and what does a byte cost?",
        findings,
        [_by_width(grid), _by_cost(grid), _table(grid)],
        [
            f"{n:,} bytes of held-out text of many kinds, each text read byte by byte from the "
            f"model's start. The reference keeps {reference} candidates and has no threshold. The "
            "Jensen-Shannon divergence is in bits, so between 0 and 1; the distance is its root, "
            "averaged over bytes. Excess bits compare the log-probability of the bytes that "
            "really come with the reference's. A narrow top-K beam serves normalised rows, so it "
            "can give one text more than the reference does and another less; `bits a byte apart` "
            "is the mean over texts of the absolute difference, which does not cancel.",
            "A beam that unbiased pruning left without a candidate for the next byte is dead: its "
            "rows count as a divergence of 1, and its text counts for the excess up to there. "
            "LM rows are distinct contexts whose next-token row was needed; bytes a second are "
            "for one text at a time on one core, and depend on the machine.",
        ],
    )


def _lines(
    grid: list[dict[str, Any]],
) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Yield name, style and points (which differ in K) of each line: one for each way to prune."""
    for i, (prune, threshold) in enumerate(
        dict.fromkeys((g["prune"], g["threshold"]) for g in grid)
    ):
        mine = [g for g in grid if (g["prune"], g["threshold"]) == (prune, threshold)]
        name = "unbiased" if prune == "unbiased" else f"top K, threshold {threshold:g}"
        yield name, style(i, linestyle="--" if prune == "unbiased" else "-"), mine


def _by_width(grid: list[dict[str, Any]]) -> Section:
    drawn, axes = figure(2)
    for name, look, mine in _lines(grid):
        width = [g["K"] for g in mine]
        axes[0].plot(width, [max(g["jsd"], 1e-16) for g in mine], label=name, **look)
        axes[1].plot(width, [max(g["apart"], 1e-7) for g in mine], **look)
    for axis in axes:
        counts(axis, sorted({g["K"] for g in grid}))
        axis.set_yscale("log")
    label(axes[0], "Distance of the next-byte row", "K", "Jensen-Shannon divergence, bits")
    label(axes[1], "Cost of the text itself", "K", "bits a byte apart")
    legend(axes[0])
    return Section(
        "Accuracy against width",
        [
            "Left: how far next-byte distributions are from the reference's, on average over "
            "bytes. Right: how far the log-probability of a whole text is from "
            "the reference's, per byte. Both fall quickly with K until the threshold, not K, "
            "decides what is dropped: from there on the line is flat, and more width buys nothing.",
            "Unbiased pruning (dashed) is random: what one beam loses another gains. A single "
            "one is further from the reference than top K at equal width; its merit is that the "
            "mean over runs is exact, which the experiment `bias` looks at.",
        ],
        drawn,
        name="accuracy",
    )


def _by_cost(grid: list[dict[str, Any]]) -> Section:
    drawn, axes = figure(2)
    for name, look, mine in _lines(grid):
        excess = [max(g["apart"], 1e-7) for g in mine]
        axes[0].plot([g["rows"] for g in mine], excess, label=name, **look)
        axes[1].plot([g["speed"] for g in mine], excess, **look)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_yscale("log")
    label(axes[0], "What accuracy costs", "LM rows a byte", "bits a byte apart")
    label(axes[1], "and how fast it is", "bytes a second", "bits a byte apart")
    legend(axes[0])
    return Section(
        "Accuracy against cost",
        [
            "Lower and further left (right, for speed) is better. Points of one line differ in K. "
            "A small threshold takes away most of the rows of a wide beam and little of its "
            "accuracy: candidates below it hardly ever matter, but each costs a row.",
        ],
        drawn,
        name="cost",
    )


def _table(grid: list[dict[str, Any]]) -> Section:
    lines = [
        [
            f"{g['prune']}, {g['threshold']:g}",
            str(g["K"]),
            f"{g['jsd']:.1e}",
            f"{g['distance']:.1e}",
            f"{g['excess']:+.4f}",
            f"{g['apart']:.4f}",
            f"{g['dead']} of {g['texts']}",
            f"{g['rows']:.2f}",
            f"{g['speed']:,.0f}",
        ]
        for g in grid
    ]
    heads = ["pruning, threshold", "K", "divergence, bits", "distance", "excess bits a byte"]
    heads += ["bits a byte apart"]
    heads += ["dead texts", "LM rows a byte", "bytes a second"]
    good = [i for i, g in enumerate(grid) if g["apart"] <= 0.01]
    return Section(
        "All settings",
        ["Green: within 0.01 bits a byte of the reference."],
        table=Table(heads, lines, good),
    )


EXPERIMENT = Experiment(
    "approximation",
    "Pruned beams against a wide one",
    "accuracy and speed over K, threshold and pruning",
    jobs,
    run,
    report,
)
