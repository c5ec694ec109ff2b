"""Beam parameters as `ByteLLM` takes them: genlm-bytes' own too, and with an end of text."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from genlm.bytes import BeamParams as GenlmBeamParams

from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams


def own_params(params: BeamParams | GenlmBeamParams) -> BeamParams:
    """The parameters as this package's own class.

    Raises:
        TypeError: neither this package's nor genlm-bytes' `BeamParams`.
    """
    if isinstance(params, BeamParams):
        return params
    if isinstance(params, GenlmBeamParams):
        names = {f.name for f in dataclasses.fields(GenlmBeamParams)} - {"eos_tokens"}
        return BeamParams(**{name: getattr(params, name) for name in names})
    raise TypeError(f"beam_params must be a BeamParams, got {type(params).__name__}")


def with_eos(params: BeamParams, model: ByteModel, model_eos: bool) -> BeamParams:
    """The parameters with the model's end-of-sequence tokens where they name none.

    Warns:
        UserWarning: the model has none either.
    """
    if params.eos or not model_eos:
        return params
    spellings = {model.vocab[i] for i in _eos_ids(model)}
    if not spellings:
        warnings.warn(
            "no text can end: the beam parameters name no eos_byte_strings and the tokenizer "
            "has no end-of-sequence token. Name some, or say model_eos=False",
            stacklevel=3,
        )
    return dataclasses.replace(params, eos_byte_strings=spellings)


def _eos_ids(model: ByteModel) -> set[int]:
    """Ids with a spelling that the tokenizer or the generation config name as EOS."""
    engine: Any = model.engine
    inner = getattr(engine, "model", None) or getattr(getattr(engine, "llm", None), "model", None)
    ids: set[int] = set()
    for source in (engine.tokenizer, getattr(inner, "generation_config", None)):
        named = getattr(source, "eos_token_id", None)
        ids.update(named if isinstance(named, (list, tuple)) else () if named is None else (named,))
    return {i for i in ids if 0 <= i < len(model.vocab) and model.vocab[i]}
