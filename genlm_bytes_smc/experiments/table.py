"""The experiments by name."""

from __future__ import annotations

from genlm_bytes_smc.experiments import approximation, bias, boundary, constrained, scaling
from genlm_bytes_smc.experiments.job import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (approximation, bias, boundary, constrained, scaling)
}
"""What `genlm-bytes-smc experiment NAME` knows."""
