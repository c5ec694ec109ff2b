"""vLLM's second model runner on a CPU: import this before vLLM, with TRITON_INTERPRET=1.

That runner needs kernels in Triton, whose releases compile for GPUs only. Triton's own interpreter
runs them in Python, slowly, if the variable is set. vLLM asks for a backend called "cpu" before it
chooses that runner; the one entered here compiles nothing, because the interpreter comes first.
Without the variable nothing happens, and vLLM takes its first runner.
"""

import os
import sys

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
