"""`ByteAdaptor`: SMC runs as a model of genlm-eval.

    await run_evaluation(dataset, ByteAdaptor(target, n_particles=32), evaluator)

Needs the package genlm-eval, which is not a dependency.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.smc import AllParticlesDeadError, smc


class ByteAdaptor:
    """A model of genlm-eval that answers an instance with the texts of an SMC run.

    Args:
        target: returns the target of an instance: a `ByteLLM` after its prompt, times
            constraints.
        n_particles, ess_threshold, max_bytes: as for `smc`.
        seed: of replicate 0; replicate r takes `seed + r`.
        **options: further options of `smc`.

    Raises:
        ValueError, TypeError: a number of particles or bytes out of range.
    """

    def __init__(
        self,
        target: Callable[[Any], Any],
        n_particles: int = 16,
        ess_threshold: float = 0.5,
        max_bytes: int = 100,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_count("n_particles", n_particles, 1)
        check_count("max_bytes", max_bytes, 1)
        self.target, self.seed, self.options = target, seed, options
        self.settings = (n_particles, ess_threshold, max_bytes)

    async def __call__(
        self, instance: Any, output_dir: str | None = None, replicate: int = 0
    ) -> Any:
        """Return a `ModelOutput` of genlm-eval: each text that has ended, with its probability.

        Texts that are no UTF-8 or have not ended are left out, and their probability with them.
        Where all particles died there are no responses.

        Raises:
            ImportError: genlm-eval is not installed.
        """
        try:
            theirs = import_module("genlm.eval")
        except ImportError:
            told = "ByteAdaptor needs the package genlm-eval, which is missing"
            raise ImportError(told) from None
        target, seed = self.target(instance), self.seed + replicate
        try:
            result = await smc(target, *self.settings, seed=seed, **self.options)
        except AllParticlesDeadError as error:
            result = error.result
        posterior = [(t, p) for t, p in result.decoded_posterior.items() if isinstance(t, str)]
        responses = [theirs.ModelResponse(response=text, weight=p) for text, p in posterior]
        return theirs.ModelOutput(
            responses=responses, runtime_seconds=result.seconds, metadata=result.metrics()
        )
