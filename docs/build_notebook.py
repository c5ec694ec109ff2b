"""Builds and runs docs/basic_usage.ipynb: `python docs/build_notebook.py`.

The notebook takes the steps of genlm-bytes' own introduction, call by call, on the bundled
model. Its text and code stand here; its outputs are what running it printed.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parent / "basic_usage.ipynb"
RANDOM = "random"  # tag of cells whose output differs from run to run

MARKDOWN, CODE = "markdown", "code"
CELLS: list[tuple[str, str, tuple[str, ...]]] = []  # kind, source, tags


def text(source: str) -> None:
    """Add a text cell."""
    CELLS.append((MARKDOWN, source.strip(), ()))


def code(source: str, *tags: str) -> None:
    """Add a code cell."""
    CELLS.append((CODE, source.strip(), tags))


text("""
# Basic usage

The steps of genlm-bytes' introduction, with this package and the small model that comes with it.
Coming from genlm-bytes, change the import; the calls stay as they are.
""")
code("""
from genlm_bytes_smc import BeamParams, ByteBeamState, load_model
""")
text("""
Load a token-level language model. `"tiny"` is bundled and needs no download; a name on the Hugging
Face hub works the same way, and so does a model that genlm-backend has loaded.
""")
code("""
llm = load_model("tiny")
""")
text("""
A beam of at most five candidates that has read nothing yet:
""")
code("""
beam = await ByteBeamState.initial(llm, BeamParams(K=5))
""")
text("""
Read the prompt. Beams are values: `prefill` leaves the old one alone and returns a new one.
""")
code("""
beam = await beam.prefill(b"An apple a day keeps the ")
beam
""")
text("""
* A candidate is one way to cut the text into tokens (purple), with the beginning of a token that is
  still in flight (green).
* Its log weight, in nats, is the log probability of just that: those tokens, then any token that
  begins so.
* `Z` is the log of the sum of the weights: the estimated log probability that the model's text
  begins with these bytes.
* The number in front is the candidate's share of that sum.

`logp_next` gives the log probabilities of the next byte, and of the end of the text.
""")
code("""
logp_next = await beam.logp_next()
logp_next.pretty().top(5)  # the five likeliest
""")
text("""
To go on by a byte, prune back to five candidates and feed the byte in with `<<`:
""")
code("""
new_beam = await (beam.prune() << 100)  # 100 is "d"
new_beam
""")
text("""
A byte can end tokens and so add candidates; pruning keeps the best five:
""")
code("""
pruned_beam = new_beam.prune()
pruned_beam
""")
text("""
`prune_threshold` prunes harder: candidates whose share is at or below it are dropped, and tokens
that would be are never asked for. That saves most calls of the language model.
""")
code("""
beam = await ByteBeamState.initial(llm, BeamParams(K=5, prune_threshold=0.05))
beam = await beam.prefill(b"An apple a day keeps the ")
beam
""")
code("""
logp_next = await beam.logp_next()
logp_next.pretty().top(5)
""")
text("""
All of it together: choose a byte, feed it in, prune, and so on. `greedy` always takes the likeliest
byte; `verbose` shows the beam at each step.
""")
code("""
beam = await ByteBeamState.initial(llm, BeamParams(K=5, prune_threshold=0.05, verbose=True))
sampled = await beam.greedy(b"An apple a day keeps the ", steps=12)
sampled
""")
text("""
`sample` draws each byte from its distribution:
""")
code(
    """
beam = await ByteBeamState.initial(llm, BeamParams(K=5, prune_threshold=0.05, verbose=True))
sampled = await beam.sample(b"An apple a day keeps the ", steps=12)
sampled
""",
    RANDOM,
)
text("""
This package adds a seed, with which the same bytes come every time:
""")
code("""
beam = await ByteBeamState.initial(llm, BeamParams(K=5, prune_threshold=0.05))
await beam.sample(b"The module provides ", steps=40, seed=1)
""")


def build() -> NotebookNode:
    """The notebook, not run."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    for i, (kind, source, tags) in enumerate(CELLS):
        make = nbformat.v4.new_markdown_cell if kind == MARKDOWN else nbformat.v4.new_code_cell
        cell = make(source, id=f"cell-{i}")
        if tags:
            cell.metadata.tags = list(tags)
        notebook.cells.append(cell)
    return notebook


def run(notebook: NotebookNode) -> None:
    """Run every cell in a new kernel and drop what differs from run to run."""
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:  # tqdm, which genlm-bytes imports, misses a widget library
            cell.outputs = [o for o in cell.outputs if "IProgress" not in o.get("text", "")]


def main() -> None:
    """Write the notebook with its outputs."""
    notebook = build()
    run(notebook)
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
