"""A report: words, tables and figures, as one HTML page and as files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from genlm_bytes_smc.smc.files import write


@dataclass
class Table:
    """Cells as text; the first column is left aligned, the others right.

    Attributes:
        heads: one a column.
        rows: as many cells each.
        marked: numbers of rows that stand out.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()


@dataclass
class Section:
    """A heading, what is to be seen (plain words, one string a paragraph), a figure, a table.

    Attributes:
        name: of the figure's files.
    """

    heading: str
    words: Sequence[str]
    figure: Figure | None = None
    table: Table | None = None
    name: str = ""


@dataclass
class Report:
    """What is made of all rows.

    Attributes:
        title, question: what it is about.
        findings: the main results, one sentence each.
        sections: in order.
        notes: how it was measured.
    """

    title: str
    question: str
    findings: Sequence[str] = ()
    sections: Sequence[Section] = ()
    notes: Sequence[str] = ()
    about: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path, command: str) -> list[Path]:
        """Write `report.html`, and each figure as PNG and SVG; what was written.

        Args:
            folder: is there.
            command: what makes this report, shown in it.
        """
        made = []
        for section in self.sections:
            if section.figure is not None:
                made += _save(section.figure, folder / section.name)
        page = folder / "report.html"
        write(page, self._page(command))
        return [page, *made]

    def _page(self, command: str) -> str:
        parts = [f"<h1>{html.escape(self.title)}</h1>", f'<p class="q">{_p(self.question)}</p>']
        if self.findings:
            points = "".join(f"<li>{_p(f)}</li>" for f in self.findings)
            parts.append(f'<div class="found"><h2>What was found</h2><ul>{points}</ul></div>')
        for section in self.sections:
            parts.append(f"<h2>{html.escape(section.heading)}</h2>")
            parts += [f"<p>{_p(words)}</p>" for words in section.words]
            if section.figure is not None:
                alt = html.escape(section.heading, quote=True)
                parts.append(f'<figure><img alt="{alt}" src="{_inline(section.figure)}"></figure>')
            if section.table is not None:
                parts.append(_table(section.table))
        parts.append("<h2>How it was measured</h2>")
        parts += [f"<p>{_p(note)}</p>" for note in self.notes]
        facts = {"command": command, **self.about}
        cells = "".join(
            f"<dt>{html.escape(k)}</dt><dd><code>{html.escape(v)}</code></dd>"
            for k, v in facts.items()
        )
        parts.append(f"<dl>{cells}</dl>")
        body = "\n".join(parts)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body><main>\n{body}\n</main></body></html>\n"
        )


def _p(text: str) -> str:
    """Text as HTML, `code` in backquotes."""
    parts = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _table(table: Table) -> str:
    heads = "".join(f"<th>{html.escape(h)}</th>" for h in table.heads)
    lines = []
    for i, row in enumerate(table.rows):
        cells = "".join(f"<td>{_p(cell)}</td>" for cell in row)
        lines.append(f'<tr class="m">{cells}</tr>' if i in table.marked else f"<tr>{cells}</tr>")
    body = "".join(lines)
    return f'<div class="t"><table><tr>{heads}</tr>{body}</table></div>'


# Equal figures are equal files: no dates, no random ids.
_SETTINGS: Any = {"svg.hashsalt": "genlm-bytes-smc", "svg.fonttype": "none"}


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    write(paths[0], _drawn(figure, format="png", dpi=130, metadata={"Software": None}))
    write(paths[1], _drawn(figure, format="svg", metadata={"Date": None}))
    return paths


def _inline(figure: Figure) -> str:
    drawn = _drawn(figure, format="png", dpi=160, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(drawn).decode()


def _drawn(figure: Figure, **options: Any) -> bytes:
    """A figure as the content of a file."""
    buffer = io.BytesIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, **options)
    return buffer.getvalue()


_STYLE = """
:root{color-scheme:light}
body{margin:0;background:#f6f7f9;color:#1f2328;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:980px;margin:0 auto;padding:28px 32px 56px;background:#fff;min-height:100vh}
h1{font-size:27px;line-height:1.25;margin:8px 0 4px}
h2{font-size:19px;margin:34px 0 6px}
p{margin:8px 0;max-width:760px}
.q{color:#57606a;font-size:17px}
.found{background:#f3f0fb;border-left:4px solid #8250df;border-radius:4px;padding:4px 20px 10px;
margin:20px 0}
.found h2{margin:10px 0 2px;font-size:17px}
.found ul{margin:4px 0;padding-left:20px}
.found li{margin:4px 0}
figure{margin:12px 0}
figure img{max-width:100%;height:auto;display:block}
.t{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 9px;text-align:right;border-bottom:1px solid #e4e7eb;white-space:nowrap}
th{font-weight:600;border-bottom:2px solid #c6cbd1;white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
tr.m td{background:#eaf6ec}
code{font:13.5px/1.4 ui-monospace,"DejaVu Sans Mono",Menlo,monospace;background:#f2f3f5;
border-radius:4px;padding:1px 4px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;font-size:14px;margin:14px 0}
dt{color:#57606a}dd{margin:0;overflow-wrap:anywhere}
"""
