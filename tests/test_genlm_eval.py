"""The adaptor for genlm-eval, run by its own runner where it is installed."""

import importlib.util
import sys
from typing import Any

import pytest

from genlm_bytes_smc import BeamParams, ByteLLM, ByteRegex
from genlm_bytes_smc.genlm_eval import ByteAdaptor
from tests.toys import EOS_TOKEN, ToyLM

INSTALLED = importlib.util.find_spec("genlm.eval") is not None


def target(instance: Any) -> Any:
    llm = ByteLLM(ToyLM(seed=1), BeamParams(K=None, eos_byte_strings=[EOS_TOKEN]))
    return llm * ByteRegex(instance.pattern)


async def test_without_the_package(monkeypatch):
    """The error names what is missing; bad settings are told at once."""
    monkeypatch.setitem(sys.modules, "genlm.eval", None)
    with pytest.raises(ImportError, match="needs the package genlm-eval"):
        await ByteAdaptor(target)(None)
    with pytest.raises(ValueError, match="n_particles"):
        ByteAdaptor(target, 0)


@pytest.mark.skipif(not INSTALLED, reason="genlm-eval is not installed")
async def test_the_runner_of_genlm_eval():
    """Its runner weighs our texts; one instance that nothing satisfies has no responses."""
    from genlm.eval import Dataset, EvaluationResult, Evaluator, Instance, run_evaluation

    class Pattern(Instance):
        pattern: str

    class Patterns(Dataset):
        schema = Pattern

        def __iter__(self):
            yield Pattern(instance_id=0, pattern="ab|ba")
            yield Pattern(instance_id=1, pattern="xyz")

    class IsAb(Evaluator):
        def evaluate_sample(self, instance, response):
            return EvaluationResult(score=float(response == "ab"), desc="ab")

    adaptor = ByteAdaptor(target, 64, max_bytes=4, seed=2)
    found = await run_evaluation(Patterns(), adaptor, IsAb(), n_replicates=2)
    llm = target(Pattern(instance_id=0, pattern="ab|ba"))
    weights = await llm.batch_complete([[b"a", b"b"], [b"b", b"a"]])
    share = 1 / (1 + float(2.718281828459045 ** (weights[1] - weights[0])))
    accuracy = [r[0]["weighted_accuracy"] for r in found["all_instance_results"]]
    assert accuracy[0] == pytest.approx(share, abs=0.2)
    assert accuracy[1] == 0
