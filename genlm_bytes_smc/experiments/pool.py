"""Jobs on this machine's cores: processes of our own, each of which loads a model once.

A process that is lost (killed, out of memory) costs the job it was at: another process takes
its place and the job is done again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from genlm_bytes_smc.experiments.job import ExperimentError, Failure, Job, Row, attempt

MOST_LOSSES = 3  # how often a job may lose its worker

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_here(jobs: Sequence[Job]) -> Iterator[tuple[int, Row]]:
    """(index, row) of each job, done in this process one after another."""
    for index, job in enumerate(jobs):
        yield index, checked(job, attempt(job))


def run_pool(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, Row]]:
    """(index, row) of each job as it is done; closing the iterator ends the workers.

    Raises:
        ExperimentError: a job raised, or lost its worker `MOST_LOSSES` times.
    """
    pool = _Pool(jobs, min(workers, len(jobs)))
    try:
        while pool.busy or pool.pending:
            yield from pool.advance()
    finally:
        pool.close()


def checked(job: Job, answer: Row | Failure) -> Row:
    """The row.

    Raises:
        ExperimentError: it is a failure.
    """
    if isinstance(answer, Failure):
        raise ExperimentError(
            f"a job of {job.experiment} failed: {answer.message}; its configuration: "
            f"{job.config}\n{answer.trace}"
        )
    return answer


def lost(job: Job, losses: int, why: str) -> None:
    """Raise if a job has lost its worker too often.

    Raises:
        ExperimentError: so it is.
    """
    if losses >= MOST_LOSSES:
        raise ExperimentError(
            f"a job of {job.experiment} lost its worker {losses} times ({why}); is there memory "
            f"enough? Its configuration: {job.config}"
        )


class _Pool:
    """Workers, what each is at, and what is still to do."""

    def __init__(self, jobs: Sequence[Job], workers: int) -> None:
        self.jobs = jobs
        self.pending = deque(range(len(jobs)))
        self.losses = [0] * len(jobs)
        self.busy: dict[Connection, tuple[Any, int]] = {}
        self.idle = [_start() for _ in range(workers)]

    def advance(self) -> list[tuple[int, Row]]:
        """Hand out what can be handed out and wait for something to happen."""
        while self.idle and self.pending:
            process, pipe = self.idle.pop()
            index = self.pending.popleft()
            self.busy[pipe] = process, index
            with suppress(OSError):  # it died while idle; heard of below
                pipe.send(self.jobs[index])
        done = []
        ready = set(wait(list(self.busy)))
        for pipe in [p for p in self.busy if p in ready]:
            process, index = self.busy.pop(pipe)
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                self._replace(process, index)
                continue
            self.idle.append((process, pipe))
            done.append((index, checked(self.jobs[index], answer)))
        return done

    def _replace(self, process: Any, index: int) -> None:
        process.join()
        self.losses[index] += 1
        lost(self.jobs[index], self.losses[index], f"exit code {process.exitcode}")
        self.pending.appendleft(index)
        self.idle.append(_start())

    def close(self) -> None:
        """End all workers, those at work too."""
        workers = [*self.idle, *((process, pipe) for pipe, (process, _) in self.busy.items())]
        for process, pipe in workers:
            process.kill()
            process.join()
            pipe.close()


def _start() -> tuple[Any, Connection]:
    # Spawned, not forked: a fork of a process with threads (torch has some) can hang.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), daemon=True)
    with _one_thread():
        process.start()
    there.close()
    return process, here


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started meanwhile compute on one thread each."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends us
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # the parent is gone
            return
        pipe.send(attempt(job))
