"""How many Python functions and compiled functions one particle step calls."""

import sys
from collections import Counter
from pathlib import Path

import numba
import numpy as np
import pytest

import genlm_bytes_smc
from genlm_bytes_smc import BeamParams, ByteLLM, load_model
from genlm_bytes_smc.beam.params import default_params
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.smc import smc_steps

PACKAGE = Path(genlm_bytes_smc.__file__).parent
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"

SMC_CALLS = 100  # Python calls of a step besides those in beam/ and lm/
# Python calls of a step, and calls of compiled functions. The default pruning looks again where a
# constraint admits little, and judges anew where a text ends.
LIMITS = {"topk": (200, 4), "deferred": (310, 13)}
USUAL = {"topk": (200, 4), "deferred": (240, 8)}  # of half of the steps


class Calls:
    """Counts of calls while it is on.

    Attributes:
        python: functions of this package, by folder (generators and coroutines count each time
            that they go on).
        compiled: functions compiled by numba, by name.
    """

    def __init__(self, monkeypatch):
        self.python, self.compiled = Counter(), Counter()
        dispatcher = numba.core.registry.CPUDispatcher
        for name, module in list(sys.modules.items()):
            if not name.startswith("genlm_bytes_smc."):
                continue
            for key, value in list(vars(module).items()):
                if isinstance(value, dispatcher):
                    monkeypatch.setattr(module, key, self._counted(key, value))

    def _counted(self, name, function):
        def call(*args):
            self.compiled[name] += 1
            return function(*args)

        return call

    def _profile(self, frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            self.python[path.relative_to(PACKAGE).parts[0]] += 1

    def on(self):
        self.python.clear()
        self.compiled.clear()
        sys.setprofile(self._profile)

    def off(self):
        sys.setprofile(None)
        return Counter(self.python), Counter(self.compiled)


async def steps(target, calls=None):
    """What each step of a run called, and its record."""
    out = []
    run = smc_steps(target, 16, 0.5, 40, seed=1)
    async for state in run:
        if calls is not None:
            counts = calls.off()
            if state.history:
                out.append((*counts, state.history[-1]))
            calls.on()
    if calls is not None:
        calls.off()
    return out


@pytest.mark.parametrize(
    "params",
    [BeamParams(K=5, prune_threshold=0.05), default_params()],
    ids=["topk", "deferred"],
)
async def test_the_calls_of_a_warm_particle_step(monkeypatch, params):
    target = ByteLLM(load_model("tiny"), params, prompt=b"Date: ") * ByteRegex(DATE)
    await steps(target)  # compiles, and reads every text once
    counted = await steps(target, Calls(monkeypatch))
    assert len(counted) == 11
    totals = []
    for python, compiled, info in counted:
        whole = sum(python.values())
        own = whole - python["beam"] - python["lm"]
        parts = ", ".join(f"{part} {n}" for part, n in python.most_common())
        print(
            f"step {info.step}{' (resampled)' if info.ancestors is not None else ''}: "
            f"{whole} Python calls ({parts}), {sum(compiled.values())} compiled "
            f"({', '.join(f'{name} {n}' for name, n in compiled.items())})"
        )
        assert own <= SMC_CALLS
        totals.append((whole, sum(compiled.values())))
    assert (np.max(totals, axis=0) <= LIMITS[params.prune]).all()
    assert (np.median(totals, axis=0) <= USUAL[params.prune]).all()
    assert any(info.ancestors is not None for _, _, info in counted)


if __name__ == "__main__":
    pytest.main([__file__, "-s"])
