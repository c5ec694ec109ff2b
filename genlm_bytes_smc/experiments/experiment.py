"""Experiments as named, seeded jobs, each a JSON-able configuration that becomes a row; reports.

Rows are kept in a file of JSON lines, whole ones only. A report of all rows is words, tables and
figures, as one HTML page and as files.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure

from genlm_bytes_smc import __version__
from genlm_bytes_smc.html import render
from genlm_bytes_smc.smc.files import Field, parse, write

Config = dict[str, Any]
Row = dict[str, Any]

PACKAGES = ("genlm-control", "genlm-bytes", "genlm-backend", "torch", "transformers", "numpy")
OWN = "genlm-bytes-smc"

INK, FAINT, GRID = "#24292f", "#8c959f", "#e4e7eb"
COLOURS = ("#8250df", "#1a7f37", "#bc4c00", "#0969da", "#bf3989", "#7d8590", "#9a6700", "#0f766e")
MARKERS = "osD^vPX*"
# Equal figures are equal files: no dates, no random ids.
_SETTINGS: Any = {"svg.hashsalt": "genlm-bytes-smc", "svg.fonttype": "none"}


class ExperimentError(Exception):
    """An experiment cannot go on; what was done is kept."""


class Outcome(NamedTuple):
    """The result of a job.

    Attributes:
        result: what depends on the configuration alone.
        times: seconds and what follows from them, which differ from run to run.
    """

    result: dict[str, Any]
    times: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Experiment:
    """A named study.

    Attributes:
        name: as on the command line.
        title, question: for people.
        jobs: the configurations, given whether to be quick and which model (a JSON-able
            description, see `models`).
        run: does one; a function of a module, so that other processes find it.
        report: makes figures and words of all rows.
        timed: whether times are what it is about, so that jobs run one after another.
    """

    name: str
    title: str
    question: str
    jobs: Callable[[bool, Config], list[Config]]
    run: Callable[[Config], Outcome]
    report: Callable[[list[Row]], Report]
    timed: bool = False


class Job(NamedTuple):
    """One job, as it travels to a worker."""

    experiment: str
    run: Callable[[Config], Outcome]
    config: Config


def attempt(job: Job) -> Row:
    """Do a job on one thread and return its row; workers call this.

    Raises:
        ExperimentError: the job raised; the message has its error, configuration and trace.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        outcome = job.run(job.config)
    except Exception as error:
        raise ExperimentError(
            f"a job of {job.experiment} failed: {type(error).__name__}: {error}; its "
            f"configuration: {job.config}\n{traceback.format_exc()}"
        ) from None
    finally:
        torch.set_num_threads(threads)
    where = {"seconds": time.perf_counter() - start, "host": socket.gethostname()}
    row: Row = {
        "experiment": job.experiment,
        "config": job.config,
        "result": outcome.result,
        "versions": versions(),
        "run": where | {"pid": os.getpid(), "times": outcome.times},
    }
    return {name: plain(value) for name, value in row.items()}


def key_of(config: Mapping[str, Any]) -> str:
    """Return a configuration as one line of text, equal for equal configurations."""
    return json.dumps(plain(config), sort_keys=True)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version(), OWN: __version__}
    return found | {name: version(name) for name in PACKAGES}


def plain(value: Any) -> Any:
    """Return a value as JSON has it: numpy's numbers as Python's, -inf, inf, nan as text.

    `float` reads the latter back.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class RowFile:
    """Rows as they come in, one JSON object a line; what is there already is kept.

    A line is written in one piece and flushed, so that an interrupt or a crash costs at most
    the line in the making. Such a torn last line is cut off when the file is opened again.

    Use `RowFile.alone`: what one process adds, another would lose when it puts rows in order.

    Raises:
        ValueError: the file holds something else than rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                self.rows.append(_checked(parse(line)))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}, is no row of an experiment ({error}); "
                    "remove the line or choose another folder"
                ) from None
        if whole < len(data):
            os.truncate(path, whole)

    @classmethod
    @contextmanager
    def alone(cls, path: Path) -> Iterator[RowFile]:
        """Open the file, which nobody else opens by this method until the context ends.

        It is made with its folder if it is not there. A lock file beside it is held meanwhile;
        it stays there, and the system frees it if this process dies.

        Raises:
            ExperimentError: another run has the file.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(f"{path}.lock").acquire(blocking=False)
        except Timeout:
            raise ExperimentError(
                f"another run is writing to {path}; wait for its end, or choose another folder"
            ) from None
        with held:
            yield cls(path)

    def append(self, row: Row) -> None:
        """Add a row, to the file at once."""
        with self.path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
        self.rows.append(row)

    def done(self, experiment: str) -> dict[str, Row]:
        """Return rows of this version of the package, by the key of their configuration."""
        mine = versions()[OWN]
        return {
            key_of(row["config"]): row
            for row in self.rows
            if row["experiment"] == experiment and row["versions"].get(OWN) == mine
        }

    def settle(self, experiment: str, configs: list[Config]) -> list[Row]:
        """Put the rows of `configs` in their order, each once, with all others after them."""
        done = self.done(experiment)
        first = [done[key_of(config)] for config in configs]
        replaced = {key_of(config) for config in configs}
        rest = [
            row
            for row in self.rows
            if row["experiment"] != experiment or key_of(row["config"]) not in replaced
        ]
        self.rows = [*first, *rest]
        write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        return first


def _checked(value: Any) -> Row:
    """Return a value that is a row; ValueError for any other."""
    row = Field("row", value)
    for text in (row["experiment"], *row["versions"].members().values()):
        text.text()
    for name in ("config", "result", "run"):
        row[name].members()
    return dict(value)


# -- reports ----------------------------------------------------------------------------------


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


def _drawn(figure: Figure, form: str, dpi: Any) -> bytes:
    """Return a figure as the content of a file, "png" or "svg"."""
    buffer = io.BytesIO()
    dated = {"Software" if form == "png" else "Date": None}
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, format=form, metadata=dated, dpi=dpi)
    return buffer.getvalue()


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
