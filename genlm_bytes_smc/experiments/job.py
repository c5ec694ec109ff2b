"""Experiments as named, seeded jobs: each is a JSON-able configuration that becomes a row."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from genlm_bytes_smc.experiments.report import Report

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


def timeless(row: Row) -> Row:
    """Return a row without what differs from run to run: when, where and how fast."""
    return {k: v for k, v in row.items() if k != "run"}


def key_of(config: Mapping[str, Any]) -> str:
    """Return a configuration as one line of text, equal for equal configurations."""
    return json.dumps(plain(config), sort_keys=True)


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (OWN, *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            from genlm_bytes_smc import __version__

            found[name] = __version__ if name == OWN else "?"
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return dict(_versions())


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
