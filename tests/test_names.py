"""What can be imported from the top, and how."""

import genlm_bytes_smc
from genlm_bytes_smc import BeamParams, ByteLLM, ByteRegex, smc
from genlm_bytes_smc.smc import SMCResult
from genlm_bytes_smc.smc import smc as function
from tests.toys import EOS_TOKEN, ToyLM


def test_every_public_name_is_there():
    for name in genlm_bytes_smc.__all__:
        assert getattr(genlm_bytes_smc, name) is not None


async def test_smc_from_the_top_is_the_function_and_the_package():
    llm = ByteLLM(ToyLM(seed=1), BeamParams(3, eos_byte_strings=[EOS_TOKEN]))
    target = llm * ByteRegex("ab|ba")
    a, b = await smc(target, 4, 0.5, 4, seed=1), await function(target, 4, 0.5, 4, seed=1)
    assert isinstance(a, SMCResult)
    assert a.texts == b.texts
    assert smc.smc is function
