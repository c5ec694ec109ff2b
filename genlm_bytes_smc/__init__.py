"""Byte-level language models from token-level ones, for sequential Monte Carlo.

from genlm_bytes_smc import BeamParams, ByteBeamState, load_model

llm = load_model("tiny")
beam = await ByteBeamState.initial(llm, BeamParams(K=5))
beam = await beam.prefill(b"An apple a day keeps the ")
(await beam.logp_next()).pretty().top(5)
"""

from typing import TYPE_CHECKING, Any

from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel, byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.probs import LazyByteProbs
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.single import ByteBeamState
from genlm_bytes_smc.lm.engine import ContextTooLongError, EngineError, LMCounts, RowEngine
from genlm_bytes_smc.lm.load import as_engine, load_model
from genlm_bytes_smc.lm.rows import BadRowError, RowTransform
from genlm_bytes_smc.lm.size import ModelTooLargeError
from genlm_bytes_smc.lm.vllm_engine import VLLMEngine
from genlm_bytes_smc.trie import TokenTrie
from genlm_bytes_smc.vocab import Vocabulary

if TYPE_CHECKING:
    from genlm_bytes_smc import smc
    from genlm_bytes_smc.constraints import (
        ByteGrammar,
        ByteJsonSchema,
        BytePredicate,
        ByteRegex,
        ByteWFSA,
    )
    from genlm_bytes_smc.llamppl import ByteContext
    from genlm_bytes_smc.potential import ByteLLM
    from genlm_bytes_smc.proposal import ByteAWRS, ByteProposalSampler, byte_sampler
    from genlm_bytes_smc.smc import SMCResult
    from genlm_bytes_smc.token_proposal import ByteTokenSampler

# What builds on genlm-control and llamppl, imported when first asked for.
_LATER = {
    "ByteAWRS": "genlm_bytes_smc.proposal",
    "ByteContext": "genlm_bytes_smc.llamppl",
    "ByteGrammar": "genlm_bytes_smc.constraints",
    "ByteJsonSchema": "genlm_bytes_smc.constraints",
    "ByteLLM": "genlm_bytes_smc.potential",
    "BytePredicate": "genlm_bytes_smc.constraints",
    "ByteProposalSampler": "genlm_bytes_smc.proposal",
    "ByteRegex": "genlm_bytes_smc.constraints",
    "ByteTokenSampler": "genlm_bytes_smc.token_proposal",
    "ByteWFSA": "genlm_bytes_smc.constraints",
    "SMCResult": "genlm_bytes_smc.smc",
    "byte_sampler": "genlm_bytes_smc.proposal",
}

__all__ = [
    "BadRowError",
    "BeamParams",
    "ByteAWRS",
    "ByteBeamState",
    "ByteContext",
    "ByteGrammar",
    "ByteJsonSchema",
    "ByteLLM",
    "ByteLanes",
    "ByteModel",
    "BytePredicate",
    "ByteProposalSampler",
    "ByteRegex",
    "ByteTokenSampler",
    "ByteWFSA",
    "ContextTooLongError",
    "EngineError",
    "LMCounts",
    "LazyByteProbs",
    "ModelTooLargeError",
    "Prompt",
    "RowEngine",
    "RowTransform",
    "SMCResult",
    "TokenTrie",
    "VLLMEngine",
    "Vocabulary",
    "as_engine",
    "byte_model",
    "byte_sampler",
    "load_model",
    "smc",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "smc":  # the package, which can be called like the function in it
        return import_module("genlm_bytes_smc.smc")
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
