"""A report: words, tables and figures, as one HTML page and as files; how figures look."""

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

INK, FAINT, GRID = "#24292f", "#8c959f", "#e4e7eb"
COLOURS = ("#8250df", "#1a7f37", "#bc4c00", "#0969da", "#bf3989", "#7d8590", "#9a6700", "#0f766e")
MARKERS = "osD^vPX*"


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
        page = folder / "report.html"
        made, shown = [page], []
        for section in self.sections:
            picture = None
            if section.figure is not None:
                for form, dpi in (("png", 130), ("svg", "figure")):
                    made.append((folder / section.name).with_suffix(f".{form}"))
                    write(made[-1], _drawn(section.figure, form, dpi))
                picture = base64.b64encode(_drawn(section.figure, "png", 160)).decode()
            shown.append((section, picture))
        about = {"command": command, **self.about}
        write(page, render("report", **{**vars(self), "sections": shown, "about": about}))
        return made


# Equal figures are equal files: no dates, no random ids.
_SETTINGS: Any = {"svg.hashsalt": "genlm-bytes-smc", "svg.fonttype": "none"}


def _drawn(figure: Figure, form: str, dpi: Any) -> bytes:
    """Return a figure as the content of a file, "png" or "svg"."""
    buffer = io.BytesIO()
    dated = {"Software" if form == "png" else "Date": None}
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, format=form, metadata=dated, dpi=dpi)
    return buffer.getvalue()


# -- how figures look ------------------------------------------------------------------------


def figure(columns: int = 1, rows: int = 1, height: float = 3.4) -> tuple[Figure, list[Any]]:
    """Return a figure and its axes, row by row."""
    made = Figure(figsize=(9.2, height * rows), layout="constrained")
    axes = list(made.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(FAINT)
        axis.tick_params(colors=INK, which="both", labelsize=9)
        axis.grid(True, color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return made, axes


def label(axis: Any, title: str, x: str, y: str) -> None:
    """Set title and names of the axes."""
    axis.set_title(title, fontsize=10.5, color=INK, loc="left")
    axis.set_xlabel(x, fontsize=9.5, color=INK)
    axis.set_ylabel(y, fontsize=9.5, color=INK)


def counts(axis: Any, values: list[float]) -> None:
    """Make an axis logarithmic, with marks at just these counts."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{v:g}" for v in values])
    axis.minorticks_off()


def legend(axis: Any, **options: Any) -> None:
    """Add a legend without a frame."""
    axis.legend(frameon=False, fontsize=8.5, **options)


def style(i: int, **more: Any) -> dict[str, Any]:
    """Return colour and marker of the i-th line."""
    colour = COLOURS[i % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 5} | more
