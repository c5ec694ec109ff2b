"""What vLLM is told by environment variables: all of it, in this one place.

vLLM takes some choices from the environment only, and reads them while an engine is made.
Importing genlm-backend sets three of them for its own `AsyncVirtualLM`, among them
`VLLM_USE_V2_MODEL_RUNNER=1`. `setting` sets what `VLLMEngine` needs for as long as one of
ours is open, and puts back what was there when the last is closed.

| variable | value | why |
|---|---|---|
| `VLLM_ENABLE_V1_MULTIPROCESSING` | 0, always | the engine's loop runs in this process: rows are \
taken where they were made, and nothing outlives its owner |
| `VLLM_USE_V2_MODEL_RUNNER` | 0 if the second model runner of this vLLM has no logits processors \
(before 0.31); else 1, which is genlm-backend's value, is taken away | \
`vllm_capture.RowCapture` serves both runners, so vLLM may choose |
| `VLLM_NO_USAGE_STATS` | 1, unless set | no thread that reports to vLLM's makers |
| `VLLM_LOGGING_LEVEL` | WARNING, unless set | vLLM logs in every detail how it starts |
| `GENLM_BYTES_SMC_VLLM` | 1, always | tells worker processes to do the same |

Workers (of tensor parallelism, say) are processes of their own. A script that they import may
import genlm-backend, which sets its variables there too; `vllm_capture` imports this module, which
then sets ours again, before vLLM reads them.

vLLM also changes the process it runs in: it seeds the global random generators of Python,
numpy and torch, replaces `torch.set_num_threads` by a function that does nothing, and binds
threads to cores. `setting` puts these back too, the generators as soon as the engine has been
made (`process_kept`).

Two more variables that users may set, and that nothing here touches: `VLLM_CPU_KVCACHE_SPACE`
(GiB of keys and values on a CPU; else `engine_opts={"kv_cache_memory_bytes": ...}`, 1 GiB
unless given), and `VLLM_CPU_OMP_THREADS_BIND` (which cores; "nobind" on a shared machine).
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

TAG = "genlm_bytes_smc_row"
"""Key of `SamplingParams.extra_args` under which a request says what its row is called."""

_HELD = "GENLM_BYTES_SMC_VLLM"
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"

if _HELD not in os.environ or "vllm" not in sys.modules:  # in a worker it would only warn
    import genlm.backend.llm  # noqa: F401  (first: it sets variables that are to be set otherwise)


def second_runner_has_processors() -> bool:
    """Return whether the second model runner of the installed vLLM takes logits processors."""
    vllm = find_spec("vllm")
    places = (vllm.submodule_search_locations or ()) if vllm else ()
    return any(Path(at, "v1/worker/gpu/sample/logits_processor").is_dir() for at in places)


ALWAYS: Mapping[str, str] = {
    _HELD: "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    **({} if second_runner_has_processors() else {_RUNNER: "0"}),
}
UNLESS_SET: Mapping[str, str] = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
AWAY: Mapping[str, str] = {_RUNNER: "1"}


class Setting:
    """Environment variables that hold while anybody holds them; then all is as it was.

    Args:
        always: set whatever they were.
        unless_set: set if they were not.
        away: taken away if they have this value.
    """

    def __init__(
        self,
        always: Mapping[str, str],
        unless_set: Mapping[str, str],
        away: Mapping[str, str],
    ) -> None:
        self._always, self._unless_set, self._away = dict(always), dict(unless_set), dict(away)
        self._before: dict[str, str | None] = {}
        self._process: dict[str, Any] = {}
        self._holders = 0
        self._lock = Lock()

    @property
    def holders(self) -> int:
        """Return how many hold it."""
        return self._holders

    def hold(self) -> None:
        """Set the variables; each `hold` is to be followed by one `release`."""
        with self._lock:
            self._holders += 1
            if self._holders > 1:
                return
            self._before = {
                k: os.environ.get(k) for k in (*self._always, *self._unless_set, *self._away)
            }
            self.apply()
            self._process = {"set_num_threads": torch.set_num_threads, "cores": _cores()}

    def apply(self) -> None:
        """Set the variables, and take away those that are to go."""
        for name, value in self._away.items():
            if os.environ.get(name) == value:
                del os.environ[name]
        for name, value in self._unless_set.items():
            os.environ.setdefault(name, value)
        os.environ.update(self._always)

    def release(self) -> bool:
        """Give up one `hold`; the last puts the variables back.

        Returns:
            Whether it was the last.
        """
        with self._lock:
            self._holders -= 1
            if self._holders:
                return False
            for name, value in self._before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            torch.set_num_threads = self._process["set_num_threads"]
            if self._process["cores"]:
                os.sched_setaffinity(0, self._process["cores"])
            return True


def _cores() -> set[int]:
    """Return the cores this process may run on; empty where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@contextmanager
def process_kept() -> Iterator[None]:
    """Leave the global random generators as they were, and start no thread for progress bars."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    interval, tqdm.monitor_interval = tqdm.monitor_interval, 0
    try:
        yield
    finally:
        tqdm.monitor_interval = interval
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


setting = Setting(ALWAYS, UNLESS_SET, AWAY)

if _HELD in os.environ:  # in a worker
    setting.apply()
