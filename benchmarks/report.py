"""Records as a table, a figure, JSON lines, and the part of docs/performance.md they fill."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Record

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PACKAGES = ("genlm-bytes-smc", "genlm-bytes", "genlm-backend", "torch", "transformers", "numba")
HEADS = ("", "threads", "this package", "genlm-bytes", "ratio", "(CPU time)", "goal")
HEADS += ("log Z apart", "rows a byte")
INK, FAINT, PURPLE, GREEN, ORANGE = "#24292f", "#8c959f", "#8250df", "#1a7f37", "#bc4c00"
TITLES = {
    "a": "engine alone: n-gram LM, 50,257 tokens, K=5",
    "b": "trie of the vocabulary",
    "c": "{model}, K=5, threshold 0.05",
    "d": "many lanes and long contexts, {model} (second column: the easy case)",
    "e": "work asked of the model, {model}",
}


def machine(model: str = "tiny") -> dict[str, str]:
    """Collect what figures depend on: model, versions, processor, threads, and when."""
    out = {"date": date.today().isoformat(), "python": platform.python_version()}
    out["model"] = "bundled model" if model == "tiny" else model
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except Exception:  # run from a source tree
            from genlm_bytes_smc import __version__

            out[name] = __version__
    out |= {"system": platform.system(), "cpu": _processor(), "cores": str(os.cpu_count())}
    out["default threads"] = str(torch.get_num_threads())
    return out


def _processor() -> str:
    info = Path("/proc/cpuinfo")  # platform does not say on Linux
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({platform.machine()})"
    return platform.processor() or platform.machine()


# -- as text ---------------------------------------------------------------------------------


def show(records: Sequence[Record], about: dict[str, str]) -> None:
    """Print everything."""
    table = Table(title="genlm-bytes-smc against genlm-bytes", title_justify="left")
    for i, head in enumerate(HEADS):
        table.add_column(head, justify="left" if i == 0 else "right")
    part = ""
    for record in records:
        if record.part != part:
            part = record.part
            table.add_section()
            table.add_row(f"[bold]{part}  {TITLES[part].format(**about)}[/]")
        style = {True: "green", False: "red", None: None}[record.met]
        cells = _cells(record)
        cells[4] = f"[{style}]{cells[4]}[/]" if style else cells[4]
        table.add_row(*cells)
    console = Console(width=max(Console().width, 150))
    console.print(table)
    console.print(describe(about))


def describe(about: dict[str, str]) -> str:
    """One line on where and with what."""
    packages = ", ".join(f"{name} {about[name]}" for name in ("python", *PACKAGES))
    return (
        f"{about['date']}; {about['cpu']}, {about['cores']} cores, {about['system']}; torch's "
        f"default is {about['default threads']} threads; {packages}"
    )


def _cells(r: Record) -> list[str]:
    """Return a record's line of the table."""
    unit = "" if r.unit in ("per byte", "per step", "per lane and byte") else f" {r.unit}"
    work = [r.work[k] for k in ("ours_rows", "peer_rows") if k in r.work]
    return [
        r.case if unit else f"{r.case}, {r.unit}",
        "" if r.part in "be" else r.threads,
        _number(r.ours) + unit,
        "" if r.peer is None else _number(r.peer) + unit,
        "" if r.ratio is None else f"{_number(r.ratio)}x",
        "" if r.cpu_ratio is None else f"{_number(r.cpu_ratio)}x",
        "" if r.goal is None else f"{'<' if r.at_most else '>='} {r.goal:g}x",
        "" if r.apart is None else f"{r.apart:.1e} of {abs(r.log_z or 0):.0f}",
        " / ".join(f"{x:.2f}" for x in work),
    ]


def _number(x: float) -> str:
    if x >= 1000:
        return f"{x:,.0f}"
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def markdown(records: Sequence[Record], about: dict[str, str]) -> str:
    """Return the table as Markdown."""
    lines = []
    for part, title in TITLES.items():
        mine = [r for r in records if r.part == part]
        if not mine:
            continue
        title = title.format(**about)
        lines += [f"**{part}. {title[0].upper()}{title[1:]}**", ""]
        rows = [_cells(r) for r in mine]
        used = [i for i in range(len(HEADS)) if i == 0 or any(row[i] for row in rows)]
        lines.append("| " + " | ".join(HEADS[i] for i in used) + " |")
        lines.append("|" + "|".join("---" if i == 0 else "--:" for i in used) + "|")
        lines += ["| " + " | ".join(row[i] for i in used) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, describe(about) + "."])


# -- as files --------------------------------------------------------------------------------


def write(records: Sequence[Record], about: dict[str, str], out: Path, *, quick: bool) -> None:
    """Write `beam.jsonl` (first line: the machine), `beam.png` and `beam.svg` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"about": about, "quick": quick})
    lines = [head, *(r.to_json() for r in records)]
    (out / "beam.jsonl").write_text("\n".join(lines) + "\n")
    _save(records, out / "beam")


def update_docs(records: Sequence[Record], about: dict[str, str]) -> None:
    """Put the table, and the figure of the bundled model, into docs/performance.md."""
    bundled = about["model"] == "bundled model"
    put(DOCS / "performance.md", markdown(records, about), "" if bundled else about["model"])
    if bundled:
        _save(records, DOCS / "images" / "performance")


def put(page: Path, table: str, model: str = "") -> None:
    """Replace what stands between the marks of a page, those of a model if it is named.

    Raises:
        ValueError: the page does not have both marks, once each and in order.
    """
    begin, end = (m.replace("measured", f"measured {model}".strip()) for m in (BEGIN, END))
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(
            f"{page} must have the mark {begin!r} once and {end!r} once behind it, got "
            f"{text.count(begin)} and {text.count(end)}: nothing was written"
        )
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}")


def _save(records: Sequence[Record], stem: Path) -> None:
    style = {"svg.hashsalt": "genlm-bytes-smc", "font.size": 9, "text.color": INK}
    with mpl.rc_context(style):
        fig = figure(records)
        if fig is not None:
            stem.parent.mkdir(parents=True, exist_ok=True)
            fig.savefig(stem.with_suffix(".png"), dpi=150)
            fig.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def figure(records: Sequence[Record]) -> Figure | None:
    """Ratios as bars on a logarithmic axis, with the goals; None if there are no ratios."""
    bars = [r for r in records if r.goal is not None and r.ratio is not None]
    if not bars:
        return None
    fig = Figure(figsize=(8, 1.0 + 0.27 * len(bars)), layout="constrained")
    ax = fig.subplots()
    for i, r in enumerate(bars):
        color = GREEN if r.met else ORANGE
        ax.barh(i, r.ratio, color=color, alpha=0.75, height=0.7)
        ax.plot([r.goal, r.goal], [i - 0.42, i + 0.42], color=INK, lw=1.6)
        ax.text(r.ratio * 1.06, i, f"{_number(r.ratio)}x", va="center", color=INK)
    threads = {"1": "1 thread", "default": "default threads", "": ""}
    names = [
        r.case if r.part == "b" else f"{r.case}, {threads.get(r.threads, r.threads)}" for r in bars
    ]
    ax.set_yticks(range(len(bars)), names)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlim(1, 3 * max(max(r.ratio, r.goal) for r in bars))
    ax.set_xlabel(
        "times faster or smaller than genlm-bytes;\n"
        "of lanes and lengths, times dearer\n"
        "(black line: the goal, to exceed for the former\n"
        "and stay below for the latter)"
    )
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return fig
