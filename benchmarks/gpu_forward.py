"""One decoding forward on a device: as the engine runs it, in other ways, and its memory floor."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.gpu_models import Mixed, wait_for
from benchmarks.gpu_stages import patched
from genlm_bytes_smc.fast_path import FastPathWarning
from genlm_bytes_smc.lm.decoder import Attend, _rotate
from genlm_bytes_smc.lm.devices import Linear
from genlm_bytes_smc.lm.transformer import TreeTransformer

WAYS = ("engine", "eager", "modules")
COMPILED = "compiled"
COMPILE_SECONDS = 40


class TooSlowError(RuntimeError):
    """A measurement was given up, as it took too long; that is no failure of the run."""


def bandwidths(device: torch.device, size: int) -> dict[str, float]:
    """Measure copies of `size` bytes: on the device (read and written bytes both count), and from
    it to page-locked and to ordinary memory of the host.

    Returns:
        Bytes a second, by name; on a CPU those of the first kind alone.
    """
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    out = {"copy": 2 * size / _seconds(lambda: y.copy_(x), device, 5)}
    if device.type == "cuda":
        part = x[: size // 4]
        host = torch.empty(len(part), dtype=torch.uint8, pin_memory=True)
        out["pinned"] = len(part) / _seconds(lambda: host.copy_(part), device, 5)
        out["pageable"] = len(part) / _seconds(lambda: part.cpu(), device, 3)
    return out


def weights_read(engine: Mixed) -> int:
    """Bytes of all weights that a forward reads whole: not those of an embedding table that the
    head does not share, of which it reads a line a position."""
    size = sum(p.numel() * p.element_size() for p in engine.base.parameters())
    if engine.base.config.tie_word_embeddings:
        return size
    table = engine.base.get_input_embeddings().weight
    return size - table.numel() * table.element_size()


def forward(engine: Mixed, prompt: bytes, count: int, way: str, repeats: int) -> dict[str, float]:
    """Measure one forward over the last tokens of `count` contexts.

    Each context is the prompt, a token of its own, and a token that is new in each repetition;
    all but the last is computed before.

    Args:
        engine: the model.
        prompt: what contexts begin with.
        count: how many positions the forward has.
        way: of `WAYS`: the engine as it is; its forward without a CUDA graph; transformers' own
            modules over the same cache.
        repeats: how many are timed; three more come before. The median counts.

    Returns:
        `ms`, and on a GPU `peak_bytes`.

    Raises:
        RuntimeError: the engine took more than one forward, or other positions.
    """
    engine.forget()
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    width = len(engine.byte_vocab)
    start = [*engine.start, *engine.tokenizer.encode(prompt.decode())]
    parents = [[*start, (17 + i) % width] for i in range(count)]
    before = np.array([engine.tree.insert(tokens) for tokens in parents])
    asked = [
        np.array([engine.tree.insert([*tokens, (5 + k) % width]) for tokens in parents])
        for k in range(repeats + 3)
    ]
    times = []
    with _by(engine, way), engine.tree.pinned(np.stack([before, *asked])):
        TreeTransformer.evaluate(engine, before)
        for nodes in asked:
            engine.counts.reset()
            wait_for(engine.device)
            begin = time.perf_counter()
            TreeTransformer.evaluate(engine, nodes)
            wait_for(engine.device)
            times.append(time.perf_counter() - begin)
            done = engine.counts.forwards, engine.counts.positions
            if done != (1, count):
                raise RuntimeError(
                    f"expected one forward of {count} positions, got {done[0]} of {done[1]}"
                )
    out = {"ms": 1e3 * median(times[3:])}
    if engine.device.type == "cuda":
        out["peak_bytes"] = torch.cuda.max_memory_allocated(engine.device)
    return out


@contextmanager
def _by(engine: Mixed, way: str) -> Iterator[None]:
    """Have the engine's forward run in one of the ways."""
    inner: Any = engine._forward
    graphs = getattr(inner, "graphs", True)
    if way == "eager":
        inner.graphs = False
    elif way == "modules":
        inner.doubt = "measured"
        engine.clear_cache()
    elif way != "engine":
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FastPathWarning)  # slower, as asked
            yield
    finally:
        inner.graphs = graphs
        if way == "modules":
            inner.doubt = None
            engine.clear_cache()


def compiled(engine: Mixed, prompt: bytes, count: int, repeats: int) -> dict[str, float]:
    """Measure the written-out decoder compiled by `torch.compile` for one fixed shape.

    Its positions read as many keys as the prompt has tokens, and their own; see
    `over_fixed_shape`.

    Returns:
        `ms`, and `compile_s`, what compiling took.

    Raises:
        TooSlowError: compiling took more than `COMPILE_SECONDS`.
    """
    kept = len(engine.start) + len(engine.tokenizer.encode(prompt.decode()))
    run = over_fixed_shape(engine, kept, count)
    fast = torch.compile(run, mode="reduce-overhead", fullgraph=True, dynamic=False)
    device = engine.device
    tokens = torch.arange(17, 17 + count, device=device) % len(engine.byte_vocab)
    begin = time.perf_counter()
    with torch.no_grad(), patched(Linear, "__call__", lambda _: _side_by_side):
        with _alarm(COMPILE_SECONDS):
            fast(tokens)
            wait_for(device)
        taken = time.perf_counter() - begin
        out = {"ms": 1e3 * _seconds(lambda: fast(tokens), device, repeats)}
    torch.compiler.reset()
    return out | {"compile_s": taken}


def over_fixed_shape(
    engine: Mixed, kept: int, count: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the written-out decoder as a function of tokens int64[count] alone.

    Args:
        engine: the model.
        kept: how many keys and values, all zeros, every position sees besides its own.
        count: how many positions, all at depth `kept`.

    Returns:
        A function that returns the log probabilities float32[count, width].

    Raises:
        RuntimeError: the engine's forward is not written out.
    """
    decoder: Any = engine._forward.decoder
    if decoder is None:
        raise RuntimeError(f"the forward of the engine is {engine.forward!r}, not written out")
    attend = _FixedAttend(engine, count, kept)
    positions = torch.full((count,), kept, device=engine.device)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        x = decoder.body(tokens, positions, attend)
        return torch.log_softmax(decoder.logits(x).float(), dim=-1)

    return run


class _FixedAttend(Attend):
    """Attention of `count` positions to `kept` keys that all see, and each to its own."""

    def __init__(self, engine: Mixed, count: int, kept: int) -> None:
        config, dtype, device = engine.base.config, engine.base.dtype, engine.device
        self.heads = config.num_key_value_heads
        self.groups = config.num_attention_heads // self.heads
        self.width = config.hidden_size // config.num_attention_heads
        self.kept = torch.zeros((self.heads, kept, self.width), dtype=dtype, device=device)
        own = torch.eye(count, dtype=torch.bool, device=device)
        sees = torch.cat([torch.ones_like(own[:, :1]).expand(-1, kept), own], dim=1)
        self.mask = torch.where(sees, 0.0, -torch.inf).to(dtype).repeat(self.groups, 1)

    def layer(self, kind: str, i: int, qkv: torch.Tensor, turn: Any, scale: float) -> torch.Tensor:
        """Attend by queries, keys and values in one tensor, not turned yet."""
        queries = self.heads * self.groups
        qk, v = qkv[:, : queries + self.heads], qkv[:, queries + self.heads :]
        if turn is not None:
            qk = _rotate(qk, *turn)
        q, k, count = qk[:, :queries], qk[:, queries:], qkv.shape[0]
        keys, values = (torch.cat([self.kept, x.transpose(0, 1)], dim=1)[None] for x in (k, v))
        # Queries that share a key/value head stand below each other.
        stacked = q.transpose(0, 1).reshape(1, self.heads, self.groups * count, self.width)
        out = scaled_dot_product_attention(stacked, keys, values, self.mask, scale=scale)
        return out.reshape(-1, count, self.width).transpose(0, 1).reshape(count, -1)


def _side_by_side(layers: Any, x: torch.Tensor) -> torch.Tensor:
    """Do what `Linear` does, in a way that the compiler can follow."""
    return torch.cat([linear(x, weight, bias) for weight, bias in layers._plain], dim=-1)


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raise `TooSlowError` in the block once the time is over; where there are no alarms, wait."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise TooSlowError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    except Exception as error:
        # The compiler wraps what is raised inside it.
        if "TooSlowError" in f"{type(error).__name__}{error}":
            raise TooSlowError(f"not done within {seconds} s") from error
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of a call, the device's work included; two come before."""
    times = []
    for _ in range(repeats + 2):
        wait_for(device)
        begin = time.perf_counter()
        run()
        wait_for(device)
        times.append(time.perf_counter() - begin)
    return median(times[2:])
