"""What the documentation site shows beside docs/*.md: mkdocs calls the functions `on_...`.

- a page for each script of examples/, with the output kept in docs/outputs/;
- the notebook, and the options of the command line;
- each file of the repository that a page links to, so that no link leaves the site's reach;
- formulas as MathML, which browsers show without scripts.
"""

from __future__ import annotations

import ast
import contextlib
import html
import posixpath
import re
import unicodedata
from pathlib import Path
from typing import Any

import latex2mathml.converter
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PACKAGE = re.compile(r"^::: ([a-z_.]+)$", re.M)  # and no class
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)(#[^)\s]*)?(?=\))")
VARIANT = re.compile(r'<mi mathvariant="(script|double-struck|bold)">([A-Za-z])</mi>')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
FENCE = "`" * 4


# -- where a file of the repository stands on the site ---------------------------------------


def place(path: str) -> str:
    """Return the page of a file, both from the root of what they lie in (repository, site)."""
    if path.startswith("docs/") and path.endswith((".md", ".svg", ".png", ".html")):
        return path.removeprefix("docs/")
    if path == "docs/basic_usage.ipynb":
        return "basic_usage.md"
    if path == "examples/README.md":
        return "examples/index.md"
    if path.startswith("examples/"):
        return f"{path.removesuffix('.py')}.md"
    stem = path.removesuffix(".md").rstrip("/")
    return f"repository/{stem.replace('README', 'readme')}.md"


def linked(text: str, source: str) -> list[str]:
    """Return the files, from the root of the repository, that a Markdown file links to."""
    found = (posixpath.join(posixpath.dirname(source), m[1]) for m in LINK.finditer(text))
    return [posixpath.normpath(path) for path in found]


def relinked(text: str, source: str, page: str) -> str:
    """Return a Markdown file with its links as they are to be on the site."""

    def target(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        if not (ROOT / path).exists():
            return found[0]  # mkdocs tells of it
        return posixpath.relpath(place(path), posixpath.dirname(page) or ".") + (found[2] or "")

    return LINK.sub(target, text)


# -- generated pages -------------------------------------------------------------------------


def example(script: Path) -> str:
    """Return the page of an example: what its docstring says, its code, what it prints."""
    source = script.read_text(encoding="utf-8")
    title, _, about = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")
    code = source.split('"""', 2)[2].lstrip()
    shown = (ROOT / "docs/outputs" / f"{script.stem}.txt").read_text(encoding="utf-8")
    return (
        f"# {title.rstrip('.')}\n\n{about}\n\n"
        f'{FENCE}python title="examples/{script.name}"\n{code}{FENCE}\n\n'
        f"It prints:\n\n{FENCE}output\n{shown}{FENCE}\n"
    )


def notebook() -> str:
    """Return the notebook as Markdown, its outputs as text."""
    parts = []
    for cell in nbformat.read(ROOT / "docs/basic_usage.ipynb", as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"{FENCE}python\n{cell.source}\n{FENCE}")
        outputs = [o.get("text") or o.data["text/plain"] for o in cell.outputs]
        if outputs:
            parts.append(f"{FENCE}output\n{''.join(outputs).rstrip()}\n{FENCE}")
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """Return the help of all commands."""
    import typer.main
    from typer.cli import get_docs_for_click

    from genlm_bytes_smc.cli import app
    from genlm_bytes_smc.cli.options import PROGRAM

    command: Any = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name=PROGRAM)


def repository_file(path: str) -> str:
    """Return the page of a file of the repository: Markdown, a folder's list, or the text."""
    file = ROOT / path
    if file.is_dir():
        start = posixpath.dirname(place(path))
        inside = [str(p.relative_to(ROOT)) for p in sorted(file.rglob("*.html"))]
        lines = (f"- [{p}]({posixpath.relpath(place(p), start)})" for p in inside)
        return f"# {path}\n\n" + "\n".join(lines) + "\n"
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    return f"# {path}\n\n{FENCE}{'python' if file.suffix == '.py' else 'text'}\n{text}{FENCE}\n"


def members(package: str) -> str:
    """Return an entry for each public name of a package or module, those of its `__all__`."""
    path = ROOT / package.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = sorted(ast.literal_eval(node.value), key=str.lower)
            own = [name for name in names if not (path / name).is_dir()]  # a page of its own
            return "\n\n".join(f"::: {package}.{name}" for name in own)
    return f"::: {package}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}"


# -- what mkdocs calls -----------------------------------------------------------------------

SOURCES: dict[str, str] = {}  # the repository's path of each page whose links are to be put right


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the examples in the navigation, by their files' names."""
    pages = [{p.stem.replace("_", " "): place(f"examples/{p.name}")} for p in EXAMPLES]
    for part in config.nav or []:
        for items in part.values():
            for item in items if isinstance(items, list) else []:
                if isinstance(item, dict) and "Examples" in item:
                    item["Examples"] = ["examples/index.md", *pages]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""

    def add(uri: str, text: str) -> None:
        files.append(File.generated(config, uri, content=text))

    SOURCES.clear()
    for file in files.documentation_pages():
        SOURCES[file.src_uri] = f"docs/{file.src_uri}"
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in SOURCES.values()}
    for script in EXAMPLES:
        add(place(f"examples/{script.name}"), example(script))
    add("basic_usage.md", notebook())
    add("reference/command_line.md", command_line())
    todo = [
        "examples/README.md",
        *(p for source, text in texts.items() for p in linked(text, source)),
    ]
    while todo:
        path = todo.pop()
        page = place(path)
        if (ROOT / path).exists() and not files.get_file_from_path(page):
            text = repository_file(path)
            add(page, text)
            if path.endswith(".md"):
                SOURCES[page] = path
                todo += linked(text, path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put links and fences of a page right, and name what a page of the reference describes."""
    source = SOURCES.get(page.file.src_uri)
    if source:
        markdown = relinked(markdown, source, page.file.src_uri)
    markdown = markdown.replace("```python skip\n", "```python\n")  # a mark for the tests
    return PACKAGE.sub(lambda found: members(found[1]), markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML."""

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        shown = latex2mathml.converter.convert(html.unescape(found[2]).strip(), display=display)
        return f'<{found[1]} class="arithmatex">{VARIANT.sub(letter, shown)}</{found[1]}>'

    def letter(found: re.Match[str]) -> str:
        case = "CAPITAL" if found[2].isupper() else "SMALL"
        name = f"{found[1].upper()} {case} {found[2].upper()}"
        for full in (f"MATHEMATICAL {name}", name):  # browsers know the letters, not the attribute
            with contextlib.suppress(KeyError):
                return f"<mi>{unicodedata.lookup(full)}</mi>"
        return found[0]

    return FORMULA.sub(formula, content)
