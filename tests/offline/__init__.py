"""Imported first of all, by `tests/conftest.py`: from here on no other machine is reached."""

import os
from pathlib import Path

from tests.offline import sitecustomize  # noqa: F401

_PATH = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATH))  # for processes that tests start
# huggingface_hub would fetch a list of coding agents for its user agent, even for local files only.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
