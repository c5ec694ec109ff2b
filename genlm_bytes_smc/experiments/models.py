"""Models that jobs name, and what is measured with them: texts read, runs made, at what cost.

A model is described by JSON-able values: {"name": ..., "backend": ..., "device": ...}, as
`load_model` takes them. It is loaded once a process.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel, byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.single import ByteBeamState
from genlm_bytes_smc.beam.state import FloatArray, padded
from genlm_bytes_smc.calls import run_sync
from genlm_bytes_smc.choosing import uncounted
from genlm_bytes_smc.experiments.experiment import Config, Row, Section, Table
from genlm_bytes_smc.lm.adapter import AdapterEngine
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.load import load_model
from genlm_bytes_smc.lm.rows import RowStore
from genlm_bytes_smc.lm.transformer import TreeTransformer
from genlm_bytes_smc.potential import ByteLLM, own_params, with_eos
from genlm_bytes_smc.smc import AllParticlesDeadError, smc
from genlm_bytes_smc.smc.particles import Weights

TINY: Config = {"name": "tiny"}
WIDE = 128  # candidates of a beam that enumerates texts
METHODS = {
    "local": "locally constrained decoding",
    "is": "importance sampling",
    "smc": "SMC",
    "lookahead": "SMC with look-ahead",
    "auto": 'SMC with lookahead="auto"',
}


def fresh_engine(model: Config) -> RowEngine:
    """Return an engine that remembers nothing, over a model that is loaded once.

    What a job finds, and what it costs, then does not depend on what was done before it.
    """
    loaded = _loaded(json.dumps(model, sort_keys=True))
    if isinstance(loaded, TreeTransformer):
        return TreeTransformer(
            loaded.model,
            loaded.tokenizer,
            limit_bytes=loaded.limit_bytes,
            start=loaded.start,
            device=loaded.device,
        )
    if isinstance(loaded, AdapterEngine):
        return AdapterEngine(loaded.llm, start=loaded.start)
    return loaded


@lru_cache(maxsize=1)
def _loaded(model: str) -> RowEngine:
    given = json.loads(model)
    engine = load_model(given.pop("name"), given.pop("backend", None), **given)
    for prune in ("topk", "unbiased"):  # so that all is compiled before a job is timed
        params = BeamParams(K=2, prune_threshold=0.01, prune=prune)
        run_sync(read_texts(byte_model(engine), params, [b"The name", b"A list"]))
    return engine


def ending(model: ByteModel, params: BeamParams) -> BeamParams:
    """Return the parameters with the model's own tokens that end a text."""
    return with_eos(own_params(params), model, True)


def beam(config: Config) -> BeamParams:
    """Return beam parameters from {"K", "threshold", "prune"} and perhaps "seed"."""
    return BeamParams(
        K=config["K"],
        prune_threshold=config.get("threshold", 0.0),
        prune=config.get("prune", "topk"),
        seed=config.get("seed", 0),
    )


def is_bundled(model: Config) -> bool:
    """Tell whether a description names the bundled model, for which studies are large."""
    return bool(model["name"] == TINY["name"])


# -- known texts, read byte by byte ------------------------------------------------------------


@dataclass
class Reading:
    """Log-probabilities of T texts, and the cost of reading them.

    Attributes:
        logp: for each text float64[n], nats: log weight of each of its bytes given those
            before, as the row says; -inf from where the beam died.
        rows: for each text float64[n, 257], nats, if they were kept; else empty.
        lm_rows: distinct contexts whose row was wanted.
        seconds, cpu: wall and processor time.
    """

    logp: list[FloatArray]
    rows: list[FloatArray]
    lm_rows: int
    seconds: float
    cpu: float


class RowMeter:
    """A count of distinct rows that were wanted: the cost of a run that finds nothing computed.

    Contexts are counted by their ids, so none may be freed meanwhile: the meter holds them.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    @property
    def rows(self) -> int:
        """Distinct contexts so far."""
        return len(self._seen)

    def add(self, contexts: IntArray) -> None:
        """Count contexts, by id; negative ones are none."""
        self._seen.update(contexts[contexts >= 0].tolist())

    def context_ids(self) -> IntArray:
        """Return the contexts that may not be freed, int64."""
        return np.fromiter(self._seen, dtype=np.int64)


@contextmanager
def metered(store: RowStore) -> Iterator[RowMeter]:
    """Count the contexts that anybody asks a store for: those whose rows are missing.

    The store is emptied first.
    """
    store.clear()
    meter, ensure = RowMeter(), store.ensure

    async def counted(contexts: IntArray) -> None:
        meter.add(contexts)
        await ensure(contexts)

    store.ensure = counted  # type: ignore[method-assign]
    store.engine.tree.track(meter)
    try:
        yield meter
    finally:
        del store.ensure


async def read_texts(
    model: ByteModel, params: BeamParams, texts: Sequence[bytes], *, keep_rows: bool = False
) -> Reading:
    """Read T texts side by side, each from the model's start.

    With `keep_rows`, every next-byte row is kept (2 KiB a byte).
    """
    symbols = padded(texts, -1)
    logp = np.full(symbols.shape, -np.inf)
    rows = np.full((*symbols.shape, N_SYMBOLS), -np.inf) if keep_rows else None
    wall, cpu = time.perf_counter(), time.process_time()
    with metered(model.store) as meter:
        lanes = (await ByteLanes.start(model, params, len(texts))).prune()
        for i in range(symbols.shape[1]):
            block = (await lanes.rows()).numpy()
            now = np.where(lanes.alive, symbols[:, i], -1)
            at = np.flatnonzero(now >= 0)
            logp[at, i] = block[at, now[at]]
            if rows is not None:
                rows[:, i] = block
            lanes = await lanes.step(now)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Reading(
        [line[: len(t)] for line, t in zip(logp, texts, strict=True)],
        [] if rows is None else [block[: len(t)] for block, t in zip(rows, texts, strict=True)],
        meter.rows,
        wall,
        cpu,
    )


async def enumerate_texts(
    model: ByteModel, texts: list[bytes], width: int, prompt: Prompt | None = None
) -> tuple[float, float]:
    """Return the log of the summed probability of texts, nats, and of what may be missing.

    Beams without threshold or healing are lower bounds, and what they dropped bounds the rest
    (after the prompt: what is dropped in it is not counted).
    """
    params = ending(model, BeamParams(K=width, heal=False))
    start = ByteBeamState(await ByteLanes.start(model, params))
    root = (await start.prefill(prompt or Prompt())).lanes.prune()
    before, n = float(root.log_z[0]), len(texts)
    lanes = uncounted(root).gather(np.zeros(n, dtype=np.int64))
    lengths = [len(text) for text in texts]
    symbols = padded(texts, -1, 1 + max(lengths, default=0))
    symbols[np.arange(n), lengths] = EOS_COLUMN
    for now in symbols.T:
        lanes = await lanes.step(np.where(lanes.alive, now, -1))
    total = np.logaddexp.reduce(lanes.log_z)
    return float(total) - before, float(np.logaddexp.reduce(lanes.log_dropped)) - before


# -- repeated runs on one target, and how far their estimates are from the truth ------------------


async def one_run(
    llm: ByteLLM, target: Any, n: int, max_bytes: int, seed: int, options: dict[str, Any]
) -> dict[str, float]:
    """Make one run; return its estimates, and its cost with nothing computed before it.

    "local" is the log marginal likelihood by locally constrained decoding, for runs that were not
    resampled: the mean over the samples of the sum of log normalisers, dead ones left out.
    """
    with metered(llm.model.store) as meter:
        try:
            done = await smc(
                target, n, max_bytes=max_bytes, seed=seed, beam_seed=seed, progress=False, **options
            )
        except AllParticlesDeadError as error:
            done = error.result
    alive = done.log_weights[done.log_weights > -np.inf]
    return {
        "log_ml": done.log_ml,
        "local": float(alive.mean()) if len(alive) else -math.inf,
        "ess": done.ess if done.log_ml > -math.inf else 0.0,
        "lm_rows": meter.rows,
    }


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
            quality = estimate_quality([float(x) for x in r[field]], truth)
            lm_rows = float(np.mean(r["lm_rows"]))
            spread = quality["relative_variance"] if method != "local" else math.nan
            worth = 1 / spread if spread != 0 else math.inf  # 0: every run found the same
            out.append(
                {
                    "target": c.get("target", "your target"),
                    "method": method,
                    **{name: c[name] for name in ("K", "prune", "particles")},
                    "rows": lm_rows,
                    **quality,
                    "ess": float(np.mean(r["ess"])),
                    "worth": 1000 * worth / lm_rows,
                }
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
