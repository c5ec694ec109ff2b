"""What vLLM leaves behind, and what a run keeps when vLLM dies."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from genlm_bytes_smc import BeamParams, EngineError, load_model
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import RunFailedError, smc, smc_many

ROOT = Path(__file__).parents[2]


def run(body, **env):
    """A script in a process of its own; what it printed last."""
    script = "import tests.vllm.on_cpu\n" + textwrap.dedent(body)
    started = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script], start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **env},
    )  # fmt: skip
    try:
        said, errors = started.communicate(timeout=900)
    except BaseException:
        os.killpg(started.pid, signal.SIGKILL)  # its workers too, which would outlive it
        started.communicate()
        raise
    assert started.returncode == 0, errors[-4000:]
    return said.strip().splitlines()[-1]


def test_nothing_is_left_and_the_process_is_as_it_was():
    said = run("""
        import gc, os, random, threading
        import numpy as np, torch, weakref
        from genlm_bytes_smc import EngineError, load_model
        from genlm_bytes_smc.lm import vllm_env as env  # and genlm-backend, which sets variables

        def process():
            tracked = "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER"
            tracked += "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL", "GENLM_BYTES_SMC_VLLM"
            children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
            return (
                {k: os.environ.get(k) for k in tracked}, random.getstate(), children,
                str(np.random.get_state()), torch.get_rng_state().sum().item(),
                torch.set_num_threads, os.sched_getaffinity(0), threading.enumerate(),
            )

        before = process()
        rows = []
        for _ in range(2):  # a second engine starts where the first has ended
            with load_model("tiny", backend="vllm") as engine:
                rows.append(engine.next_token_logprobs_sync([*engine.start, 5]))
                inside = weakref.ref(engine.llm)
            gc.collect()
            assert inside() is None, "vLLM's engine is still alive"
            for now, then in zip(process(), before, strict=True):
                assert now == then, (now, then)
            engine.close()
            try:
                engine.next_token_logprobs_sync([1])
            except EngineError as error:
                assert "was closed" in str(error)
            else:
                raise AssertionError("a closed engine answered")
        assert torch.equal(*rows)
        print("clean")
    """)
    assert said == "clean"


def test_two_engines_end_one_after_the_other():
    said = run("""
        from genlm_bytes_smc import load_model
        from genlm_bytes_smc.lm.vllm_env import setting
        a = load_model("tiny", backend="vllm")
        b = load_model("tiny", backend="vllm")
        row = a.next_token_logprobs_sync([*a.start, 5])
        a.close()
        assert setting.holders == 1
        assert (b.next_token_logprobs_sync([*b.start, 5]) - row).abs().max() < 1e-4
        b.close()
        assert setting.holders == 0
        print("both")
    """)
    assert said == "both"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_tensor_parallel_workers_give_the_same_rows_and_end():
    cores = sorted(os.sched_getaffinity(0))
    said = run(
        """
        import os, signal, time
        from pathlib import Path
        from genlm_bytes_smc import EngineError, load_model

        def workers():
            found = []
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    text = status.read_text()
                except OSError:
                    continue
                lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
                if int(lines["PPid"]) == os.getpid() and "orker" in lines["Name"]:
                    if "Z" not in lines["State"]:
                        found.append(int(status.parent.name))
            return found

        def main():
            opts = {"tensor_parallel_size": 2}
            tree = load_model("tiny", device="cpu")
            contexts = [[*tree.start, 5], [*tree.start, *range(100, 180)], [7]]
            want = tree.batch_next_token_logprobs_sync(contexts)
            engine = load_model("tiny", backend="vllm", engine_opts=opts)
            assert len(workers()) == 2, workers()
            got = engine.batch_next_token_logprobs_sync(contexts)
            assert engine.device.type == "cpu"
            assert (got - want).abs().max() < 1e-4
            engine.close()
            deadline = time.time() + 20
            while workers() and time.time() < deadline:
                time.sleep(0.1)
            assert not workers(), workers()
            print("ended")

        main()
        """,
        VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[1]}",
    )
    assert said == "ended"


# -- death in mid-run ------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    return ByteRegex(r"[a-z]{3,9} is [a-z ]{3,20}[.]")


def over(engine, target):
    params = BeamParams(K=4, prune_threshold=0.02)
    return ByteLLM(engine, params, prompt=b"My favourite ") * target


async def test_what_was_done_is_kept_when_the_engine_dies(engine, tiny, target):
    from tests.vllm.dying import left

    opts = {"logits_processors": ["tests.vllm.dying:Dying"]}
    left["steps"] = 10**9
    mortal = load_model("tiny", backend="vllm", engine_opts=opts)
    try:
        whole = await smc(over(engine, target), 8, 0.5, 30, seed=4, progress=False)
        assert len(whole.history) > 20
        llm = over(mortal, target)
        await llm.prefix([])  # reads the prompt
        left["steps"] = 8
        with pytest.raises(RunFailedError, match=r"vLLM failed on .* out of everything") as failed:
            await smc(llm, 8, 0.5, 30, seed=4, progress=False)
        error = failed.value
        assert isinstance(error.__cause__, EngineError)
        assert isinstance(error.__cause__.__cause__, RuntimeError)
        assert 0 < error.state.step < len(whole.history)
        assert len(error.result.texts) == 8
        with pytest.raises(EngineError, match=r"failed earlier .* out of everything"):
            mortal.next_token_logprobs_sync([3, 4, 5])
        # With a model that works, the run goes on as if nothing had happened.
        resumed = await smc(over(tiny, target), 8, 0.5, 30, resume=error.state, progress=False)
        assert resumed.texts == whole.texts
        assert resumed.log_ml == pytest.approx(whole.log_ml, abs=1e-2)
    finally:
        mortal.close()


async def test_every_run_of_many_keeps_its_state(target):
    from tests.vllm.dying import left

    opts = {"logits_processors": ["tests.vllm.dying:Dying"]}
    left["steps"] = 10**9
    with load_model("tiny", backend="vllm", engine_opts=opts) as mortal:
        targets = [over(mortal, target), over(mortal, ByteRegex(r"[a-z]{1,20}"))]
        for t in targets:
            await t.prefix([])
        left["steps"] = 6
        with pytest.raises(RunFailedError) as failed:
            await smc_many(targets, 4, max_bytes=30)
        assert len(failed.value.states) == 2
        assert all(state.step > 0 for state in failed.value.states)


def test_a_start_that_fails_names_its_cause():
    before = os.environ.get("VLLM_USE_V2_MODEL_RUNNER"), torch.set_num_threads
    state = random.getstate(), np.random.get_state()[1].sum()
    with pytest.raises(EngineError, match="vLLM could not start") as failed:
        load_model("tiny", backend="vllm", engine_opts={"max_model_len": 10**7})
    assert failed.value.__cause__ is not None
    assert (os.environ.get("VLLM_USE_V2_MODEL_RUNNER"), torch.set_num_threads) == before
    assert (random.getstate(), np.random.get_state()[1].sum()) == state
