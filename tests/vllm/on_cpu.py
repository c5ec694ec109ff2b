"""What vLLM needs on a CPU before it is imported.

Its second model runner needs kernels in Triton, whose releases compile for GPUs only. With
TRITON_INTERPRET=1 Triton's own interpreter runs them in Python, slowly. vLLM asks for a backend
called "cpu" before it chooses that runner; the one entered here compiles nothing, because the
interpreter comes first. Without the variable vLLM takes its first runner.

Without Triton the CPU build of vLLM 0.32 reads `__dict__` of every object in every module. The
library object of llvmlite, which numba imports, answers with a function of that name instead of
raising AttributeError, and vLLM fails to start; here it raises.
"""

import os
import sys

from llvmlite.binding import ffi

_function_of = ffi._lib_wrapper.__getattr__


def _function(self, name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _function_of(self, name)


ffi._lib_wrapper.__getattr__ = _function

if os.environ.get("TRITON_INTERPRET") == "1":
    assert "vllm" not in sys.modules, "vLLM has looked for Triton's backends already"

    import torch
    from triton.backends import Backend, backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver

    class Interpreted(DriverBase):
        """Names the device; whatever else a driver does is for compiled kernels."""

        @classmethod
        def is_active(cls):
            return True

        def get_current_target(self):
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def map_python_to_cpp_type(self, ty):
            raise NotImplementedError

        def get_benchmarker(self):
            raise NotImplementedError

    backends["cpu"] = Backend(backends["nvidia"].compiler, Interpreted)
    driver.set_active(Interpreted())
