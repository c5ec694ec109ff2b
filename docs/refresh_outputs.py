"""Runs the console examples of the documents again: `python docs/refresh_outputs.py`.

In a block that begins with ```console, each line `$ genlm-bytes-smc ...` is run and what it
prints replaces the lines below it; `$ something | genlm-bytes-smc ...` too. Other commands are
left as they are. The test of the documents uses `examples` and `run` to see whether what they
show is still so.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PROGRAM = "genlm-bytes-smc"
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.M | re.S)


class Example(NamedTuple):
    """One command of a document and the output shown for it."""

    command: str
    output: str

    @property
    def parts(self) -> tuple[str, list[str]] | None:
        """What feeds the program, and its arguments; None if it is another program's command."""
        feed, _, command = self.command.rpartition(" | ")
        words = shlex.split(command)
        return (feed, words[1:]) if words[0] == PROGRAM else None


def documents() -> list[Path]:
    """The documents whose examples are run."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(block: str) -> list[Example]:
    """The commands of one console block."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.M)
    return [Example(c, o) for c, o in zip(parts[1::2], parts[2::2], strict=True)]


@contextlib.contextmanager
def fed(command: str) -> Iterator[None]:
    """Have what a shell command prints on stdin, if there is a command."""
    before = sys.stdin
    if command:
        found = subprocess.run(command, shell=True, cwd=ROOT, check=True, capture_output=True)
        sys.stdin = io.TextIOWrapper(io.BytesIO(found.stdout))
    try:
        yield
    finally:
        sys.stdin = before


def run(feed: str, arguments: list[str]) -> str:
    """What the command line prints to stdout.

    Raises:
        RuntimeError: it fails.
    """
    from genlm_bytes_smc.cli import main

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with fed(feed), contextlib.redirect_stdout(out), contextlib.chdir(ROOT):
        code = main(arguments)
        out.flush()
    if code != 0:
        raise RuntimeError(f"{PROGRAM} {shlex.join(arguments)} gave exit code {code}")
    text = out.buffer.getvalue().decode("utf-8")
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(lines).rstrip() + "\n"


def refreshed(document: str) -> str:
    """A document with its examples run again."""

    def again(found: re.Match[str]) -> str:
        shown = []
        for example in examples(found[0]):
            output = run(*example.parts) if example.parts else example.output
            shown.append(f"$ {example.command}\n{output}")
        return "".join(shown)

    return BLOCK.sub(again, document)


def main() -> None:
    """Rewrite every document that has changed."""
    for path in documents():
        if path.exists():
            old = path.read_text(encoding="utf-8")
            new = refreshed(old)
            if new != old:
                path.write_text(new, encoding="utf-8")
                sys.stdout.write(f"refreshed {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
