"""Plain forms of awaited calls: in a script, inside a running loop, and on Ctrl-C."""

import asyncio
import inspect
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import genlm_bytes_smc
from genlm_bytes_smc import BeamParams, ByteLLM, run_sync, smc_sync
from genlm_bytes_smc.calls import blocking
from tests.toys import EOS_TOKEN, ToyLM


def toy():
    return ByteLLM(ToyLM(seed=1), BeamParams(K=None, eos_byte_strings=[EOS_TOKEN]))


def test_any_coroutine_without_a_loop():
    """`run_sync` returns what awaiting returns."""
    llm = toy()
    assert run_sync(llm.prefix(b"ab")) == asyncio.run(llm.prefix(b"ab"))


async def test_inside_a_running_loop():
    """In a notebook, where a loop runs, the plain form works as well and leaves no thread."""
    llm, threads = toy(), threading.active_count()
    assert run_sync(llm.prefix(b"ab")) == await llm.prefix(b"ab")
    assert len(smc_sync(llm, 3, 0.5, 4, seed=1).texts) == 3
    assert threading.active_count() == threads
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_errors_come_through():
    """An error is the awaited call's own, with and without a running loop."""
    with pytest.raises(ValueError, match="n_particles"):
        smc_sync(toy(), 0)
    with pytest.raises(TypeError, match="a coroutine is due"):
        run_sync(toy().prefix)


def test_one_rule_for_all():
    """Each public name that ends in _sync has an async twin with the same parameters."""
    names = [n for n in genlm_bytes_smc.__all__ if n.endswith("_sync") and n != "run_sync"]
    assert {"smc_sync", "choose_sync"} <= set(names)
    for name in names:
        twin = name.removesuffix("_sync")
        plain = getattr(genlm_bytes_smc, name)
        room = sys.modules[plain.__module__]
        assert inspect.iscoroutinefunction(getattr(room, twin))
        assert inspect.signature(plain) == inspect.signature(getattr(room, twin))
        assert plain.__name__ == name


def test_the_awaited_function_is_left_as_it_is():
    """`blocking` returns a new function and keeps the name of the old."""

    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    assert blocking(double)(4) == 8
    assert double.__name__ == "double"


SCRIPT = """
    import asyncio, sys
    from genlm_bytes_smc import run_sync
    async def long():
        try:
            print("begun", flush=True)
            await asyncio.sleep(60)
        finally:
            print("ended", flush=True)
    def plain():
        try:
            run_sync(long())
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    async def inside():
        plain()
    asyncio.run(inside()) if sys.argv[1] == "loop" else plain()
"""


@pytest.mark.parametrize("where", ["script", "loop"])
def test_ctrl_c(where):
    """Ctrl-C ends the coroutine first and is raised then."""
    code = textwrap.dedent(SCRIPT)
    script = subprocess.Popen(
        [sys.executable, "-c", code, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert script.stdout.readline() == b"begun\n"
        time.sleep(0.2)
        os.kill(script.pid, signal.SIGINT)
        out, err = script.communicate(timeout=30)
    finally:
        script.kill()
    assert out.split()[0] == b"ended"
    assert b"interrupted" in out or b"KeyboardInterrupt" in err
