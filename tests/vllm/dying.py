"""A logits processor that brings vLLM down: what a user's `engine_opts` may contain."""

from genlm_bytes_smc.lm.vllm_capture import RowCapture

left = {"steps": 0}


class Dying(RowCapture):
    """Raises once its steps are used up, as a kernel that runs out of memory would."""

    def apply(self, logits, ctx=None):
        left["steps"] -= 1
        if left["steps"] < 0:
            raise RuntimeError("out of everything")
        return logits
