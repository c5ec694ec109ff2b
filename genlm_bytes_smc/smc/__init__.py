"""Sequential Monte Carlo over bytes.

from genlm_bytes_smc.smc import smc

result = await smc(byte_llm * ByteRegex(r"[a-z]+@[a-z]+[.]com"), n_particles=32, max_bytes=40)
print(result)

The package can itself be called like the function, so `from genlm_bytes_smc import smc` will do.
"""

import sys
from types import ModuleType
from typing import Any

from genlm_bytes_smc.smc.conditional import (
    Chains,
    ConditionalResult,
    Held,
    conditional_smc,
    particle_gibbs,
)
from genlm_bytes_smc.smc.factors import BadWeightError
from genlm_bytes_smc.smc.loop import smc, smc_steps
from genlm_bytes_smc.smc.many import Repeats, smc_many, smc_repeat, smc_sync
from genlm_bytes_smc.smc.particles import Particles, SMCState, StepInfo, Weights
from genlm_bytes_smc.smc.resampling import RESAMPLING, Rollout, Suffix
from genlm_bytes_smc.smc.result import UNDECODABLE, UNFINISHED, SMCResult, TextSamples
from genlm_bytes_smc.smc.runs import AllParticlesDeadError, RunFailedError

__all__ = [
    "RESAMPLING",
    "UNDECODABLE",
    "UNFINISHED",
    "AllParticlesDeadError",
    "BadWeightError",
    "Chains",
    "ConditionalResult",
    "Held",
    "Particles",
    "Repeats",
    "Rollout",
    "RunFailedError",
    "SMCResult",
    "SMCState",
    "StepInfo",
    "Suffix",
    "TextSamples",
    "Weights",
    "conditional_smc",
    "particle_gibbs",
    "smc",
    "smc_many",
    "smc_repeat",
    "smc_steps",
    "smc_sync",
]


class _Callable(ModuleType):
    """This package as what `from genlm_bytes_smc import smc` is taken for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See the function `smc`."""
        return smc(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
