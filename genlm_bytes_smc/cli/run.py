"""The commands `next`, `beam`, `complete`, `demo` and `info`."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from genlm_bytes_smc import ByteBeamState, ByteLanes
from genlm_bytes_smc.beam import display
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.single import draw
from genlm_bytes_smc.beam.state import EOS_COLUMN
from genlm_bytes_smc.cli.common import (
    ByteStream,
    announce_compilation,
    as_prompt,
    as_text,
    bar,
    both_ways,
    console,
    eos_spellings,
    new_beam,
    open_model,
    read_argument,
    say,
    table,
    visible,
    write_json,
)
from genlm_bytes_smc.cli.options import (
    CliError,
    CompleteOptions,
    DemoOptions,
    InfoOptions,
    NextOptions,
    PromptOptions,
    ShowBeamOptions,
)
from genlm_bytes_smc.lm.engine import RowEngine
from genlm_bytes_smc.streaming import Completion

SHOWN, DEMO_STEPS = 5, 60  # next bytes and most bytes of the demo
TIMED_BYTES, TIMED_LANES = 256, 16


async def show_next(options: NextOptions) -> None:
    """Run the command `next`."""
    text, state = await _after(options)
    entries = await _next_bytes(state, options.top)
    if options.json:
        write_json({"prompt": as_text(text), "log_z": state.logZ, "next": entries})
    else:
        _print_next(entries)


async def show_beam(options: ShowBeamOptions) -> None:
    """Run the command `beam`."""
    text, state = await _after(options)
    state = state.prune()
    if options.json:
        write_json({"prompt": as_text(text), **_beam(state)})
    else:
        _print_beam(state)


async def write_completion(options: CompleteOptions) -> None:
    """Run the command `complete`."""
    text, state = await _after(options)
    await state.prune().lanes.rows()  # what must be compiled is, before the text appears
    announce_compilation().hushed = True
    stream = None if options.json else ByteStream()
    if stream and not options.no_echo:
        stream.write(text, "dim")
    out, start = bytearray(), time.perf_counter()
    completion = Completion(state, options.steps, None if options.greedy else options.seed)
    try:
        async for byte in completion:
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
                **both_ways("completion", bytes(out)),
                "bytes": len(out),
                "ended": completion.ended,
                "log_p": completion.log_z - state.logZ,
                "seed": None if options.greedy and not state.params.unbiased else options.seed,
                "seconds": seconds,
                "bytes_per_second": len(out) / seconds,
            }
        )


async def demonstrate(options: DemoOptions) -> None:
    """Run the command `demo`."""
    text, state = await _after(options)
    room = _room(state)
    start = time.perf_counter()
    completed = bytearray()
    async for byte in Completion(state, min(DEMO_STEPS, room)):
        completed.append(byte)
        if byte in b".!?\n":
            break
    first = time.perf_counter() - start
    entries = await _next_bytes(state, SHOWN)
    one = await _timed(state.lanes, room)
    many = await _timed(state.lanes.gather([0] * TIMED_LANES), room)
    if options.json:
        write_json(
            {
                "prompt": as_text(text),
                "completion": as_text(bytes(completed)),
                "beam": _beam(state.prune()),
                "next": entries,
                "seconds": first,
                "bytes_per_second": one,
                "lanes": TIMED_LANES,
                "bytes_per_second_lanes": many,
            }
        )
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


async def _after(options: PromptOptions) -> tuple[bytes, ByteBeamState]:
    """Return the prompt and the beam after it.

    Raises:
        CliError: the vocabulary cannot spell it.
    """
    text = read_argument(options.prompt)
    state = await new_beam(options, open_model(options))
    state = await state.prefill(as_prompt(options, text, state.lanes.model))
    if state.logZ == -np.inf:
        raise CliError("no candidate could read the prompt to its end; try a wider beam")
    return text, state


async def _next_bytes(state: ByteBeamState, top: int) -> list[dict[str, Any]]:
    """Return the likeliest next symbols, best first, without those that cannot come."""
    row = (await state.lanes.rows())[0].numpy()
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
    window: int = state.lanes.model.engine.window or sys.maxsize
    return max(0, window - max(len(c.tokens) for c in state.candidates) - 1)


async def _timed(lanes: ByteLanes, most: int) -> float:
    """Measure bytes a second, over all lanes, of texts of at most `most` bytes from fixed seeds."""
    rng = np.random.default_rng(0)
    lanes = lanes.prune()
    steps = min(most, TIMED_BYTES if len(lanes) == 1 else TIMED_BYTES // 4)
    start, read = time.perf_counter(), 0
    for _ in range(steps):
        rows = (await lanes.rows())[:, :EOS_COLUMN]
        lanes = await lanes.step(np.where(lanes.alive, draw(rows, rng), -1))
        read += int(lanes.alive.sum())
    return read / (time.perf_counter() - start)


# -- info ----------------------------------------------------------------------------------


async def show_info(options: InfoOptions) -> None:
    """Run the command `info`."""
    start = time.perf_counter()
    llm = open_model(options)
    loaded = time.perf_counter()
    facts = _facts(options, llm) | {"load_seconds": loaded - start}
    facts["trie_seconds"] = time.perf_counter() - loaded
    if options.json:
        write_json(facts)
    else:
        table([(name.replace("_", " "), _fact(name, value)) for name, value in facts.items()])


def _facts(options: InfoOptions, llm: RowEngine) -> dict[str, Any]:
    bytes_ = byte_model(llm)
    model: Any = getattr(llm, "base", None)
    weights = list(model.parameters()) if hasattr(model, "parameters") else []
    return {
        "model": options.model,
        "class": type(model or getattr(llm, "llm", llm)).__name__,
        "backend": str(options.backend or "hf"),
        "device": str(llm.device),
        "parameters": sum(w.numel() for w in weights) or None,
        "weight_bytes": sum(w.numel() * w.element_size() for w in weights) or None,
        "dtype": str(weights[0].dtype).removeprefix("torch.") if weights else None,
        "window_tokens": llm.window,
        "vocabulary": len(bytes_.vocab),
        "tokens_that_spell": bytes_.trie.n_tokens,
        "row_columns": llm.width,
        "special_tokens": [display.escape(bytes_.vocab[i]) for i in bytes_.special_ids],
        "start": [display.escape(bytes_.vocab[i]) for i in llm.start],
        "end": sorted(display.escape(s) for s in eos_spellings(llm)),
        "trie_nodes": len(bytes_.trie),
        "trie_depth": int(bytes_.trie.depth.max()),
        "trie_bytes": bytes_.trie.nbytes,
        "forward": str(llm.forward),
        "forward_reason": llm.forward.reason,
        "kernels": type(bytes_.kernels).__name__,
        "tree_cache": getattr(llm, "cached", None),
        "cache_limit_bytes": getattr(llm, "limit_bytes", None),
        "row_dtype": "float64" if bytes_.store.exact else "float32",
        "row_bytes": bytes_.store.row_bytes,
        "row_limit_bytes": bytes_.store.limit_bytes,
    }


def _fact(name: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        shown = "  ".join(value[:8])
        return shown + (f"  and {len(value) - 8} more" if len(value) > 8 else "") or "none"
    if name.endswith("_bytes"):
        return _size(value)
    if name.endswith("_seconds"):
        return f"{value:.2f} s"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
