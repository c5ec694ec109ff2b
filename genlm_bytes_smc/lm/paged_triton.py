"""Attention of a decode forward on a GPU, in Triton: keys are read where they lie.

Each of T positions sees its ancestors and itself: the entries of a path through the context tree.
The first entries of all paths are mostly the same (the prompt, what the particles have in common):
they are read once for many queries (`shared`). What is left of each path is read for that
position alone (`own`). Both walk along the keys in several parts at once and leave sums for
each part, which `combine` adds up (online softmax in parts: Dao et al. 2023, "Flash-Decoding").

All that differs from forward to forward stands in one array of int32 on the device, `plan`; so a
forward can be recorded once and replayed (`decode_graphs`):

    plan[0]              entries that all paths have in common
    plan[1]              how many of the T positions are meant
    plan[HEAD + i * T]   T numbers each: token, position, slot of the new entry, where in `plan` the
                         rest of the path begins, its length, the first entry that a sliding
                         window shows
    plan[HEAD + 6 * T]   slots of the common entries, then the rests of the paths
"""

from __future__ import annotations

import triton
import triton.language as tl

HEAD = 8  # numbers before the columns of `plan`
TOKEN, POSITION, SLOT, FIRST, LENGTH, LOW = range(6)
COLUMNS = 6

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def keep(
    qkv, cos, sin, sin_stride, keys, values, head_stride, plan, T,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """Turn queries in place (rotary positions), and put turned keys and values into their slots.

    qkv [T, HEADS + 2 KV, D]; cos [T, D] and the first half of sin [T, D] (Su et al. 2021,
    equation 34, half against half); keys, values [KV, slots, D]. Without TURNS nothing is turned.
    """
    t, head = tl.program_id(0), tl.program_id(1)
    if t < tl.load(plan + 1):
        if not TURNS:
            head += HEADS  # queries stay
        at = tl.arange(0, HALF)
        there = at < D // 2
        x = qkv + (t * (HEADS + 2 * KV) + head) * D
        low = tl.load(x + at, mask=there, other=0.0)
        high = tl.load(x + D // 2 + at, mask=there, other=0.0)
        if TURNS and head < HEADS + KV:
            c = tl.load(cos + t * D + at, mask=there, other=0.0).to(tl.float32)
            s = tl.load(sin + t * sin_stride + at, mask=there, other=0.0).to(tl.float32)
            a, b = low.to(tl.float32), high.to(tl.float32)
            low = (a * c - b * s).to(low.dtype)
            high = (b * c + a * s).to(high.dtype)
        if head < HEADS:
            tl.store(x + at, low, mask=there)
            tl.store(x + D // 2 + at, high, mask=there)
        else:
            slot = tl.load(plan + 8 + 2 * T + t).to(tl.int64)
            is_key = head < HEADS + KV
            of = tl.where(is_key, head - HEADS, head - HEADS - KV).to(tl.int64)
            place = of * head_stride + slot * D
            if is_key:
                tl.store(keys + place + at, low, mask=there)
                tl.store(keys + place + D // 2 + at, high, mask=there)
            else:
                tl.store(values + place + at, low, mask=there)
                tl.store(values + place + D // 2 + at, high, mask=there)


@triton.jit
def _attend(
    qkv, keys, values, head_stride, plan, tops, totals, sums, scale, T,
    kv, t, head, live, low, slots_at, count, before, part,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, SLIDES: tl.constexpr,
):  # fmt: skip
    """Attend with BM queries to one of PARTS parts of a list of `count` slots in `plan`.

    Queries are those of `head` at `t`, where `live`; `before` entries of their paths come before
    the list. Written are, for each part, the largest score (in powers of two), the sum of
    exponentials relative to it, and the sum of values times those: tops, totals
    [parts, T, HEADS] and sums [parts, T, HEADS, D], float32.
    """
    d = tl.arange(0, BD)
    wide = (d < D)[None, :]
    of = (t * (HEADS + 2 * KV) + head) * D
    q = tl.load(qkv + of[:, None] + d[None, :], mask=live[:, None] & wide, other=0.0)
    each = tl.cdiv(tl.cdiv(count, PARTS), BN) * BN
    first = part * each
    stop = tl.minimum(first + each, count)
    head_at = kv.to(tl.int64) * head_stride
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for j in range(first, stop, BN):
        at = j + tl.arange(0, BN)
        there = at < stop
        slot = tl.load(plan + slots_at + at, mask=there, other=0).to(tl.int64)
        place = head_at + slot[:, None] * D + d[None, :]
        inside = there[:, None] & wide
        k = tl.load(keys + place, mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        seen = there[None, :]
        if SLIDES:
            seen = seen & ((before + at)[None, :] >= low[:, None])
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new > float("-inf"), new, 0.0)
        p = tl.exp2(score - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(values + place, mask=inside, other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    out = (part * T + t) * HEADS + head
    tl.store(tops + out, top, mask=live)
    tl.store(totals + out, total, mask=live)
    tl.store(sums + out[:, None] * D + d[None, :], acc, mask=live[:, None] & wide)


@triton.jit
def shared(
    qkv, keys, values, head_stride, plan, tops, totals, sums, scale, T,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, SLIDES: tl.constexpr,
):  # fmt: skip
    """Attend to the common entries: part `program_id(2)` of them, for BM rows of queries.

    The rows of a key/value head are the queries of its group, position after position.
    """
    kv, part = tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = HEADS // KV
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    t, head = row // G, kv * G + row % G
    low = tl.load(plan + 8 + 5 * T + t, mask=t < T, other=0)
    _attend(
        qkv, keys, values, head_stride, plan, tops, totals, sums, scale, T,
        kv, t, head, t < T, low, 8 + 6 * T, tl.load(plan), 0, part,
        HEADS, KV, D, BD, BM, BN, PARTS, SLIDES,
    )  # fmt: skip


@triton.jit
def own(
    qkv, keys, values, head_stride, plan, tops, totals, sums, scale, T,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PARTS: tl.constexpr, SLIDES: tl.constexpr,
):  # fmt: skip
    """Attend to the entries of one position alone, part `program_id(2)` of them: as `shared`.

    BM is at least the size of a group.
    """
    t, kv, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = HEADS // KV
    row = tl.arange(0, BM)
    low = tl.load(plan + 8 + 5 * T + t) + tl.zeros([BM], tl.int32)
    begin, length = tl.load(plan + 8 + 3 * T + t), tl.load(plan + 8 + 4 * T + t)
    _attend(
        qkv, keys, values, head_stride, plan, tops, totals, sums, scale, T,
        kv, t, kv * G + row, row < G, low, begin, length, tl.load(plan), part,
        HEADS, KV, D, BD, BM, BN, PARTS, SLIDES,
    )  # fmt: skip


@triton.jit
def combine(
    tops, totals, sums, out, T, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    PARTS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one head's query: out [T, HEADS * D]."""
    t, head = tl.program_id(0), tl.program_id(1)
    part, d = tl.arange(0, BP), tl.arange(0, BD)
    there = part < PARTS
    place = (part * T + t) * HEADS + head
    top = tl.load(tops + place, mask=there, other=float("-inf"))
    best = tl.max(top, 0)
    weight = tl.where(there, tl.exp2(top - tl.where(best > float("-inf"), best, 0.0)), 0.0)
    total = tl.sum(weight * tl.load(totals + place, mask=there, other=0.0), 0)
    inside = there[:, None] & (d < D)[None, :]
    acc = tl.load(sums + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    mean = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0, total, 1.0)  # none is seen
    tl.store(out + (t * HEADS + head) * D + d, mean.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def gated(both, out, inner, BLOCK: tl.constexpr):
    """Write silu(gate) * value: both [T, 2 * inner], gates first; out [T, inner]."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < inner
    gate = tl.load(both + t * 2 * inner + at, mask=there, other=0.0).to(tl.float32)
    value = tl.load(both + t * 2 * inner + inner + at, mask=there, other=0.0)
    out_value = (gate / (1.0 + tl.exp(-gate))).to(value.dtype) * value
    tl.store(out + t * inner + at, out_value, mask=there)
