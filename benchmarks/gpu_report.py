"""Records of `benchmarks.gpu` as tables, a figure, and their part of docs/performance.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.gpu_forward import COMPILED, WAYS
from benchmarks.gpu_parts import DEFAULT, ON_HOST, TOP, Record
from benchmarks.gpu_stages import STAGES

RAW = Path(__file__).parent / "data" / "gpu_h200.jsonl"
MARK = "gpu"
_SPLIT = (64, 1024)  # particles whose step is drawn by stages
_SMALL, _LARGE = "Llama-3.2-1B", "Llama-3.1-8B"
_COLOURS = {"forward": "#0969da", "rows": "#1a7f37", "beam": "#8250df", "constraint": "#bf8700",
            "draw": "#cf222e", "host": "#8c959f"}  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """What a value should reach on an H200: at least `bound`, or at most."""

    part: str
    model: str
    size: int | None
    key: str
    bound: float
    cases: tuple[str, ...] = (TOP, DEFAULT)
    at_most: bool = False

    def met(self, record: Record) -> bool:
        """Return whether a record reaches it."""
        value = record.values[self.key]
        return value <= self.bound if self.at_most else value >= self.bound


GOALS = (
    Goal("text", _LARGE, None, "rate", 400, (TOP,)),
    Goal("text", _LARGE, None, "over_floor", 1.5, (TOP,), at_most=True),
    Goal("particles", _LARGE, 64, "rate", 5000),
    Goal("particles", _LARGE, 1024, "rate", 25_000),
    Goal("particles", _LARGE, 64, "inside", 0.85),
    Goal("particles", _SMALL, 64, "inside", 0.6),
)


def goal_of(record: Record, key: str) -> Goal | None:
    """Return the goal of one of a record's values, if there is one."""
    for goal in GOALS:
        if (goal.part, goal.model, goal.key) != (record.part, record.model, key):
            continue
        if record.case in goal.cases and goal.size in (None, record.size):
            return goal
    return None


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


# -- tables ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A table: a title, a head and cells a row; columns that are all empty are left out."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def used(self) -> list[int]:
        """Return the columns that say something."""
        return [i for i in range(len(self.heads)) if any(row[i] for row in self.rows)]


def grids(records: Sequence[Record]) -> list[Grid]:
    """Return the tables of what was measured, and of what was not and why."""
    made = [r for r in records if not r.problem]
    found = [
        Grid(title, heads, rows)
        for title, heads, rows in (
            _agreement(_of(made, "agreement")),
            _forwards(_of(made, "forward")),
            _text(_of(made, "text")),
            _particles(_of(made, "particles")),
            _stages(_of(made, "particles")),
            _prompts(_of(made, "prompts")),
            _contexts(_of(made, "context")),
        )
        if rows
    ]
    missing = [[r.part, r.model, r.case, f"{r.size:,}", r.problem] for r in records if r.problem]
    if missing:
        found.append(Grid("Not measured", ("part", "model", "case", "size", "why"), missing))
    return found


_Cells = tuple[str, tuple[str, ...], list[list[str]]]


def _of(records: Sequence[Record], part: str) -> list[Record]:
    """Return the records of one part, by model in the order they came, case and size."""
    models = list(dict.fromkeys(r.model for r in records))
    order = [TOP, DEFAULT, ON_HOST]
    return sorted(
        (r for r in records if r.part == part),
        key=lambda r: (
            models.index(r.model),
            order.index(r.case) if r.case in order else len(order),
            r.size,
        ),
    )


def _agreement(records: Sequence[Record]) -> _Cells:
    rows = [[r.model, r.case, f"{r.values['apart']:.1e}"] for r in records]
    title = "The device against the CPU: float32, two layers of this vocabulary"
    return title, ("model", "pruning", "largest difference, nats"), rows


def _forwards(records: Sequence[Record]) -> _Cells:
    rows = []
    for model, size in sorted({(r.model, r.size) for r in records}):
        mine = {r.case: r.values for r in records if (r.model, r.size) == (model, size)}
        floor = next(iter(mine.values()))["floor_ms"]
        times = [_number(mine[w]["ms"]) if w in mine else "" for w in (*WAYS, COMPILED)]
        ratio = f"{mine['engine']['ms'] / floor:.2f}" if "engine" in mine else ""
        rows.append([model, f"{size:,}", _number(floor), *times, ratio])
    heads = ("model", "positions", "floor", "engine", "without a graph", "transformers' modules")
    return "One decoding forward, ms", (*heads, "torch.compile", "engine / floor"), rows


def _text(records: Sequence[Record]) -> _Cells:
    rows = [
        [
            r.model, r.case, *_with_goal(r, "rate", lambda x: f"{x:,.0f}"), _value(r, "ms"),
            _value(r, "forwards"), _value(r, "rows"), *_with_goal(r, "over_floor", _number),
            _share(r), _value(r, "waits"), _value(r, "waits_inside"), _memory(r),
        ]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "bytes/s", "goal", "ms a byte", "forwards", "rows")
    more = ("time / floor", "goal", "in the forward", "waits", "waits in it", "peak memory")
    return "One text; forwards, rows and waits a byte", heads + more, rows


def _particles(records: Sequence[Record]) -> _Cells:
    rows = [
        [
            r.model, r.case, f"{r.size:,}", *_with_goal(r, "rate", lambda x: f"{x:,.0f}"),
            *(_value(r, k) for k in ("ms", "forwards", "rows", "lanes", "waits", "waits_inside")),
            _memory(r),
        ]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "particles", "particle-bytes/s", "goal", "ms a step")
    more = ("forwards", "rows", "distinct texts", "waits", "waits in the forward", "peak memory")
    return "Particles; forwards, rows and waits a step", heads + more, rows


def _stages(records: Sequence[Record]) -> _Cells:
    rows = [
        [
            r.model, r.case, f"{r.size:,}", *(_value(r, f"{stage}_ms") for stage in STAGES),
            *_with_goal(r, "inside", lambda x: f"{x:.0%}"),
        ]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "particles", "forward", "rows stored", "beam", "constraint")
    title = "A step by stages, ms, with a wait for the device around each"
    return title, (*heads, "draw", "host", "in the forward", "goal"), rows


def _prompts(records: Sequence[Record]) -> _Cells:
    rows = [
        [
            r.model, r.case, f"{r.size:,}", f"{r.values['rate']:,.0f}",
            f"{r.values['ms'] * r.size:,.0f}", f"{r.values['forwards'] * r.size:.0f}",
            _value(r, "forwards"), _value(r, "rows"), _memory(r),
        ]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "bytes", "bytes/s", "ms in all", "forwards in all")
    title = "Reading a prompt"
    return title, (*heads, "forwards a byte", "rows a byte", "peak memory"), rows


def _contexts(records: Sequence[Record]) -> _Cells:
    rows = [
        [r.model, r.case, f"{r.size:,}", *(_value(r, k) for k in ("ms", "forwards", "rows")),
         _memory(r)]
        for r in records
    ]  # fmt: skip
    heads = ("model", "pruning", "bytes of prompt", "ms a step", "forwards", "rows", "peak memory")
    return "A step of 64 particles after a prompt", heads, rows


def _with_goal(record: Record, key: str, shown: Callable[[float], str]) -> tuple[str, str]:
    """Return a value and what is said of its goal."""
    if key not in record.values:
        return "", ""
    goal, text = goal_of(record, key), shown(record.values[key])
    if goal is None:
        return text, ""
    sign = "at most" if goal.at_most else "at least"
    return text, f"{sign} {shown(goal.bound)}: {'met' if goal.met(record) else 'missed'}"


def _value(record: Record, key: str) -> str:
    return _number(record.values[key]) if key in record.values else ""


def _share(record: Record) -> str:
    return f"{record.values['inside']:.0%}" if "inside" in record.values else ""


def _memory(record: Record) -> str:
    size = record.values.get("peak_bytes")
    return "" if size is None else f"{size / 2**30:.1f} GiB"


def _number(x: float) -> str:
    if x >= 1000:
        return f"{x:,.0f}"
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


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
    _rates(left, [r for r in _of(made, "particles") if r.case != ON_HOST], floor=True)
    left.set_xlabel("particles (dashed: forwards at the memory floor)")
    left.set_title("particle-bytes a second")
    _bars(middle, [r for r in _of(made, "particles") if r.case != ON_HOST])
    _rates(right, _of(made, "prompts"), floor=False)
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


def update_docs(about: dict[str, str], records: Sequence[Record]) -> None:
    """Put a run into docs/performance.md, its figure beside it, and its records into data."""
    report.put(report.DOCS / "performance.md", markdown(records, about), MARK)
    write_figure(records, about, report.DOCS / "images" / "gpu")
    lines = [{"about": about}, *(r.line() for r in records)]
    RAW.write_text("".join(json.dumps(line) + "\n" for line in lines))
