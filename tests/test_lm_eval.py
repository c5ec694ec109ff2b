"""The model for lm-evaluation-harness, run by the real harness on tasks of a local file."""

import json
import math
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the harness and what it imports
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

from genlm_bytes_smc import load_model
from genlm_bytes_smc.lm_eval import ByteLM
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

pytestmark = pytest.mark.filterwarnings("ignore")


def request(*args):
    return SimpleNamespace(args=args)


def toy_lm(seed=2, **options):
    toy = ToyLM(seed=seed)
    options = {"K": None, "prune": "topk", "eos_byte_strings": [EOS_TOKEN], **options}
    return toy, ByteLM(toy, **options)


def test_loglikelihood_is_the_enumerated_one():
    """Weights sum over coverings, also by tokens that span context and continuation."""
    toy, lm = toy_lm()
    oracle = Enumeration(toy, frozenset({EOS_TOKEN}))
    pairs = [("", "ab"), ("", "abc"), ("", "cabb"), ("", "b")]
    got = lm.loglikelihood([request(*p) for p in pairs])
    for (_, text), (weight, greedy) in zip(pairs, got, strict=True):
        assert weight == pytest.approx(math.log(oracle.prefix(text.encode())))
        so_far = True
        for i in range(len(text)):
            best = int(oracle.logp_next(text[:i].encode()).argmax())
            so_far = so_far and best == text.encode()[i]
        assert greedy == so_far


def test_a_token_that_spans_context_and_continuation(tiny):
    """The pair on which the harness has no tokens left for the continuation has a weight here."""
    tokenizer = tiny.tokenizer
    context, continuation = next(
        (whole[:k], whole[k:])
        for whole in ("Answer", " doctor", "doctor", "apple", "The")
        for k in range(1, len(whole))
        if len(tokenizer.encode(whole)) <= len(tokenizer.encode(whole[:k]))
    )
    both = tokenizer.encode(context + continuation)
    assert both[len(tokenizer.encode(context)) :] == []  # as the harness cuts them
    lm = ByteLM(tiny, K=32, prune_threshold=0.0001, prune="topk")
    ((weight, _),) = lm.loglikelihood([request(context, continuation)])
    joint = lm.loglikelihood_rolling([request(context + continuation), request(context)])
    assert -30 < weight < 0
    assert weight == pytest.approx(joint[0] - joint[1], abs=1e-3)


def test_greedy_continuations_are_those_that_are_generated(tiny):
    """What `generate_until` writes is greedy for `loglikelihood`, and another text is not."""
    lm = ByteLM(tiny)
    context = "An apple a day keeps the "
    (text,) = lm.generate_until([request(context, {"max_gen_toks": 3, "until": ["."]})])
    (_, greedy), (_, other) = lm.loglikelihood([request(context, text), request(context, "zebra")])
    assert greedy and not other
    assert text.startswith("doctor")


def test_stops_lengths_and_draws(tiny):
    """Strings in "until" end a text and are left out; draws repeat with the seed."""
    lm = ByteLM(tiny)
    context = "An apple a day keeps the "
    (stopped,) = lm.generate_until([request(context, {"until": ["tor"], "max_gen_toks": 9})])
    assert stopped == "doc"
    settings = {"do_sample": True, "temperature": 0.8, "max_gen_toks": 3}
    drawn = [lm.generate_until([request(context, settings)] * 2) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert all(len(text.encode()) <= 12 for text in drawn[0])


def test_batch_sizes_as_the_command_line_gives_them(tiny):
    """A number comes as text; what is none is refused."""
    sizes = [ByteLM(tiny, batch_size=b).batch_size for b in (3, "4", "auto", "auto:2")]
    assert sizes == [3, 4, 16, 16]
    for bad in ("0", -1, "many", None):
        with pytest.raises(ValueError, match=r"batch_size must be .*, got"):
            ByteLM(tiny, batch_size=bad)


def test_contexts_are_read_side_by_side(tiny):
    """Answers do not depend on the batch, and a batch takes fewer forwards."""
    pairs = [(f"An apple number {i} keeps the ", "doctor") for i in range(8)]
    requests = [request(*p) for p in pairs] + [request(pairs[0][0], "cat")]
    costs, found = [], []
    for batch in (1, 9):
        engine = load_model("tiny", device="cpu")  # which has no rows yet
        found.append(ByteLM(engine, batch_size=batch).loglikelihood(requests))
        costs.append(engine.counts.forwards)
    for (a, x), (b, y) in zip(*found, strict=True):
        assert a == pytest.approx(b, abs=1e-3) and x == y
    assert costs[1] < 0.5 * costs[0]


def test_long_contexts_lose_their_beginning():
    """A context that does not fit the window is cut, not refused."""
    _, lm = toy_lm(K=4)
    lm.llm.model.engine.window = 16
    ((weight, _),) = lm.loglikelihood([request("abcab" * 20, "ab")])
    assert -20 < weight < 0
    assert lm.generate_until([request("abcab" * 20, {"max_gen_toks": 20, "until": []})])[0]


def test_chat_templates(tiny):
    """A model without a template says so; one with a template is given its text."""
    lm = ByteLM(tiny)
    with pytest.raises(ValueError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert lm.chat_template(False) == ""
    assert lm.tokenizer_name


@pytest.mark.real
def test_chat_template_of_the_real_model():
    """SmolLM2's template, whose special tokens are read as such."""
    lm = ByteLM("smollm2")
    text = lm.apply_chat_template([{"role": "user", "content": "What is 1+1?"}])
    assert "<|im_start|>user" in text and text.endswith("<|im_start|>assistant\n")
    assert lm.loglikelihood([request(text, "2")])[0][0] > -15


TASK = {
    "task": "local_choice",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{c}}",
    "doc_to_target": "{{a}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


def test_the_harness_runs_a_local_task(tiny, tmp_path, monkeypatch):
    """`simple_evaluate` on a task file, offline; the model is found by its registered name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    docs = [
        {"q": "An apple a day keeps the ", "c": ["doctor", "zebra"], "a": 0},
        {"q": "An apple a day keeps the doc", "c": ["zzz", "tor"], "a": 1},  # within a token
    ]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in docs))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    found = lm_eval.simple_evaluate(
        ByteLM(tiny), tasks=[task], task_manager=TaskManager(), bootstrap_iters=0
    )
    assert found["results"]["local_choice"]["acc,none"] == 1.0
    assert get_model("genlm-bytes") is ByteLM
