"""Run an experiment: the jobs that are not done yet, where they shall run, and the report."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich import progress as bars
from rich.console import Console

from genlm_bytes_smc.experiments.job import (
    Config,
    Experiment,
    ExperimentError,
    Job,
    Row,
    attempt,
    key_of,
)
from genlm_bytes_smc.experiments.models import TINY
from genlm_bytes_smc.experiments.rows import RowFile
from genlm_bytes_smc.experiments.workers import cores, run_pool, run_ray
from genlm_bytes_smc.lm.devices import device_of

ROWS = "rows.jsonl"


class Done(NamedTuple):
    """Rows and files of an experiment.

    Attributes:
        rows: one a job, in the order of the jobs.
        files: what was written, the report first.
        ran: how many jobs were done now; the others were done before.
    """

    rows: list[Row]
    files: list[Path]
    ran: int


def run_experiment(
    experiment: str | Experiment,
    out: str | Path,
    *,
    quick: bool = False,
    model: Config | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool | None = None,
    command: str | None = None,
) -> Done:
    """Do the jobs of an experiment that are not done yet, and write its report.

    The folder gets `rows.jsonl` (a row a job, as it is done), figures as PNG and SVG, and
    `report.html`. If it is interrupted, what was done stays, and the next call goes on.

    Args:
        experiment: one of `EXPERIMENTS`, by name, or one of your own.
        out: the folder.
        quick: a small version, of less than a minute.
        model: {"name", "backend", "device"} as for `load_model`; None: the bundled one.
        workers: processes on this machine; 0: none but this one; None: one a core (one in
            all if the model is on a device, or if times are what it is about).
        ray: run on a Ray cluster instead: its address, "auto" or "local" (see `run_ray`);
            `workers` is then the most jobs at a time.
        progress: a bar on stderr (None: if it is a terminal).
        command: shown in the report as what makes it.

    Raises:
        ValueError: an unknown experiment or device, or a file of other rows.
        ImportError: Ray is asked for and not installed.
        ExperimentError: a job failed, or lost its worker again and again; another run is
            writing to the folder.
    """
    chosen = find(experiment) if isinstance(experiment, str) else experiment
    if workers is not None and (isinstance(workers, bool) or workers < 0):
        raise ValueError(f"workers must be an integer of at least 0, got {workers!r}")
    model = model or TINY
    if model.get("device") is not None and model.get("backend", "hf") == "hf":
        device_of(model["device"], known=True)
    configs = chosen.jobs(quick, model)
    with RowFile.alone(Path(out) / ROWS) as file:
        rows, ran = _rows(file, chosen, configs, model, workers, ray, progress)
        report = chosen.report(rows)
        report.about |= rows[0]["versions"]
        if command is None:
            command = f"genlm-bytes-smc experiment {chosen.name} --out {out}" + " --quick" * quick
            command += "" if model == TINY else f" --model {model['name']}"
        return Done(rows, report.write(Path(out), command), ran)


def _rows(
    file: RowFile,
    chosen: Experiment,
    configs: list[Config],
    model: Config,
    workers: int | None,
    ray: str | None,
    progress: bool | None,
) -> tuple[list[Row], int]:
    """Return a row for each configuration, and how many of them were made now."""
    done = file.done(chosen.name)
    todo = [c for c in configs if key_of(c) not in done]
    jobs = [Job(chosen.name, chosen.run, c) for c in todo]
    if jobs:
        bar = _bar(chosen.name, len(configs), len(configs) - len(jobs), progress)
        with bar as step, closing(_where(chosen, jobs, model, workers, ray)) as results:
            for row in results:
                file.append(row)
                step()
    return file.settle(chosen.name, configs), len(jobs)


def studies() -> dict[str, Experiment]:
    """Return the five studies by name.

    Raises:
        ImportError: neither the wheel nor the source tree with them is installed.
    """
    for name in ("genlm_bytes_smc_studies", "studies"):  # in a wheel; in the source tree
        if importlib.util.find_spec(name) is not None:
            found: dict[str, Experiment] = importlib.import_module(name).EXPERIMENTS
            return found
    raise ImportError("the studies are not installed: no package genlm_bytes_smc_studies")


def find(name: str) -> Experiment:
    """Return the study of that name.

    Raises:
        ValueError: there is none; it names those there are.
    """
    known = studies()
    if name not in known:
        raise ValueError(f"unknown experiment {name!r}; known: {', '.join(known)}")
    return known[name]


def _where(
    experiment: Experiment,
    jobs: Sequence[Job],
    model: Config,
    workers: int | None,
    ray: str | None,
) -> Generator[Row, None, None]:
    """Return an iterator over the rows of jobs, wherever they run."""
    if experiment.timed:
        if workers is not None and workers > 1:
            raise ExperimentError(
                f"{experiment.name} measures times, so its jobs run one after another; "
                f"got workers={workers}"
            )
        workers = 1 if workers is None else workers
    if ray is not None:
        return run_ray(jobs, ray, workers or None)
    if workers is None:
        workers = cores() if _on_cpu(model) else 1
    return run_pool(jobs, workers) if workers else (attempt(job) for job in jobs)


def _on_cpu(model: Config) -> bool:
    import torch

    device = model.get("device")
    return str(device) == "cpu" if device else not torch.cuda.is_available()


@contextmanager
def _bar(name: str, total: int, done: int, wanted: bool | None) -> Iterator[Any]:
    if wanted is None:
        wanted = sys.stderr.isatty()
    if not wanted:
        yield lambda: None
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left:"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(name, total=total, completed=done)
        yield lambda: shown.advance(task)
