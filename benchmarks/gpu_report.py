"""Records of `benchmarks.gpu` as tables, a figure, and their part of docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.gpu_parts import ON_HOST, TOP, Record
from benchmarks.gpu_stages import STAGES
from benchmarks.gpu_tables import grids, of_part

RAW = Path(__file__).parent / "data" / "gpu_h200.jsonl"
MARK = "gpu"
_SPLIT = (64, 1024)  # particles whose step is drawn by stages
_COLOURS = {"forward": "#0969da", "rows": "#1a7f37", "beam": "#8250df", "constraint": "#bf8700",
            "draw": "#cf222e", "host": "#8c959f"}  # fmt: skip


def read(paths: Sequence[Path]) -> tuple[dict[str, str], list[Record]]:
    """Read recorded runs: what they say of themselves, and their records.

    Where several measured the same, the last counts; a failure counts only if none measured it.

    Raises:
        ValueError: a file is no record of a run, or they come from several devices.
    """
    abouts: list[dict[str, str]] = []
    found: dict[tuple[str, str, str, int], Record] = {}
    for path in paths:
        lines = path.read_text().splitlines()
        try:
            abouts.append(json.loads(lines[0])["about"])
            records = [Record(**json.loads(line)) for line in lines[1:]]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no record of benchmarks.gpu ({type(error).__name__}: {error})"
            ) from error
        for r in records:
            key = r.part, r.model, r.case, r.size
            if not r.problem or key not in found:
                found[key] = r
    devices = sorted({about["device"] for about in abouts})
    if len(devices) > 1:
        raise ValueError(f"runs of several devices cannot be joined: {', '.join(devices)}")
    commands = dict.fromkeys(about["command"] for about in abouts)
    return abouts[-1] | {"command": "; ".join(commands)}, list(found.values())


# -- as text ---------------------------------------------------------------------------------


def describe(records: Sequence[Record], about: dict[str, str]) -> str:
    """Say where, when and by which command, and what copies take."""
    lines = [f"{about['device']}; `{about['command']}`."]
    names = {"copy": "on the device", "pinned": "to page-locked memory of the host",
             "pageable": "to its ordinary memory"}  # fmt: skip
    for r in records:
        if r.part == "copies" and r.values:
            said = [f"{r.values[k] / 1e9:,.4g} GB/s {names[k]}" for k in names if k in r.values]
            lines.append(f"Copies: {', '.join(said)}.")
    return " ".join([*lines, report.describe(about) + "."])


def show(records: Sequence[Record], about: dict[str, str]) -> None:
    """Print the tables."""
    console = Console(width=max(Console().width, 150))
    for grid in grids(records):
        table = Table(title=grid.title, title_justify="left")
        for i in grid.used:
            table.add_column(grid.heads[i], justify="left" if i < 2 else "right")
        last = ""
        for row in grid.rows:
            if row[0] != last:
                table.add_section()
            last = row[0]
            table.add_row(*(_coloured(row[i]) for i in grid.used))
        console.print(table)
    console.print(describe(records, about), markup=False)


def _coloured(cell: str) -> str:
    cell = cell.replace("[", r"\[")
    if cell.endswith(": met"):
        return f"[green]{cell}[/]"
    return f"[red]{cell}[/]" if cell.endswith(": missed") else cell


def markdown(records: Sequence[Record], about: dict[str, str]) -> str:
    """Return the tables as Markdown."""
    lines = []
    for grid in grids(records):
        lines += [f"**{grid.title}**", ""]
        lines.append("| " + " | ".join(grid.heads[i] for i in grid.used) + " |")
        lines.append("|" + "|".join("---" if i < 2 else "--:" for i in grid.used) + "|")
        for row in grid.rows:
            lines.append("| " + " | ".join(row[i].replace("|", r"\|") for i in grid.used) + " |")
        lines.append("")
    return "\n".join([*lines, describe(records, about)])


# -- figure and documents --------------------------------------------------------------------


def figure(records: Sequence[Record], about: dict[str, str]) -> Figure:
    """Draw particle-bytes a second with their floor, a step by stages, and prompts."""
    made = [r for r in records if not r.problem]
    fig = Figure(figsize=(11.5, 3.9), layout="constrained")
    left, middle, right = fig.subplots(1, 3, width_ratios=(1.2, 1.1, 1))
    _rates(left, [r for r in of_part(made, "particles") if r.case != ON_HOST], floor=True)
    left.set_xlabel("particles (dashed: forwards at the memory floor)")
    left.set_title("particle-bytes a second")
    _bars(middle, [r for r in of_part(made, "particles") if r.case != ON_HOST])
    _rates(right, of_part(made, "prompts"), floor=False)
    right.set_xlabel("bytes of prompt")
    right.set_title("reading a prompt: bytes a second")
    fig.suptitle(f"{about['device']}, {about['date']}", fontsize=9)
    return fig


def _rates(ax: Axes, records: Sequence[Record], *, floor: bool) -> None:
    keys = list(dict.fromkeys((r.model, r.case) for r in records))
    for i, (model, case) in enumerate(keys):
        mine = [r for r in records if (r.model, r.case) == (model, case)]
        sizes = [r.size for r in mine]
        label = f"{model}, {'K=5' if case == TOP else case}"
        ax.plot(sizes, [r.values["rate"] for r in mine], "o-", ms=3.5, color=f"C{i}", label=label)
        if floor:
            # A run whose forwards cost no more than reading the weights would make these.
            least = [
                1e3 * r.size / (r.values["forwards"] * r.values["floor_ms"])
                if r.values["forwards"]
                else float("nan")
                for r in mine
            ]
            ax.plot(sizes, least, "--", color=f"C{i}", lw=1, alpha=0.7)
    if keys:
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        shown = sorted({r.size for r in records})
        ax.set_xticks(shown, [f"{size:,}" for size in shown])
        ax.set_xticks([], minor=True)
        ax.legend(frameon=False, fontsize=7)


def _bars(ax: Axes, records: Sequence[Record]) -> None:
    chosen = [r for r in records if r.size in _SPLIT] or list(records)
    names = [
        f"{r.model.removeprefix('Llama-')}, {r.size:,}, {'K=5' if r.case == TOP else r.case}"
        for r in chosen
    ]
    start = [0.0] * len(chosen)
    for stage in STAGES:
        times = [r.values[f"{stage}_ms"] for r in chosen]
        ax.barh(names, times, left=start, color=_COLOURS[stage], label=stage, height=0.7)
        start = [a + b for a, b in zip(start, times, strict=True)]
    if chosen:
        ax.invert_yaxis()
        ax.legend(frameon=False, fontsize=7)
    ax.set_xlabel("ms")
    ax.set_title("a step by stages")


def write_figure(records: Sequence[Record], about: dict[str, str], stem: Path) -> None:
    """Write the figure as PNG and SVG."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    style: dict[Any, Any] = {"svg.hashsalt": "genlm-bytes-smc", "font.size": 8}
    with mpl.rc_context(style):
        fig = figure(records, about)
        fig.savefig(stem.with_suffix(".png"), dpi=150)
        fig.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def block(records: Sequence[Record], about: dict[str, str]) -> str:
    """Return what stands in docs/performance.md: the figure, then the tables."""
    return f"![Particles, stages and prompts](images/gpu.svg)\n\n{markdown(records, about)}"


def update_docs(about: dict[str, str], records: Sequence[Record]) -> None:
    """Put a run into docs/performance.md, its figure beside it, and its records into data."""
    report.put(report.DOCS / "performance.md", block(records, about), MARK)
    write_figure(records, about, report.DOCS / "images" / "gpu")
    lines = [{"about": about}, *(r.line() for r in records)]
    RAW.write_text("".join(json.dumps(line) + "\n" for line in lines))
