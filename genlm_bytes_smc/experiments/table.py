"""The experiments by name."""

from __future__ import annotations

from genlm_bytes_smc.experiments import approximation
from genlm_bytes_smc.experiments.job import Experiment

EXPERIMENTS: dict[str, Experiment] = {e.name: e for e in (approximation.EXPERIMENT,)}
