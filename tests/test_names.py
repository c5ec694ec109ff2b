"""What can be imported from the top, and how."""

import subprocess
import sys

import genlm_bytes_smc
from genlm_bytes_smc import BeamParams, ByteLLM, ByteRegex, smc
from genlm_bytes_smc.smc import SMCResult
from genlm_bytes_smc.smc import smc as function
from tests.toys import EOS_TOKEN, ToyLM


def test_every_public_name_is_there():
    for name in genlm_bytes_smc.__all__:
        assert getattr(genlm_bytes_smc, name) is not None


def test_all_names_can_be_imported_without_the_optional_packages():
    code = "import sys; sys.modules['llamppl'] = None\nfrom genlm_bytes_smc import *\nprint(dir())"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ByteLLM" in got.stdout
    assert "ByteContext" not in got.stdout


async def test_smc_from_the_top_is_the_function_and_the_package():
    llm = ByteLLM(ToyLM(seed=1), BeamParams(3, eos_byte_strings=[EOS_TOKEN]))
    target = llm * ByteRegex("ab|ba")
    a, b = await smc(target, 4, 0.5, 4, seed=1), await function(target, 4, 0.5, 4, seed=1)
    assert isinstance(a, SMCResult)
    assert a.texts == b.texts
    assert smc.smc is function


def test_the_command_line_starts_without_the_heavy_packages():
    """Ctrl-C while they load is then the command line's to handle; --help is quick."""
    code = "import genlm_bytes_smc.cli, sys; print({'torch', 'transformers'} & set(sys.modules))"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout == "set()\n"


def test_parts_are_there_without_being_imported():
    code = "import genlm_bytes_smc as g; g.beam.params.BeamParams(1); print(g.lookahead.__name__)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout == "genlm_bytes_smc.lookahead\n"
    assert set(genlm_bytes_smc.__all__) <= set(dir(genlm_bytes_smc))
