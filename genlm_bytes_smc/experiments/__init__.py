"""Experiments on a model: seeded jobs, workers and reports; calibration; a study of a target.

What users run on their own models belongs here. The five studies of the documents are scripts
outside the library, in `studies/`; only `runner.studies` knows of them.

from genlm_bytes_smc.experiments import calibrate, run_experiment

found = await calibrate(llm, texts, tolerance=0.01)  # nats a byte
run_experiment("bias", "out/bias", quick=True)
"""

from typing import TYPE_CHECKING, Any

from genlm_bytes_smc.experiments.advice import Advice, recommend
from genlm_bytes_smc.experiments.calibration import (
    Calibration,
    CalibrationError,
    Point,
    calibrate,
    calibrate_sync,
)
from genlm_bytes_smc.experiments.experiment import (
    Experiment,
    ExperimentError,
    Outcome,
    Report,
    Section,
    Table,
)
from genlm_bytes_smc.experiments.runner import Done, run_experiment, studies
from genlm_bytes_smc.experiments.study import run_study

if TYPE_CHECKING:
    EXPERIMENTS: dict[str, Experiment]

__all__ = [
    "EXPERIMENTS",
    "Advice",
    "Calibration",
    "CalibrationError",
    "Done",
    "Experiment",
    "ExperimentError",
    "Outcome",
    "Point",
    "Report",
    "Section",
    "Table",
    "calibrate",
    "calibrate_sync",
    "recommend",
    "run_experiment",
    "run_study",
]


def __getattr__(name: str) -> Any:
    """Return the studies by name, imported when they are asked for."""
    if name == "EXPERIMENTS":
        return studies()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
