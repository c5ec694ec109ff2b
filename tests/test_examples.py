"""Every example runs as it stands and prints what the site shows; the README lists them all."""

import re
import runpy
import warnings
from pathlib import Path

import pytest

from tests.test_docs import AGAIN, REAL, alike, refresh_outputs

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = refresh_outputs.scripts()
RUN = [pytest.param(p, marks=REAL if "smollm2" in p.read_text("utf-8") else ()) for p in SCRIPTS]


@pytest.mark.slow
@pytest.mark.parametrize("script", RUN, ids=lambda p: p.stem)
def test_an_example_runs(script, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.filterwarnings("error", category=DeprecationWarning, module="genlm_bytes_smc")
        runpy.run_path(str(script), run_name="__main__")
    shown = (refresh_outputs.OUTPUTS / f"{script.stem}.txt").read_text("utf-8")
    found = capsys.readouterr().out
    assert alike(shown, found), f"{found}\n{AGAIN}"


def test_the_readme_lists_every_example():
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text("utf-8"))
    assert sorted(listed) == [p.name for p in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_an_example_is_short_and_explains_itself(script):
    source = script.read_text("utf-8")
    assert source.startswith('"""')
    assert len(source.splitlines()) < 80
