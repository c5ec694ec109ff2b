"""Style of the figures."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

INK, FAINT, GRID = "#24292f", "#8c959f", "#e4e7eb"
COLOURS = ("#8250df", "#1a7f37", "#bc4c00", "#0969da", "#bf3989", "#7d8590", "#9a6700", "#0f766e")
MARKERS = "osD^vPX*"


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
