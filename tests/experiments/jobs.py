"""An experiment whose jobs are arithmetic, found by worker processes under this name."""

import dataclasses
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np

from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.calls import run_sync
from genlm_bytes_smc.experiments import Experiment, Outcome, Report
from genlm_bytes_smc.experiments.models import fresh_engine, read_texts

N_JOBS = 6


def jobs(quick, model):
    return [{"seed": seed, "fails": False} for seed in range(N_JOBS)]


def timeless(row):
    """A row without what differs from run to run: when, where and how fast."""
    return {k: v for k, v in row.items() if k != "run"}


def run(config):
    if config["fails"]:
        raise ValueError("this one cannot be done")
    value = float(np.random.default_rng(config["seed"]).normal())
    return Outcome({"value": value, "nothing": -np.inf}, {"when": time.time()})


def report(rows):
    return Report("Numbers", "Which?", [f"{len(rows)} rows"])


EXPERIMENT = Experiment("numbers", "Numbers", "which", jobs, run, report)


# -- one whose worker is killed in the middle of a job ----------------------------------------


def deadly(folder, model):
    """As above on a real model; the first worker that comes to job 2 is killed in it."""

    def list_jobs(quick, given):
        return [
            {"seed": seed, "folder": str(folder) if folder else None, "model": model}
            for seed in range(N_JOBS)
        ]

    return Experiment("deadly", "Deadly", "which", list_jobs, run_deadly, report)


def run_deadly(config):
    model = byte_model(fresh_engine(config["model"]))
    text = b"The function returns a list"[: 6 + 2 * config["seed"]]
    found = run_sync(read_texts(model, BeamParams(K=2), [text]))
    if config["seed"] == 2 and config["folder"]:
        mark = Path(config["folder"]) / "killed"
        if not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
    return Outcome({"logp": found.logp[0].tolist(), "rows": found.lm_rows})


def run_lost(config):
    """Every worker that tries is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def slow(config):
    """The first two jobs are done at once; the others take long, and note their process."""
    if config["seed"] >= 2:
        Path(os.environ["SLOW_JOBS"], str(os.getpid())).touch()
        time.sleep(60)
    return run(config)


SLOW = dataclasses.replace(EXPERIMENT, run=slow)


def locking(config):
    """Hold a lock of the system's, as the progress bar of a model that is loaded does."""
    global _lock
    _lock = multiprocessing.get_context("spawn").Lock()
    return run(config)


LOCKING = dataclasses.replace(EXPERIMENT, run=locking)


def interrupted(config):
    """The user presses Ctrl-C during job 3."""
    if config["seed"] == 3:
        raise KeyboardInterrupt
    return run(config)
