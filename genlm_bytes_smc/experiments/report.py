"""A report: words, tables and figures, as one HTML page and as files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from genlm_bytes_smc.html import render
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
    """A report made of all rows.

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
        png = {"format": "png", "dpi": 160, "metadata": {"Software": None}}
        drawn = [
            (s, s.figure and base64.b64encode(_drawn(s.figure, **png)).decode())
            for s in self.sections
        ]
        about = {"command": command, **self.about}
        write(page, render("report", **{**vars(self), "sections": drawn, "about": about}))
        return [page, *made]


# Equal figures are equal files: no dates, no random ids.
_SETTINGS: Any = {"svg.hashsalt": "genlm-bytes-smc", "svg.fonttype": "none"}


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    write(paths[0], _drawn(figure, format="png", dpi=130, metadata={"Software": None}))
    write(paths[1], _drawn(figure, format="svg", metadata={"Date": None}))
    return paths


def _drawn(figure: Figure, **options: Any) -> bytes:
    """Return a figure as the content of a file."""
    buffer = io.BytesIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, **options)
    return buffer.getvalue()
