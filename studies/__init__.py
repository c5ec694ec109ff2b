"""The five studies of the documents, one script a figure; nothing in the library needs them.

They are packed into the wheel as `genlm_bytes_smc_studies`, so that
`genlm-bytes-smc experiment NAME` runs them there too. A script describes its jobs (seeded,
JSON-able configurations), does one, and makes a report of all; `genlm_bytes_smc.experiments` does
the rest. Scripts import each other relatively, as the package has two names.
"""

from genlm_bytes_smc.experiments.experiment import Experiment

from . import approximation, bias, boundary, constraints, scaling

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (approximation, bias, boundary, constraints, scaling)
}
"""The studies by their names on the command line."""
