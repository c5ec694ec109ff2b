"""Experiments."""
from genlm_bytes_smc.experiments.runner import run_experiment
