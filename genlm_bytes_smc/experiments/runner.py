"""Run an experiment: the jobs that are not done yet, and the report.

Jobs run in this process, in a pool of processes on this machine, or on a Ray cluster.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import progress as bars
from rich.console import Console

from genlm_bytes_smc.experiments.experiment import (
    Config,
    Experiment,
    ExperimentError,
    Job,
    Row,
    RowFile,
    attempt,
    key_of,
)
from genlm_bytes_smc.experiments.models import TINY
from genlm_bytes_smc.lm.devices import device_of

ROWS = "rows.jsonl"
MOST_LOSSES = 3  # how often jobs are done again whose worker was killed
_IDLE_SECONDS = 60  # after which a worker ends, as its parent may have been killed

# A job computes on one thread; these are read when a worker imports the libraries.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)


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
    if isinstance(experiment, str):
        known = studies()
        if experiment not in known:
            raise ValueError(f"unknown experiment {experiment!r}; known: {', '.join(known)}")
        experiment = known[experiment]
    if workers is not None and (isinstance(workers, bool) or workers < 0):
        raise ValueError(f"workers must be an integer of at least 0, got {workers!r}")
    model = model or TINY
    if model.get("device") is not None and model.get("backend", "hf") == "hf":
        device_of(model["device"], known=True)
    configs = experiment.jobs(quick, model)
    with RowFile.alone(Path(out) / ROWS) as file:
        before = file.done(experiment.name)
        jobs = [Job(experiment.name, experiment.run, c) for c in configs if key_of(c) not in before]
        if jobs:
            results = closing(_where(experiment, jobs, model, workers, ray))
            with _bar(progress) as shown, results as found:
                done = len(configs) - len(jobs)
                task = shown.add_task(experiment.name, total=len(configs), completed=done)
                for row in found:
                    file.append(row)
                    shown.advance(task)
        rows = file.settle(experiment.name, configs)
        report = experiment.report(rows)
        report.about |= rows[0]["versions"]
        if command is None:
            command = f"genlm-bytes-smc experiment {experiment.name} --out {out}"
            command += " --quick" * quick + f" --model {model['name']}" * (model != TINY)
        return Done(rows, report.write(Path(out), command), len(jobs))


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
        from joblib import cpu_count  # of the cores that this process may use

        device = model.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        workers = cpu_count() if str(device) == "cpu" else 1
    return run_pool(jobs, workers) if workers else (attempt(job) for job in jobs)


def _bar(wanted: bool | None) -> bars.Progress:
    """Return a bar on stderr; None: if that is a terminal."""
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left:"),
        bars.TimeRemainingColumn(),
    )
    shown = sys.stderr.isatty() if wanted is None else wanted
    return bars.Progress(*columns, console=Console(stderr=True), disable=not shown)


# -- workers ---------------------------------------------------------------------------------


def run_pool(jobs: Sequence[Job], workers: int) -> Generator[Row, None, None]:
    """Run jobs in processes of this machine and yield each row as it is done.

    Each process loads a model once. Closing the iterator ends the processes, also those at
    work. If one is killed (by the system, for want of memory), what is missing is done again.

    Raises:
        ExperimentError: a job failed, or processes were killed `MOST_LOSSES` times.
    """
    from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor, as_completed

    missing, lost = dict(enumerate(jobs)), ""
    for _ in range(MOST_LOSSES):
        pool = ProcessPoolExecutor(
            min(workers, len(missing)),
            timeout=_IDLE_SECONDS,
            initializer=signal.signal,  # the parent hears an interrupt and ends the workers
            initargs=(signal.SIGINT, signal.SIG_IGN),
            env=_ONE_THREAD,
        )
        try:
            futures = {pool.submit(attempt, job): i for i, job in missing.items()}
            for future in as_completed(list(futures)):
                try:
                    row = future.result()
                except BrokenProcessPool as error:  # of each job that was not done by then
                    lost = str(error)
                    continue
                del missing[futures[future]]
                yield row
        except BrokenProcessPool as error:  # before all jobs were handed over
            lost = str(error)
        finally:
            pool.shutdown(kill_workers=bool(missing))  # idle ones end by themselves
        if not missing:
            return
    raise _lost(next(iter(missing.values())), lost)


def _lost(job: Job, why: str) -> ExperimentError:
    told = " ".join(why.split())
    return ExperimentError(
        f"a job of {job.experiment} lost its worker {MOST_LOSSES} times ({told}); is there memory "
        f"enough? Its configuration: {job.config}"
    )


def run_ray(jobs: Sequence[Job], address: str, at_once: int | None) -> Generator[Row, None, None]:
    """Run jobs on a Ray cluster and yield each row as it is done; closing cancels the others.

    A job is a task of one CPU. Ray keeps processes between tasks, so each loads a model once.

    Args:
        jobs: what to do.
        address: of a cluster ("host:port", "ray://..."), "auto" for one that runs on this
            machine, "local" to start one here for as long as this takes. If Ray is connected
            already, that connection is used.
        at_once: most jobs at a time; None: two a CPU of the cluster, so that no CPU waits.

    Raises:
        ImportError: Ray is not installed.
        ExperimentError: there is no such cluster, a job failed, or it lost its worker
            `MOST_LOSSES` times.
    """
    # Ray warns that a future version will leave CUDA_VISIBLE_DEVICES alone, unless told.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ImportError(
            "running on a Ray cluster needs the package ray: "
            'pip install "genlm-bytes-smc[ray]" here and on the cluster'
        ) from None
    mine = not ray.is_initialized()
    if mine:
        options = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **options)
        except (ConnectionError, ValueError, OSError) as error:
            told = " ".join(str(error).split())
            raise ExperimentError(f"no Ray cluster at {address!r}: {told}") from None
    try:
        most = at_once or max(1, 2 * int(ray.cluster_resources().get("CPU", 1)))
        yield from _on_cluster(ray, jobs, most)
    finally:
        if mine:
            ray.shutdown()


def _on_cluster(ray: Any, jobs: Sequence[Job], most: int) -> Generator[Row, None, None]:
    task = ray.remote(attempt).options(num_cpus=1, max_retries=MOST_LOSSES - 1)
    todo, flying = list(jobs), dict[Any, Job]()
    try:
        while todo or flying:
            n = most - len(flying)
            flying |= {task.remote(job): job for job in todo[:n]}
            todo = todo[n:]
            [ready], _ = ray.wait(list(flying))
            job = flying.pop(ready)
            try:
                row: Row = ray.get(ready)
            except ray.exceptions.RayTaskError as error:  # the job's own, or on its way there
                if isinstance(error.cause, ExperimentError):
                    raise error.cause from None
                told = f"a job of {job.experiment} could not run on the cluster: {error}"
                raise ExperimentError(told) from None
            except ray.exceptions.RayError as error:
                raise _lost(job, type(error).__name__) from None
            yield row
    finally:
        for ref in flying:
            ray.cancel(ref, force=True)
