"""A logits processor that brings vLLM down: what a user's `engine_opts` may contain."""

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

left = {"steps": 0}


class Dying(AdapterLogitsProcessor):
    """Raises once its steps are used up, as a kernel that runs out of memory would."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        return None

    def apply(self, logits):
        left["steps"] -= 1
        if left["steps"] < 0:
            raise RuntimeError("out of everything")
        return logits
