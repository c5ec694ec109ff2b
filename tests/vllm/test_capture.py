"""Which of vLLM's model runners runs, and the capture of rows under the second, step by step."""

import os
from dataclasses import fields

import numpy as np
import pytest
import torch

from genlm_bytes_smc.lm.vllm_env import second_runner_has_processors  # imports genlm-backend

# isort: split
from vllm import SamplingParams

SLOTS, WIDTH = 6, 11


def test_the_first_runner_runs_unless_triton_does(engine):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    config = engine.llm.llm_engine.vllm_config
    second = bool(config.use_v2_model_runner)
    assert second is (interpreted and second_runner_has_processors())
    # "0" forbids the second runner where it could catch no rows; else vLLM has chosen.
    want = None if second_runner_has_processors() else "0"
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == want


@pytest.fixture
def capture():
    """The processor, as the second runner makes it from its name."""
    if not second_runner_has_processors():
        pytest.skip("the second model runner of this vLLM takes no logits processors")
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors
    from vllm.v1.worker.gpu.states import RequestState

    states = RequestState(SLOTS, 32, 32, 1, WIDTH, torch.device("cpu"))
    name = "genlm_bytes_smc.lm.vllm_capture:RowCapture"
    (capture,) = build_custom_logits_processors(None, states, False, [name])
    yield capture
    taken(10)


def ours(tag):
    return SamplingParams(max_tokens=1, extra_args={"genlm_bytes_smc_row": tag})


def layout(slots, drafts=()):
    """vLLM's description of a batch: the slots of its requests, and drafts of each, if any."""
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    rows = np.repeat(slots, np.add(drafts, 1) if len(drafts) else 1)
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    given = {
        "idx_mapping": torch.tensor(slots),
        "idx_mapping_np": np.array(slots, dtype=np.intp),
        "expanded_idx_mapping": torch.tensor(rows),
        "seq_lens_upper_bound_np": np.ones(len(slots), dtype=np.int32),
    }
    return LogitsContext(**{f.name: given.get(f.name, zeros) for f in fields(LogitsContext)})


def taken(*tags):
    """The rows of tags, or None, as `VLLMEngine` takes them from a worker."""
    from types import SimpleNamespace

    from genlm_bytes_smc.lm.vllm_capture import RowWorker

    worker = RowWorker()
    worker.rank, worker.parallel_config = 0, SimpleNamespace(tensor_parallel_size=1, world_size=1)
    return worker.take_caught_rows(list(tags))


def test_rows_follow_their_slots(capture):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((3, WIDTH), generator=generator)
    want = logits.log_softmax(1)
    assert capture.add_request(4, ours("a")) and capture.add_request(0, ours("b"))
    assert not capture.add_request(2, SamplingParams(max_tokens=1))
    got = capture.apply(logits, layout([0, 2, 4]))
    assert got is logits
    assert torch.equal(taken("a", "b"), want[[2, 0]])
    assert taken("a") is None  # they are taken once
    # Another order; and what was in the slots has ended, one of them is a user's own now.
    assert capture.add_request(0, ours("c")) and not capture.add_request(4, SamplingParams())
    capture.apply(logits, layout([4, 0, 2]))
    assert torch.equal(taken("c"), want[[1]])
    assert taken("a") is None and taken("b") is None


def test_the_last_piece_of_a_prompt_counts(capture):
    first, last = torch.randn((2, 1, WIDTH), generator=torch.Generator().manual_seed(1))
    capture.add_request(3, ours("a"))
    capture.apply(first, layout([3]))
    capture.apply(last, layout([3]))
    assert torch.equal(taken("a"), last.log_softmax(1))


def test_requests_of_others_may_have_drafts(capture):
    logits = torch.randn((5, WIDTH), generator=torch.Generator().manual_seed(2))
    capture.add_request(1, SamplingParams())
    capture.add_request(5, ours("a"))
    capture.add_request(3, ours("b"))
    capture.apply(logits, layout([1, 5, 3], drafts=[2, 0, 0]))
    assert torch.equal(taken("b", "a"), logits.log_softmax(1)[[4, 3]])


def test_a_batch_that_is_all_ours_is_not_copied(capture):
    logits = torch.randn((2, WIDTH), generator=torch.Generator().manual_seed(3)).bfloat16()
    capture.add_request(0, ours("a"))
    capture.add_request(1, ours("b"))
    capture.apply(logits, layout([1, 0]))
    rows = taken("b", "a")
    assert rows.dtype == torch.float32
    assert torch.equal(rows, logits.log_softmax(1, dtype=torch.float32))
