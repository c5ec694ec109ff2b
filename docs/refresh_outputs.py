"""Runs again what the documents show: `python docs/refresh_outputs.py`.

- In a block that begins with ```console, each line `$ genlm-bytes-smc ...` is run and what it
  prints replaces the lines below it; `$ something | genlm-bytes-smc ...` too. Other commands are
  left as they are.
- The ```python blocks of a document are one program. Where an ```output block follows a block of
  it, what that block prints and the value of its last expression replace the output.
- Each script of examples/ is run, and what it prints is kept in docs/outputs/.

The tests of the documents and examples use these functions to see whether what is shown is
still so. In the README each ```python block is a program of its own, which runs as it stands.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PROGRAM = "genlm-bytes-smc"
README = ROOT / "README.md"
OUTPUTS = ROOT / "docs" / "outputs"
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.M | re.S)
PYTHON = re.compile(
    r"^```python *(?P<kind>[^\n]*)\n(?P<code>.*?)^```$(?:\n+```output\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)


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
    return [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def scripts() -> list[Path]:
    """The examples."""
    return sorted((ROOT / "examples").glob("*.py"))


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


def compiled(source: str, name: str) -> tuple[CodeType, CodeType | None]:
    """Statements, and the last expression by itself; top-level await is allowed."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    body = compile(tree, name, "exec", flags=flags)
    end = compile(ast.Expression(last.value), name, "eval", flags=flags) if last else None
    return body, end


async def execute(source: str, names: dict[str, Any], where: str) -> Any:
    """Run a block as a notebook would and return the value of its last expression."""
    value = None
    for part in compiled(source, where):
        value = eval(part, names) if part else None
        if inspect.iscoroutine(value):
            value = await value
    return value


async def printed(source: str, names: dict[str, Any], where: str) -> str:
    """Run a block and return what it shows: its prints, and the value of its last expression."""
    from IPython.lib.pretty import pretty

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        value = await execute(source, names, where)
    shown = out.getvalue() + ("" if value is None else pretty(value))
    return "\n".join(line.rstrip() for line in shown.rstrip().splitlines()) + "\n"


async def outputs(document: str, name: str, alone: bool = False) -> list[str | None]:
    """Run the Python blocks of a document and return what each shows.

    Args:
        document: its text; blocks marked `python skip` are only compiled, and show None.
        name: of the document, for error messages.
        alone: each block is a program of its own, without an event loop.
    """
    names: dict[str, Any] = {"__name__": "document"}
    shown: list[str | None] = []
    for block in PYTHON.finditer(document):
        where = f"{name}, line {document.count(chr(10), 0, block.start()) + 2}"
        if block["kind"].strip() == "skip":
            compiled(block["code"], where)
            shown.append(None)
        elif alone:
            shown.append(await asyncio.to_thread(program, block["code"]))
        else:
            shown.append(await printed(block["code"], names, where))
    return shown


def program(source: str) -> str:
    """Run a program as it stands and return what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "program", "exec"), {"__name__": "__main__"})
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines()) + "\n"


async def with_outputs(document: str, path: Path) -> str:
    """A document with its Python blocks run again, where it shows what one of them gives."""
    blocks = list(PYTHON.finditer(document))
    if not any(block["output"] is not None for block in blocks):
        return document
    new = await outputs(document, path.name, alone=path == README)
    for block, shown in reversed(list(zip(blocks, new, strict=True))):
        if block["output"] is not None:
            start, end = block.span("output")
            document = document[:start] + (shown or "") + document[end:]
    return document


def with_consoles(document: str) -> str:
    """A document with its console examples run again."""

    def again(found: re.Match[str]) -> str:
        shown = []
        for example in examples(found[0]):
            output = run(*example.parts) if example.parts else example.output
            shown.append(f"$ {example.command}\n{output}")
        return "".join(shown)

    return BLOCK.sub(again, document)


def main(chosen: list[str]) -> None:
    """Rewrite every document and output that has changed, or those whose names are given."""
    for path in [*documents(), *scripts()]:
        if not path.exists() or (chosen and path.name not in chosen):
            continue
        if path.suffix == ".py":
            kept, new = OUTPUTS / f"{path.stem}.txt", program(path.read_text(encoding="utf-8"))
        else:
            kept, new = path, with_consoles(path.read_text(encoding="utf-8"))
            new = asyncio.run(with_outputs(new, path))
        if not kept.exists() or kept.read_text(encoding="utf-8") != new:
            kept.write_text(new, encoding="utf-8")
            sys.stdout.write(f"refreshed {kept.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
