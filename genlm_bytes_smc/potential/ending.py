"""Beam parameters as `ByteLLM` takes them: genlm-bytes' own too, and with an end of text."""

from __future__ import annotations

import dataclasses
import warnings

from genlm.bytes import BeamParams as GenlmBeamParams

from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams


def own_params(params: BeamParams | GenlmBeamParams) -> BeamParams:
    """Return the parameters as this package's own class.

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
    """Return the parameters with the model's end-of-sequence tokens where they name none.

    Warns:
        UserWarning: the model has none either.
    """
    if params.eos or not model_eos:
        return params
    spellings = {model.vocab[i] for i in model.engine.eos_ids}
    if not spellings:
        warnings.warn(
            "no text can end: the beam parameters name no eos_byte_strings and the tokenizer "
            "has no end-of-sequence token. Name some, or say model_eos=False",
            stacklevel=3,
        )
    return dataclasses.replace(params, eos_byte_strings=spellings)
