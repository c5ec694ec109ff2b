"""What the documents show of SmolLM2 is what comes out."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest

from tests.test_docs import alike

DOCS = Path(__file__).parent.parent / "docs"
LINES = r"((?:(?!```).*\n)*)"
SHOWN = re.compile(rf"^```python skip\n{LINES}```\n\n```text\n{LINES}```$", re.M)


def outputs(text):
    """(shown, printed) for each block of a document that is followed by its output."""
    names = {}
    for block in SHOWN.finditer(text):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(block[1], names)  # the documents are ours
        yield block[2], "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


@pytest.mark.real
@pytest.mark.parametrize("name", ["choose.md", "surprisal.md", "lm_eval.md"])
def test_outputs_of_the_real_model(name):
    """Each output shown is printed again, numbers up to rounding."""
    if name == "lm_eval.md" and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("the extra lm-eval is not installed")
    found = list(outputs((DOCS / name).read_text(encoding="utf-8")))
    assert found
    for shown, printed in found:
        assert alike(shown, printed), printed
