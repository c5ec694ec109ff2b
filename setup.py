"""The packages of the wheel; all else stands in pyproject.toml.

pyproject.toml can find packages or rename one, not both. In a wheel the folder studies/ is called
genlm_bytes_smc_studies, as the name "studies" may be somebody else's.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["genlm_bytes_smc*"]),
        "genlm_bytes_smc_studies",
        "genlm_bytes_smc_studies.data",
    ],
    package_dir={"genlm_bytes_smc_studies": "studies"},
)
