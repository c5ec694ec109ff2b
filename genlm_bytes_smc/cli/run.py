"""The commands `next`, `beam`, `complete` and `demo`."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc import ByteBeamState, ByteLanes
from genlm_bytes_smc.beam import display
from genlm_bytes_smc.beam.state import EOS_COLUMN
from genlm_bytes_smc.cli.compiling import announce_compilation
from genlm_bytes_smc.cli.inputs import as_prompt, new_beam, open_model, read_argument, seed_of
from genlm_bytes_smc.cli.options import BeamOptions
from genlm_bytes_smc.cli.output import (
    ByteStream,
    CliError,
    as_text,
    bar,
    console,
    say,
    visible,
    write_json,
)
from genlm_bytes_smc.streaming import Completion, NoCandidateError

SHOWN, DEMO_STEPS = 5, 60  # next bytes and most bytes of the demo
TIMED_BYTES, TIMED_LANES = 256, 16


async def show_next(options: BeamOptions, prompt: str, top: int) -> None:
    """Run the command `next`."""
    text = read_argument(prompt)
    state = await _after(options, text)
    entries = await _next_bytes(state, top)
    if options.json:
        write_json({"prompt": as_text(text), "log_z": state.logZ, "next": entries})
    else:
        _print_next(entries)


async def show_beam(options: BeamOptions, prompt: str) -> None:
    """Run the command `beam`."""
    text = read_argument(prompt)
    state = (await _after(options, text)).prune()
    if options.json:
        write_json({"prompt": as_text(text), **_beam(state)})
    else:
        _print_beam(state)


async def write_completion(
    options: BeamOptions, prompt: str, steps: int, *, greedy: bool, echo: bool
) -> None:
    """Run the command `complete`."""
    text, seed = read_argument(prompt), seed_of(options)
    state = await _after(options, text, seed)
    await state.prune().lanes.logp_next()  # what must be compiled is, before the text appears
    announce_compilation().hushed = True
    stream = None if options.json else ByteStream()
    if stream and echo:
        stream.write(text, "dim")
    out, start = bytearray(), time.perf_counter()
    completion = Completion(state, steps, None if greedy else seed)
    try:
        async for byte in _told(completion):
            out.append(byte)
            if stream:
                stream.write(bytes([byte]))
    finally:
        if stream:
            stream.finish()
    if options.json:
        seconds = time.perf_counter() - start
        write_json(
            {
                "prompt": as_text(text),
                "completion": as_text(bytes(out)),
                "completion_base64": base64.b64encode(out).decode(),
                "bytes": len(out),
                "ended": completion.ended,
                "log_p": completion.log_z - state.logZ,
                "seed": None if greedy and not state.params.unbiased else seed,
                "seconds": seconds,
                "bytes_per_second": len(out) / seconds,
            }
        )


async def demonstrate(options: BeamOptions, prompt: str) -> None:
    """Run the command `demo`."""
    text, seed = read_argument(prompt), seed_of(options)
    state = await _after(options, text, seed)
    room = _room(state)
    start = time.perf_counter()
    completed = bytearray()
    async for byte in _told(Completion(state, min(DEMO_STEPS, room))):
        completed.append(byte)
        if byte in b".!?\n":
            break
    first = time.perf_counter() - start
    entries = await _next_bytes(state, SHOWN)
    one = await _timed(state.lanes, room)
    many = await _timed(state.lanes.gather([0] * TIMED_LANES), room)
    if options.json:
        found: dict[str, Any] = {
            "prompt": as_text(text),
            "completion": as_text(bytes(completed)),
            "beam": _beam(state.prune()),
            "next": entries,
            "seconds": first,
            "bytes_per_second": one,
            "lanes": TIMED_LANES,
            "bytes_per_second_lanes": many,
        }
        write_json(found)
        return
    say((visible(as_text(text)), "dim"), (visible(as_text(bytes(completed))), "bold"))
    say()
    say(("The beam after the prompt", "bold underline"))
    _print_beam(state.prune())
    say(("The next byte", "bold underline"))
    _print_next(entries)
    say()
    say(("Speed", "bold underline"))
    say(f"one text drawn byte by byte      {one:6.0f} bytes/s")
    say(f"{TIMED_LANES} texts drawn side by side      {many:6.0f} bytes/s")


async def _told(completion: Completion) -> AsyncIterator[int]:
    """Yield the bytes of a completion, its errors in the words of the command line.

    Raises:
        CliError: no candidate is left.
    """
    try:
        async for byte in completion:
            yield byte
    except NoCandidateError as error:
        raise CliError(str(error).replace("lower threshold", "lower --threshold")) from None


async def _after(options: BeamOptions, text: bytes, seed: int | None = None) -> ByteBeamState:
    """Return the beam after a prompt.

    Raises:
        CliError: the vocabulary cannot spell it.
    """
    llm = open_model(options)
    state = await new_beam(options, llm, seed_of(options) if seed is None else seed)
    state = await state.prefill(as_prompt(options, text, state.lanes.model))
    if state.logZ == -np.inf:
        raise CliError("no candidate could read the prompt to its end; try a wider beam")
    return state


async def _next_bytes(state: ByteBeamState, top: int) -> list[dict[str, Any]]:
    """Return the likeliest next symbols, best first, without those that cannot come."""
    row = (await state.lanes.logp_next())[0].cpu().numpy()
    out = []
    for symbol in np.argsort(-row, kind="stable")[:top].tolist():
        logp = float(row[symbol])
        if logp > -np.inf:
            end = symbol == EOS_COLUMN
            shown = "<end>" if end else display.escape(bytes([symbol]))
            byte = None if end else symbol
            out.append({"symbol": shown, "byte": byte, "p": float(np.exp(logp)), "logp": logp})
    return out


def _print_next(entries: list[dict[str, Any]]) -> None:
    width = max([4, *(len(e["symbol"]) for e in entries)])
    say((f"{'byte':>{width}}      p       log p", "dim"))
    for e in entries:
        style = "yellow" if e["byte"] is None else "green"
        numbers = f"  {e['p']:.5f}  {e['logp']:8.4f}  "
        say((f"{e['symbol']:>{width}}", style), numbers, (bar(e["p"]), style))


def _beam(state: ByteBeamState) -> dict[str, Any]:
    return {
        "log_z": state.logZ,
        "log_dropped": state.dropped,
        "heals": state.heals,
        "candidates": [
            {
                "share": c.share,
                "logw": c.logw,
                "tokens": [display.escape(t) for t in c.tokens],
                "partial": display.escape(c.partial),
            }
            for c in state
        ],
    }


def _print_beam(state: ByteBeamState) -> None:
    out = console()
    colour = out.color_system is not None
    out.out(display.as_text(state.logZ, state.candidates, colour=colour), highlight=False)


def _room(state: ByteBeamState) -> int:
    """Return how many bytes fit the model's window after the text, even if each is a token."""
    window: int | None = state.lanes.model.engine.window
    if window is None:
        return sys.maxsize
    return max(0, window - max(len(c.tokens) for c in state.candidates) - 1)


async def _timed(lanes: ByteLanes, most: int) -> float:
    """Measure bytes a second, over all lanes, of texts of at most `most` bytes from fixed seeds."""
    rng = np.random.default_rng(0)
    lanes = lanes.prune()
    steps = min(most, TIMED_BYTES if len(lanes) == 1 else TIMED_BYTES // 4)
    start, read = time.perf_counter(), 0
    for _ in range(steps):
        rows = (await lanes.logp_next())[:, :EOS_COLUMN]
        p = torch.softmax(rows, dim=1).cpu().numpy().cumsum(axis=1)
        symbols = (p < rng.random((len(lanes), 1)) * p[:, -1:]).sum(axis=1)
        lanes = await lanes.step(np.where(lanes.alive, symbols, -1))
        read += int(lanes.alive.sum())
    return read / (time.perf_counter() - start)
