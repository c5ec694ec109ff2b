"""Importance-weighted sampling, measured: studies with figures, calibration, recommendations.

from genlm_bytes_smc.experiments import calibrate, run_experiment

found = await calibrate(llm, texts, tolerance=0.01)  # nats a byte
run_experiment("bias", "out/bias", quick=True)
"""

from genlm_bytes_smc.experiments.advice import Advice, recommend
from genlm_bytes_smc.experiments.calibration import (
    Calibration,
    CalibrationError,
    Point,
    calibrate,
    calibrate_sync,
)
from genlm_bytes_smc.experiments.job import Experiment, ExperimentError, Outcome
from genlm_bytes_smc.experiments.report import Report, Section, Table
from genlm_bytes_smc.experiments.runner import Done, run_experiment
from genlm_bytes_smc.experiments.study import run_study
from genlm_bytes_smc.experiments.table import EXPERIMENTS

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
