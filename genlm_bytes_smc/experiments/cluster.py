"""Jobs on a Ray cluster: the same rows, a lost worker's job done again."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from genlm_bytes_smc.experiments.job import ExperimentError, Job, Row, attempt
from genlm_bytes_smc.experiments.pool import checked, lost


def run_ray(jobs: Sequence[Job], address: str, at_once: int | None) -> Iterator[tuple[int, Row]]:
    """(index, row) of each job as it is done; closing the iterator cancels the others.

    A job is a task of one CPU. Ray keeps processes between tasks, so each loads a model once.

    Args:
        jobs: what to do.
        address: of a cluster ("host:port", "ray://..."), "auto" for one running on this
            machine, "local" to start one here for as long as this takes. If Ray is connected
            already, that connection is used.
        at_once: most jobs at a time; None: two a CPU of the cluster, so that none waits.

    Raises:
        ImportError: Ray is not installed.
        ExperimentError: no cluster there; a job raised, or lost its worker too often.
    """
    ray = _import()
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, address)
    try:
        yield from _run(ray, jobs, at_once or max(1, 2 * int(_cpus(ray))))
    finally:
        if mine:
            ray.shutdown()


def _import() -> Any:
    # Ray warns that a future version will leave CUDA_VISIBLE_DEVICES alone, unless told.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ImportError(
            "running on a Ray cluster needs the package ray: "
            'pip install "genlm-bytes-smc[ray]" here and on the cluster'
        ) from None
    return ray


def _connect(ray: Any, address: str) -> None:
    try:
        options = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, ValueError, OSError) as error:
        told = " ".join(str(error).split())
        raise ExperimentError(f"no Ray cluster at {address!r}: {told}") from None


def _cpus(ray: Any) -> float:
    return float(ray.cluster_resources().get("CPU", 1))


def _run(ray: Any, jobs: Sequence[Job], at_once: int) -> Iterator[tuple[int, Row]]:
    # Retries are ours: Ray's own do not say which job was lost, nor when to give up.
    task = ray.remote(attempt).options(num_cpus=1, max_retries=0)
    pending = deque(range(len(jobs)))
    losses = [0] * len(jobs)
    flying: dict[Any, int] = {}
    try:
        while pending or flying:
            while pending and len(flying) < at_once:
                index = pending.popleft()
                flying[task.remote(jobs[index])] = index
            ready, _ = ray.wait(list(flying), num_returns=1)
            for ref in ready:
                index = flying.pop(ref)
                try:
                    answer = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise ExperimentError(
                        f"a job of {jobs[index].experiment} could not run on the cluster: {error}"
                    ) from None
                except ray.exceptions.RayError as error:
                    losses[index] += 1
                    lost(jobs[index], losses[index], type(error).__name__)
                    pending.appendleft(index)
                    continue
                yield index, checked(jobs[index], answer)
    finally:
        for ref in flying:
            ray.cancel(ref, force=True)
