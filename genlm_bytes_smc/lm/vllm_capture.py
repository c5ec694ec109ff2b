"""What runs inside vLLM's workers: rows are caught where vLLM would sample from them.

vLLM imports this module by name, in the process of each worker; nothing else does. Only
documented extension points are used: a custom logits processor
(`LLM(logits_processors=[...])`) and methods added to workers (`LLM(worker_extension_cls=...)`).

vLLM has two model runners, each with its own interface of logits processors. The first knows a
request by its row of the batch and reports every move of it; the second by a slot that a request
keeps, and says at each step which row is whose (vllm-project/vllm pull request 56497). Which of
them runs a model, vLLM decides from the model, the options and the environment, so one class
serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from genlm_bytes_smc.lm import vllm_env as env
from genlm_bytes_smc.lm.engine import Row, gathered

if env.second_runner_has_processors():
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotProcessor
else:
    SlotProcessor = object

# Rows that nobody has taken yet, of this process: the block of one forward, and the place in it.
_caught: dict[Any, Row] = {}


class _Catch:
    """Stands for one tagged request among the processors of the first runner."""

    def __init__(self, tag: Any) -> None:
        self.tag = tag

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits


class RowCapture(AdapterLogitsProcessor, SlotProcessor):  # type: ignore[misc]
    """Keeps the log-probabilities of each tagged request, float32[V], nats.

    A prompt that vLLM reads in several pieces passes here once a piece; the last time counts.

    Args:
        vllm_config: not needed.
        given: not needed, and different for the two runners.
    """

    def __init__(self, vllm_config: Any, *given: Any) -> None:
        self.req_info: dict[int, Any] = {}  # of the first runner: row -> what stands for a request
        self._tags: dict[int, Any] = {}  # of the second runner: slot -> tag

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Nothing to check: a request without a tag is not ours."""

    def is_argmax_invariant(self) -> bool:
        """No (first runner): processors that claim so are skipped when all requests are greedy."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> _Catch | None:
        """Return a mark for a tagged request; None for others (first runner)."""
        tag = _tag(params)
        return None if tag is None else _Catch(tag)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note what the request in a slot is called, and whether to catch it (second runner)."""
        tag = _tag(sampling_params)
        self._tags[req_idx] = tag  # None too: it ends what was in the slot before
        return tag is not None

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Catch the rows of all tagged requests at once; the logits stay as they are.

        Sums are in float32, whatever the model's dtype.

        Args:
            logits: [rows, V]; those of a batch.
            ctx: the second runner's `LogitsContext`; the first gives none.
        """
        if ctx is None:
            named = {row: info.func.tag for row, info in self.req_info.items() if row < len(logits)}
        else:
            slots = ctx.idx_mapping_np  # on the host; drafts have rows of their own
            slots = slots if len(slots) == len(logits) else ctx.expanded_idx_mapping
            tags = [self._tags.get(slot) for slot in slots.tolist()]
            named = {row: tag for row, tag in enumerate(tags) if tag is not None}
        if named:
            places = list(named)
            chosen = logits if places == list(range(len(logits))) else logits[places]
            block = torch.log_softmax(chosen, dim=-1, dtype=torch.float32)
            _caught.update({tag: (block, at) for at, tag in enumerate(named.values())})
        return logits


def _tag(params: SamplingParams) -> Any:
    """Return what a request's row is called; None for a request that is not ours."""
    return (params.extra_args or {}).get(env.TAG)


class RowWorker:
    """Methods added to vLLM's workers; see `LLM.collective_rpc`."""

    rank: int
    parallel_config: Any

    def take_caught_rows(self, tags: list[Any]) -> torch.Tensor | None:
        """Hand over rows and forget them.

        Args:
            tags: what they are called, B of them.

        Returns:
            float32[B, V], nats, where they were computed (on the CPU if there are several
            workers, for then they are sent to another process); None in a worker that has
            none or whose rows are another's too.
        """
        found = [_caught.pop(tag, None) for tag in tags]
        config = self.parallel_config
        if any(place is None for place in found):
            return None
        if self.rank % config.tensor_parallel_size:
            return None  # the ranks of a tensor-parallel group have the same rows
        rows = gathered([place for place in found if place is not None])
        return rows if config.world_size == 1 else rows.cpu()

    def forget_caught_rows(self) -> int:
        """Drop rows that nobody took (a request failed); how many there were."""
        count = len(_caught)
        _caught.clear()
        return count
