"""Repeated runs of the methods on one target, and how far their estimates are from the truth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.single import ByteBeamState
from genlm_bytes_smc.experiments.job import Row
from genlm_bytes_smc.experiments.models import ending
from genlm_bytes_smc.experiments.reading import metered, symbol_table
from genlm_bytes_smc.experiments.reports import Section, Table
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import AllParticlesDeadError, SMCResult, smc
from genlm_bytes_smc.smc.particles import Weights

WIDE = 128  # candidates of a beam that enumerates texts

METHODS = {
    "local": "locally constrained decoding",
    "is": "importance sampling",
    "smc": "SMC",
    "lookahead": "SMC with look-ahead",
    "auto": 'SMC with lookahead="auto"',
}


async def one_run(
    llm: ByteLLM, target: Any, n: int, max_bytes: int, seed: int, options: dict[str, Any]
) -> dict[str, float]:
    """Make one run; return its estimates, and its cost with nothing computed before it."""
    with metered(llm.model.store) as meter:
        try:
            done = await smc(
                target, n, max_bytes=max_bytes, seed=seed, beam_seed=seed, progress=False, **options
            )
        except AllParticlesDeadError as error:
            done = error.result
    return {
        "log_ml": done.log_ml,
        "local": _local(done),
        "ess": done.ess if done.log_ml > -math.inf else 0.0,
        "lm_rows": meter.rows,
    }


def _local(result: SMCResult) -> float:
    """Return the log marginal likelihood by locally constrained decoding: the mean over
    its samples of the sum of log normalisers (dead ones left out); for runs that were not
    resampled."""
    alive = result.log_weights[result.log_weights > -np.inf]
    return float(alive.mean()) if len(alive) else -math.inf


async def enumerate_texts(
    model: ByteModel, texts: list[bytes], width: int, prompt: Prompt | None = None
) -> tuple[float, float]:
    """Return the log of the summed probability of texts, nats, and of what may be missing.

    Beams without threshold or healing are lower bounds, and what they dropped bounds the rest
    (after the prompt: what is dropped in it is not counted).
    """
    params = ending(model, BeamParams(K=width, heal=False))
    symbols = symbol_table(texts)
    lengths = np.array([len(t) for t in texts])
    start = ByteBeamState(await ByteLanes.start(model, params))
    root = (await start.prefill(prompt or Prompt())).lanes.prune()
    before, n = float(root.log_z[0]), len(texts)
    lanes = root.replace(root.state, log_z=root.log_z, log_dropped=np.array([-np.inf]))
    lanes = lanes.gather(np.zeros(n, dtype=np.int64))
    for i in range(symbols.shape[1] + 1):
        now = symbols[:, i] if i < symbols.shape[1] else np.full(n, -1)
        now = np.where(lengths == i, EOS_COLUMN, now)
        lanes = await lanes.step(np.where(lanes.alive, now, -1))
    total = np.logaddexp.reduce(lanes.log_z)
    return float(total) - before, float(np.logaddexp.reduce(lanes.log_dropped)) - before


def log_mean(values: Iterable[float]) -> float:
    """Return the log of the mean of exp(values), nats."""
    return Weights(np.asarray(list(values), dtype=np.float64)).log_mean


def estimate_quality(log_estimates: Sequence[float], log_truth: float) -> dict[str, float]:
    """Return how good independent estimates of one number are.

    Args:
        log_estimates: logarithms, -inf for an estimate of zero.
        log_truth: of the true value, or the best there is.

    Returns:
        mean: of estimate over truth; mean_error: its standard error; relative_variance of
        the estimates; dead: share of zeros; log_sd and log_bias: standard deviation and bias of
        the logarithms of those that are not zero, nats; log_rmse: root mean square error
        of those.
    """
    logs = np.asarray(log_estimates, dtype=np.float64) - log_truth
    ratios, alive = np.exp(logs), logs[np.isfinite(logs)]
    n = len(ratios)
    variance = float(ratios.var(ddof=1)) if n > 1 else math.nan
    mean = float(ratios.mean())
    some = len(alive) > 0
    return {
        "runs": n,
        "mean": mean,
        "mean_error": math.sqrt(variance / n) if n > 1 else math.nan,
        "relative_variance": variance / mean**2 if mean > 0 else math.inf,
        "dead": 1.0 - len(alive) / n,
        "log_sd": float(alive.std(ddof=1)) if len(alive) > 1 else math.nan,
        "log_bias": float(alive.mean()) if some else -math.inf,
        "log_rmse": float(np.sqrt(np.square(alive).mean())) if some else math.inf,
    }


def summarise(rows: list[Row], log_truth: float | None = None) -> list[dict[str, Any]]:
    """Return one entry a setting and method, from the rows of jobs that make runs.

    Locally constrained decoding is told from importance sampling, which draws the same texts.
    What runs estimate is `log_truth`, nats; None: each row says it.
    """
    out = []
    for row in rows:
        c, r = row["config"], row["result"]
        truth = float(r["log_truth"]) if log_truth is None else log_truth
        kinds = [(c["method"], "log_ml")] + [("local", "local")] * (c["method"] == "is")
        for method, field in kinds:
            logs = [float(x) for x in r[field]]
            quality = estimate_quality(logs, truth)
            lm_rows = float(np.mean(r["lm_rows"]))
            spread = quality["relative_variance"] if method != "local" else math.nan
            worth = 1 / spread if spread != 0 else math.inf  # 0: every run found the same
            out.append(
                {
                    "target": c.get("target", "your target"),
                    "method": method,
                    "K": c["K"],
                    "prune": c["prune"],
                }
                | {"particles": c["particles"], "rows": lm_rows, **quality}
                | {"ess": float(np.mean(r["ess"])), "worth": 1000 * worth / lm_rows}
            )
    return out


def beam_name(entry: dict[str, Any]) -> str:
    """Return the name of a beam in figures and tables."""
    return f"{'top K' if entry['prune'] == 'topk' else 'unbiased'}, K={entry['K']}"


def table_of(target: str, entries: list[dict[str, Any]]) -> Section:
    """Return all settings in numbers."""
    heads = ["beam, method", "particles", "mean / truth", "log bias", "log sd", "dead runs"]
    heads += ["final ESS", "LM rows", "eff. samples / 1,000 rows"]
    lines = [
        [
            f"{beam_name(e)}, {METHODS[e['method']]}",
            str(e["particles"]),
            f"{e['mean']:.3f} ± {e['mean_error']:.3f}",
            f"{e['log_bias']:+.3f}",
            f"{e['log_sd']:.3f}",
            f"{e['dead']:.0%}",
            f"{e['ess']:.1f}",
            f"{e['rows']:,.0f}",
            "" if math.isnan(e["worth"]) else f"{e['worth']:.3g}",
        ]
        for e in entries
    ]
    return Section(f"All settings: {target}", [], table=Table(heads, lines))
