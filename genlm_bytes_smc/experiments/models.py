"""Models that jobs name in their configuration, loaded once a process.

A model is described by JSON-able values: {"name": ..., "backend": ..., "device": ...}, as
`load_model` takes them.
"""

from __future__ import annotations

import json
from functools import lru_cache

from genlm_bytes_smc.beam.model import ByteModel, byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.calls import run_sync
from genlm_bytes_smc.experiments.job import Config
from genlm_bytes_smc.experiments.reading import read_texts
from genlm_bytes_smc.lm.adapter import AdapterEngine
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.lm.load import load_model
from genlm_bytes_smc.lm.transformer import TreeTransformer
from genlm_bytes_smc.potential.byte_llm import own_params, with_eos

TINY: Config = {"name": "tiny"}


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
    run_sync(_warm_up(engine))
    return engine


async def _warm_up(engine: RowEngine) -> None:
    """Read two texts, so that everything is compiled before a job is timed."""
    for prune in ("topk", "unbiased"):
        params = BeamParams(K=2, prune_threshold=0.01, prune=prune)
        await read_texts(byte_model(engine), params, [b"The name", b"A list"])


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
