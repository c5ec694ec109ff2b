"""Sequential Monte Carlo over bytes.

from genlm_bytes_smc.smc import smc

result = await smc(byte_llm * ByteRegex(r"[a-z]+@[a-z]+[.]com"), n_particles=32, max_bytes=40)
print(result)

The package can itself be called like the function, so `from genlm_bytes_smc import smc` will do.

Here belongs what happens to particles; models, constraints and look-aheads only give it
`lanes.Lanes`. Begin at `loop.step`. Each file imports only files above it in this list:

    resampling, particles     arrays: which particles go on; the particles and their weights
    files, samples, result    states as JSON; weighted texts; what a run returns
    factors, lanes, ensembles the tree of potentials; what each leaf proposes and weighs
    weighers, critics         what changes weights after a byte, and where a block ends
    plan, frontier            checked settings; the distinct texts of all particles
    reading, diagnostics      one symbol in every particle, once or again; what is noted of it
    runs, selection           R runs and their errors; with replacement, or distinct texts
    loop                      `smc`, `run`, `step`
    pooled, exact             runs pooled to one (`lookahead="auto"`); exact samples
    conditional, many         Markov chains; several runs, and bounds on log_ml by them

The schemes, the weighers and the moves can be changed one by one, each has its oracle in
`tests/smc`. The order of random draws (`loop.step`) may not: seeded runs are to stay what they
are, and a batch of runs equals its single runs digit by digit.
"""

import sys
from types import ModuleType

from genlm_bytes_smc import alphabet as alphabet  # first: it imports genlm.control at less cost
from genlm_bytes_smc.smc.conditional import (
    Chains,
    ConditionalResult,
    Held,
    conditional_smc,
    particle_gibbs,
)
from genlm_bytes_smc.smc.exact import (
    exact_sample,
    exact_sample_sync,
    posterior,
    posterior_sync,
)
from genlm_bytes_smc.smc.lanes import BadWeightError
from genlm_bytes_smc.smc.loop import smc, smc_steps
from genlm_bytes_smc.smc.many import (
    Repeats,
    log_ml_bounds,
    log_ml_bounds_sync,
    smc_many,
    smc_many_sync,
    smc_repeat,
    smc_repeat_sync,
    smc_sync,
)
from genlm_bytes_smc.smc.particles import Particles, SMCState, StepInfo, Weights
from genlm_bytes_smc.smc.pooled import Stage, StagedResult
from genlm_bytes_smc.smc.resampling import RESAMPLING, Rollout, Suffix
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.runs import AllParticlesDeadError, RunFailedError
from genlm_bytes_smc.smc.samples import (
    UNDECODABLE,
    UNFINISHED,
    ExactSamples,
    LogMLBounds,
    Posterior,
    TextSamples,
)

__all__ = [
    "RESAMPLING",
    "UNDECODABLE",
    "UNFINISHED",
    "AllParticlesDeadError",
    "BadWeightError",
    "Chains",
    "ConditionalResult",
    "ExactSamples",
    "Held",
    "LogMLBounds",
    "Particles",
    "Posterior",
    "Repeats",
    "Rollout",
    "RunFailedError",
    "SMCResult",
    "SMCState",
    "Stage",
    "StagedResult",
    "StepInfo",
    "Suffix",
    "TextSamples",
    "Weights",
    "conditional_smc",
    "exact_sample",
    "exact_sample_sync",
    "log_ml_bounds",
    "log_ml_bounds_sync",
    "particle_gibbs",
    "posterior",
    "posterior_sync",
    "smc",
    "smc_many",
    "smc_many_sync",
    "smc_repeat",
    "smc_repeat_sync",
    "smc_steps",
    "smc_sync",
]


class _Callable(ModuleType):
    """This package as the function of the same name.

    `from genlm_bytes_smc import smc` gives the package, as importing it makes it an attribute of
    its parent, whatever that had under the name. So that it can be called like the function, and
    `from genlm_bytes_smc.smc import ...` still finds a package, its module needs a class that can.
    """

    __call__ = staticmethod(smc)


sys.modules[__name__].__class__ = _Callable
