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
    from genlm_bytes_smc.llamppl import ByteContext
    from genlm_bytes_smc.potential import ByteLLM
    from genlm_bytes_smc.proposal import ByteAWRS, ByteProposalSampler, byte_sampler

# What builds on genlm-control and llamppl, imported when first asked for.
_LATER = {
    "ByteAWRS": "genlm_bytes_smc.proposal",
    "ByteContext": "genlm_bytes_smc.llamppl",
    "ByteLLM": "genlm_bytes_smc.potential",
    "ByteProposalSampler": "genlm_bytes_smc.proposal",
    "byte_sampler": "genlm_bytes_smc.proposal",
}

__all__ = [
    "BadRowError",
    "BeamParams",
    "ByteAWRS",
    "ByteBeamState",
    "ByteContext",
    "ByteLLM",
    "ByteLanes",
    "ByteModel",
    "ByteProposalSampler",
    "ContextTooLongError",
    "EngineError",
    "LMCounts",
    "LazyByteProbs",
    "ModelTooLargeError",
    "Prompt",
    "RowEngine",
    "RowTransform",
    "TokenTrie",
    "VLLMEngine",
    "Vocabulary",
    "as_engine",
    "byte_model",
    "byte_sampler",
    "load_model",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
