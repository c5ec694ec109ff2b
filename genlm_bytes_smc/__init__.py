"""Byte-level language models from token-level ones, for sequential Monte Carlo.

from genlm_bytes_smc import BeamParams, ByteBeamState, load_model

llm = load_model("tiny")
beam = await ByteBeamState.initial(llm, BeamParams(K=5))
beam = await beam.prefill(b"An apple a day keeps the ")
(await beam.logp_next()).pretty().top(5)
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genlm_bytes_smc import smc
    from genlm_bytes_smc.beam.display import LazyByteProbs
    from genlm_bytes_smc.beam.lanes import ByteLanes
    from genlm_bytes_smc.beam.model import ByteModel, byte_model
    from genlm_bytes_smc.beam.params import BeamParams
    from genlm_bytes_smc.beam.prompt import Prompt
    from genlm_bytes_smc.beam.single import ByteBeamState
    from genlm_bytes_smc.calls import run_sync
    from genlm_bytes_smc.choosing import Choice, choose, choose_sync
    from genlm_bytes_smc.constraints import (
        ByteGrammar,
        ByteJsonSchema,
        BytePredicate,
        ByteRegex,
        ByteWFSA,
    )
    from genlm_bytes_smc.fast_path import FastPathWarning
    from genlm_bytes_smc.llamppl import ByteContext
    from genlm_bytes_smc.lm.adapter import as_engine
    from genlm_bytes_smc.lm.engine import (
        BadRowError,
        ContextTooLongError,
        EngineError,
        LMCounts,
        RowEngine,
    )
    from genlm_bytes_smc.lm.files import ModelTooLargeError
    from genlm_bytes_smc.lm.load import load_model
    from genlm_bytes_smc.lm.rows import RowTransform
    from genlm_bytes_smc.lm.vllm_engine import VLLMEngine
    from genlm_bytes_smc.potential import ByteLLM
    from genlm_bytes_smc.potential.power_mean import PowerMean, mixture, power_mean, proxy_tuning
    from genlm_bytes_smc.proposal import ByteAWRS, ByteProposalSampler, byte_sampler
    from genlm_bytes_smc.smc import (
        SMCResult,
        exact_sample,
        exact_sample_sync,
        log_ml_bounds,
        log_ml_bounds_sync,
        posterior,
        posterior_sync,
        smc_many_sync,
        smc_repeat_sync,
        smc_sync,
    )
    from genlm_bytes_smc.surprisals import (
        Surprisal,
        compare_surprisal,
        compare_surprisal_sync,
        surprisal,
        surprisal_sync,
    )
    from genlm_bytes_smc.token_proposal import ByteTokenSampler
    from genlm_bytes_smc.trie import TokenTrie, Vocabulary

# Where each name is defined, imported when it is first asked for: torch and transformers take
# seconds, which a help page need not wait for, and in which Ctrl-C shall end the command line
# without a traceback.
_HOMES = {
    "beam.lanes": "ByteLanes",
    "beam.model": "ByteModel byte_model",
    "beam.params": "BeamParams",
    "beam.display": "LazyByteProbs",
    "beam.prompt": "Prompt",
    "beam.single": "ByteBeamState",
    "calls": "run_sync",
    "choosing": "Choice choose choose_sync",
    "constraints": "ByteGrammar ByteJsonSchema BytePredicate ByteRegex ByteWFSA",
    "fast_path": "FastPathWarning",
    "llamppl": "ByteContext",
    "lm.adapter": "as_engine",
    "lm.engine": "BadRowError ContextTooLongError EngineError LMCounts RowEngine",
    "lm.load": "load_model",
    "lm.rows": "RowTransform",
    "lm.files": "ModelTooLargeError",
    "lm.vllm_engine": "VLLMEngine",
    "potential": "ByteLLM",
    "potential.power_mean": "PowerMean mixture power_mean proxy_tuning",
    "proposal": "ByteAWRS ByteProposalSampler byte_sampler",
    "smc": "SMCResult exact_sample exact_sample_sync log_ml_bounds log_ml_bounds_sync posterior "
    "posterior_sync smc_many_sync smc_repeat_sync smc_sync",
    "surprisals": "Surprisal compare_surprisal compare_surprisal_sync surprisal surprisal_sync",
    "token_proposal": "ByteTokenSampler",
    "trie": "TokenTrie Vocabulary",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_PARTS = {home.partition(".")[0] for home in _HOMES}
_PARTS.update(
    ("alphabet", "cli", "experiments", "html", "lookahead", "scoring", "streaming", "viz")
)

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
    "Choice",
    "ContextTooLongError",
    "EngineError",
    "FastPathWarning",
    "LMCounts",
    "LazyByteProbs",
    "ModelTooLargeError",
    "PowerMean",
    "Prompt",
    "RowEngine",
    "RowTransform",
    "SMCResult",
    "Surprisal",
    "TokenTrie",
    "VLLMEngine",
    "Vocabulary",
    "as_engine",
    "byte_model",
    "byte_sampler",
    "choose",
    "choose_sync",
    "compare_surprisal",
    "compare_surprisal_sync",
    "exact_sample",
    "exact_sample_sync",
    "load_model",
    "log_ml_bounds",
    "log_ml_bounds_sync",
    "mixture",
    "posterior",
    "posterior_sync",
    "power_mean",
    "proxy_tuning",
    "run_sync",
    "smc",
    "smc_many_sync",
    "smc_repeat_sync",
    "smc_sync",
    "surprisal",
    "surprisal_sync",
]

# An optional package that is missing must not break `from genlm_bytes_smc import *`.
if find_spec("llamppl") is None:
    __all__.remove("ByteContext")

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME_OF:
        found = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = found
        return found
    if name in _PARTS:  # `smc` is one, which can be called like the function in it
        for home in _HOMES:
            if home.startswith(f"{name}."):
                import_module(f"{__name__}.{home}")
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
