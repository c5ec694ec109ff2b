"""Experiments as named, seeded jobs: each is a JSON-able configuration that becomes a row.

Rows are kept in a file of JSON lines, whole ones only.
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from genlm_bytes_smc import __version__
from genlm_bytes_smc.experiments.reports import Report
from genlm_bytes_smc.smc.files import Field, parse, write

Config = dict[str, Any]
Row = dict[str, Any]

PACKAGES = ("genlm-control", "genlm-bytes", "genlm-backend", "torch", "transformers", "numpy")
OWN = "genlm-bytes-smc"


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
