"""What the command line imports: counted in a fresh process, as seconds depend on the machine."""

import os
import subprocess
import sys

import pytest

HEAVY = {
    "arsenal",
    "genlm.backend",
    "genlm.bytes",
    "genlm.control",
    "huggingface_hub",
    "IPython",
    "jsonschema",
    "llamppl",
    "llguidance",
    "matplotlib",
    "pandas",
    "rfc3987_syntax",
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers",
}
# numba itself imports some of scipy where it is installed, for its version and for BLAS.
NUMBA = """
import numba, sys
numba.njit(lambda x: x + 1)(1)
"""
COMMAND = """
import sys
from genlm_bytes_smc.cli import main
assert main(sys.argv[1:]) == 0
"""
REPORT = "\nsys.stderr.write('\\n'.join(sys.modules))"


def modules_of(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code + REPORT, *arguments],
        input=b"An apple a day",
        capture_output=True,
        check=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return set(done.stderr.decode().splitlines())


@pytest.fixture(scope="module")
def by_numba():
    return {name for name in modules_of(NUMBA) if name.partition(".")[0] == "scipy"}


@pytest.mark.parametrize("command", ["next -", "beam -", "complete - -n 3", "score -", "info"])
def test_a_command_imports_only_what_it_needs(command, by_numba):
    got = modules_of(COMMAND, *command.split())
    assert not HEAVY & got
    assert {name for name in got if name.partition(".")[0] == "scipy"} <= by_numba


AN_ENGINE = """
import sys
from genlm_bytes_smc import load_model
llm = load_model("tiny")
from genlm.backend.llm import AsyncLM
assert isinstance(llm, AsyncLM) and issubclass(type(llm), AsyncLM)
assert not isinstance(llm.encoder, AsyncLM)
"""


def test_an_engine_that_was_made_before_genlm_backend_was_imported_is_an_async_lm():
    assert "genlm.backend" in modules_of(AN_ENGINE)


def test_generating_leaves_out_the_parser_of_international_addresses():
    got = modules_of(COMMAND, "generate", "An apple", "--particles", "2", "--max-bytes", "2")
    assert "genlm.control" in got
    assert "rfc3987_syntax" not in got


@pytest.mark.parametrize("room", ["constraints", "lookahead", "potential", "smc"])
def test_so_does_each_room_alone(room):
    got = modules_of(f"import sys, genlm_bytes_smc.{room}")
    assert "genlm.control" in got
    assert "rfc3987_syntax" not in got


ADDRESSES = """
import sys
from genlm_bytes_smc.alphabet import BYTES
assert "rfc3987_syntax" not in sys.modules
import jsonschema
checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
assert checker.conforms("http://a.example/ü", "iri") and not checker.conforms("http://[", "iri")
import rfc3987_syntax
assert rfc3987_syntax.__file__
"""


def test_formats_are_checked_all_the_same():
    assert "rfc3987_syntax.syntax_helpers" in modules_of(ADDRESSES)


STAND_IN = """
import sys
from importlib.util import find_spec
from genlm_bytes_smc.late_import import imported_late
with imported_late("rfc3987_syntax", "is_valid_syntax"):
    assert find_spec("rfc3987_syntax").name == "rfc3987_syntax"
    from rfc3987_syntax import is_valid_syntax
    assert "rfc3987_syntax.syntax_helpers" not in sys.modules
    from rfc3987_syntax import RFC3987_SYNTAX_TERMS
with imported_late("no_such_package", "f"):
    pass
assert is_valid_syntax("iri", "http://a.example/")
"""


def test_another_name_of_a_late_package_imports_it_at_once():
    assert "rfc3987_syntax.syntax_helpers" in modules_of(STAND_IN)


def test_the_help_page_needs_neither_model_nor_event_loop():
    got = modules_of(COMMAND, "--help")
    assert not {"asyncio", "numpy", "torch", "transformers"} & got
