"""Processes for jobs: a pool on this machine, or the workers of a Ray cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from typing import Any

from genlm_bytes_smc.experiments.job import ExperimentError, Job, Row, attempt

MOST_LOSSES = 3  # how often jobs are done again whose worker was killed

_IDLE_SECONDS = 60  # after which a worker ends, as its parent may have been killed

# A job computes on one thread; these are read when a worker imports the libraries.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
            initializer=_ignore_interrupts,
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
            pool.shutdown(kill_workers=True)
        if not missing:
            return
    raise _lost(next(iter(missing.values())), lost)


def _lost(job: Job, why: str) -> ExperimentError:
    told = " ".join(why.split())
    return ExperimentError(
        f"a job of {job.experiment} lost its worker {MOST_LOSSES} times ({told}); is there memory "
        f"enough? Its configuration: {job.config}"
    )


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends the workers


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
        _connect(ray, address)
    try:
        most = at_once or max(1, 2 * int(ray.cluster_resources().get("CPU", 1)))
        yield from _on_cluster(ray, jobs, most)
    finally:
        if mine:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, ValueError, OSError) as error:
        told = " ".join(str(error).split())
        raise ExperimentError(f"no Ray cluster at {address!r}: {told}") from None


def _on_cluster(ray: Any, jobs: Sequence[Job], most: int) -> Generator[Row, None, None]:
    task = ray.remote(attempt).options(num_cpus=1, max_retries=MOST_LOSSES - 1)
    todo, flying = list(jobs), dict[Any, Job]()
    try:
        while todo or flying:
            n = most - len(flying)
            flying |= {task.remote(job): job for job in todo[:n]}
            todo = todo[n:]
            [ready], _ = ray.wait(list(flying))
            yield _answer(ray, ready, flying.pop(ready))
    finally:
        for ref in flying:
            ray.cancel(ref, force=True)


def _answer(ray: Any, ref: Any, job: Job) -> Row:
    try:
        row: Row = ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # the job's own error, or one on its way there
        if isinstance(error.cause, ExperimentError):
            raise error.cause from None
        raise ExperimentError(
            f"a job of {job.experiment} could not run on the cluster: {error}"
        ) from None
    except ray.exceptions.RayError as error:
        raise _lost(job, type(error).__name__) from None
    return row
