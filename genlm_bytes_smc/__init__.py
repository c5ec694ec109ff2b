"""Byte-level language models from token-level ones, for sequential Monte Carlo.

from genlm_bytes_smc import BeamParams, ByteBeamState, load_model

llm = load_model("tiny")
beam = await ByteBeamState.initial(llm, BeamParams(K=5))
beam = await beam.prefill(b"An apple a day keeps the ")
(await beam.logp_next()).pretty().top(5)
"""

from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.probs import LazyByteProbs
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.single import ByteBeamState
from genlm_bytes_smc.lm.engine import ContextTooLongError, LMCounts, RowEngine
from genlm_bytes_smc.lm.load import as_engine, load_model
from genlm_bytes_smc.lm.rows import BadRowError, RowTransform
from genlm_bytes_smc.trie import TokenTrie
from genlm_bytes_smc.vocab import Vocabulary

__all__ = [
    "BadRowError",
    "BeamParams",
    "ByteBeamState",
    "ByteLanes",
    "ContextTooLongError",
    "LMCounts",
    "LazyByteProbs",
    "Prompt",
    "RowEngine",
    "RowTransform",
    "TokenTrie",
    "Vocabulary",
    "as_engine",
    "load_model",
]

__version__ = "0.1.0"
