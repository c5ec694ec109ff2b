"""Every example runs as it stands and prints what it is about; the README lists them all."""

import re
import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SAYS = {
    "cheap_proposal": "estimate, proposed by the narrow beam: ",
    "complete": "likeliest bytes: An apple a day keeps the doctor away.",
    "custom_potential": "digits_sum_to_ten: ",
    "drop_in": "Actions speak louder than words.",
    "ensemble": "tokens: 8192 and 14",
    "infilling": "likeliest: An apple a day",
    "json_record": "records satisfy the schema",
    "llamppl_program": "no text has an e: True",
    "many_texts": "200 texts of 12 bytes",
    "regex_date_email": "e-mail addresses after 'Contact: ':",
    "sql_grammar": "FROM books",
    "unbiased": "unbiased within four standard errors: True",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_an_example_runs(script, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.filterwarnings("error", category=DeprecationWarning, module="genlm_bytes_smc")
        runpy.run_path(str(script), run_name="__main__")
    assert SAYS[script.stem] in capsys.readouterr().out


def test_the_readme_lists_every_example():
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text("utf-8"))
    assert sorted(listed) == [p.name for p in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_an_example_is_short_and_explains_itself(script):
    source = script.read_text("utf-8")
    assert source.startswith('"""')
    assert len(source.splitlines()) < 80
