"""The beam's arithmetic as Triton kernels: what `kernels_fused` launches.

Every kernel is one launch where torch takes ten to eighty operations, sums in float64, and adds
in an order that depends on shapes alone (no atomics), so that equal runs give equal digits.

Conventions. A state's tensors come as a pointer and the distance between lanes, candidates next
to each other. Integers and pointers are not specialised on, and block sizes are powers of two:
a kernel is compiled once a block size, not once a shape. A float is an argument of 32 bits to
Triton, so numbers that matter come as the bits of a float64 in an int64. Sizes are multiplied as
int64: rows of 128,000 tokens pass two billion numbers at some 17,000 slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

KERNELS: dict[str, Any] = {}  # by name, for those that compile them all


def kernel(function: Callable[..., None]) -> Any:
    """Return a Triton kernel that is specialised on its `tl.constexpr` arguments only."""
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    plain = [n for n in names if n not in ("CUT", "BLOCK", "WIDTH", "TILE", "CHILDREN", "RANGE")]
    compiled = triton.jit(do_not_specialize=plain, do_not_specialize_on_alignment=plain)(function)
    KERNELS[function.__name__] = compiled
    return compiled


@triton.jit
def _float(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.float64).to(tl.int64, bitcast=True)


@triton.jit
def _log_add(a, b):
    top = tl.maximum(a, b)
    some = top > float("-inf")
    low = tl.where(some, tl.minimum(a, b) - top, 0.0)
    return tl.where(some, top + tl.log(1.0 + tl.exp(low)), top)


@triton.jit
def _child(first, last, byte, byte_of):
    """Find the first child whose byte is not below `byte`, and whether one has it."""
    low, high = first, last
    for _ in tl.static_range(9):  # 256 children at most
        open_ = low < high
        middle = (low + high) // 2
        below = tl.load(byte_of + middle, mask=open_, other=0) < byte
        high = tl.where(open_ & (below == 0), middle, high)
        low = tl.where(open_ & below, middle + 1, low)
    there = low < last
    found = there & (tl.load(byte_of + low, mask=there, other=-1) == byte)
    return low, found


@kernel
def child_masses(
    plan, m, probs, tokens, first_of, lo, length, text, masses,
    CUT: tl.constexpr, CHILDREN: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Masses of all children of m candidates, each one's laid end to end.

    plan int64[3, m]: node, slot, and where in `masses` its children's begin. Grid: m, and the
    most children / CHILDREN.
    """
    i = tl.program_id(0).to(tl.int64)
    node = tl.load(plan + i)
    slot = tl.load(plan + m + i)
    at = tl.load(plan + 2 * m + i)
    first = tl.load(first_of + node)
    last = tl.load(first_of + node + 1)
    child = first + tl.program_id(1) * CHILDREN + tl.arange(0, CHILDREN)
    there = child < last
    start = tl.load(lo + child, mask=there, other=0)
    count = tl.load(length + child, mask=there, other=0)
    row = probs + slot * tokens
    total = tl.zeros([CHILDREN, RANGE], dtype=tl.float64)
    for k in range(0, tl.max(count, 0), RANGE):
        place = k + tl.arange(0, RANGE)
        position = start[:, None] + place[None, :]
        meant = place[None, :] < count[:, None]
        if CUT:
            meant = meant & (tl.load(text + position, mask=meant, other=0) != 0)
        total += tl.load(row + position, mask=meant, other=0.0)
    tl.store(masses + at + child - first, tl.sum(total, 1), mask=there)


@kernel
def next_block(
    node, node_stride, logu, logu_stride, logw, logw_stride, width, skip, slot,
    masses, first_of, byte_of, probs, tokens, cut, cuts, out,
    CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the next byte, float64[N, 257]: masses scaled, added in the candidates' order.

    skip, slot int64[N, C]: what to add to a child to find its mass; the slot of a candidate at
    the root, else -1. Grid: N, and 257 / BLOCK.
    """
    n = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    top = tl.load(logw + n * logw_stride)
    for c in range(1, width):
        top = tl.maximum(top, tl.load(logw + n * logw_stride + c))
    total = tl.zeros([BLOCK], dtype=tl.float64)
    none, nothing = tl.zeros([BLOCK], dtype=tl.int64), tl.zeros([BLOCK], dtype=tl.float64)
    for c in range(0, width):
        # Whole vectors: the interpreter takes a comparison of scalars for a float.
        alive = nothing + tl.load(logw + n * logw_stride + c) > float("-inf")
        above = tl.load(node + n * node_stride + c)
        given = tl.load(logu + n * logu_stride + c)
        scale = tl.where(alive, tl.exp(tl.where(alive, given - top, 0.0)), 0.0)
        first = tl.load(first_of + above)
        last = tl.load(first_of + above + 1)
        child, found = _child(none + first, none + last, column, byte_of)
        at = tl.load(skip + n * width + c)
        meant = found & alive
        total += scale * tl.load(masses + at + child, mask=meant, other=0.0)
        if CUT:
            row = none + tl.load(slot + n * width + c)
            ends = tl.zeros([BLOCK], dtype=tl.float64)
            for k in range(0, cuts, BLOCK):
                place = k + tl.arange(0, BLOCK)
                some = place < cuts
                position = tl.load(cut + place, mask=some, other=0)
                counts = some & alive & (row >= 0)
                ends += tl.load(probs + row * tokens + position, mask=counts, other=0.0)
            total += tl.where(column == 256, scale * tl.sum(ends, 0), 0.0)
    some = total > 0
    block = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(out + n * 257 + column, block, mask=column < 257)


@kernel
def advance_summed(
    node, node_stride, logu, logu_stride, logw, logw_stride, width, size, skip, symbol,
    masses, first_of, byte_of, out_node, out_logw, BLOCK: tl.constexpr,
):  # fmt: skip
    """One byte where the masses of all children are known. Grid: size = N C, by BLOCK."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    lane, c = i // width, i % width
    byte = tl.load(symbol + lane, mask=inside, other=-1)
    weight = tl.load(logw + lane * logw_stride + c, mask=inside, other=float("-inf"))
    reads = inside & (byte >= 0) & (weight > float("-inf"))
    above = tl.load(node + lane * node_stride + c, mask=reads, other=0)
    first = tl.load(first_of + above, mask=reads, other=0)
    last = tl.load(first_of + above + 1, mask=reads, other=0)
    child, found = _child(first, last, byte, byte_of)
    at = tl.load(skip + i, mask=inside, other=0)
    mass = tl.load(masses + at + child, mask=reads & found, other=0.0)
    given = tl.load(logu + lane * logu_stride + c, mask=inside, other=float("-inf"))
    some = mass > 0
    moved = tl.where(some, given + tl.log(tl.where(some, mass, 1.0)), float("-inf"))
    tl.store(out_node + i, tl.where(some, child, 0), mask=inside)
    tl.store(out_logw + i, moved, mask=inside)


@kernel
def advance(
    node, node_stride, logu, logu_stride, logw, logw_stride, width, symbol, slot,
    first_of, byte_of, lo, length, probs, tokens, text, out_node, out_logw,
    CUT: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """One byte, the range of each candidate's child summed. Grid: N C."""
    i = tl.program_id(0).to(tl.int64)
    lane, c = i // width, i % width
    byte = tl.load(symbol + lane)
    reads = (byte >= 0) & (tl.load(logw + lane * logw_stride + c) > float("-inf"))
    above = tl.load(node + lane * node_stride + c)
    first = tl.load(first_of + above)
    last = tl.load(first_of + above + 1)
    child, found = _child(first, last, byte, byte_of)
    found = found & reads
    start = tl.load(lo + child, mask=found, other=0)
    count = tl.load(length + child, mask=found, other=0)
    row = probs + tl.load(slot + i) * tokens
    total = tl.zeros([RANGE], dtype=tl.float64)
    for k in range(0, count, RANGE):
        place = k + tl.arange(0, RANGE)
        meant = place < count
        if CUT:
            meant = meant & (tl.load(text + start + place, mask=meant, other=0) != 0)
        total += tl.load(row + start + place, mask=meant, other=0.0)
    mass = tl.sum(total, 0)
    some = mass > 0
    given = tl.load(logu + lane * logu_stride + c)
    tl.store(out_node + i, tl.where(some, child, 0))
    moved = tl.where(some, given + tl.log(tl.where(some, mass, 1.0)), float("-inf"))
    tl.store(out_logw + i, moved)


@kernel
def ending_weights(index, where, size, logu, logu_stride, width, probs, out, BLOCK: tl.constexpr):
    """logu of candidates `index` and the log of the probabilities at `where`. Grid: by BLOCK."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    flat = tl.load(index + i, mask=inside, other=0)
    given = tl.load(logu + flat // width * logu_stride + flat % width, mask=inside, other=0.0)
    p = tl.load(probs + tl.load(where + i, mask=inside, other=0), mask=inside, other=1.0)
    some = p > 0
    weight = tl.where(some, given + tl.log(tl.where(some, p, 1.0)), float("-inf"))
    tl.store(out + i, weight, mask=inside)


@kernel
def rank(logw, logw_stride, width, ranked, order, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Weights best first, equal ones as they came: a candidate's place is how many go before.

    ranked float64[N, C], order int64[N, C]. Grid: N.
    """
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    mine = tl.load(logw + n * logw_stride + i, mask=i < width, other=float("-inf"))
    place = tl.zeros([WIDTH], dtype=tl.int32)
    for k in range(0, width, TILE):
        j = k + tl.arange(0, TILE)
        other = tl.load(logw + n * logw_stride + j, mask=j < width, other=float("-inf"))
        tied = (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
        before = (j < width)[None, :] & ((other[None, :] > mine[:, None]) | tied)
        place += tl.sum(before.to(tl.int32), 1)
    tl.store(ranked + n * width + place, mine, mask=i < width)
    tl.store(order + n * width + place, i.to(tl.int64), mask=i < width)


@triton.jit
def _put(
    n, place, inside, source, weight, old, most, ctx, ctx_stride, node, node_stride, logu,
    logu_stride, out, weights, packed,
):  # fmt: skip
    """Candidates `source` with new weights to `place`; see `select` for the arrays."""
    some = inside & (weight > float("-inf"))
    context = tl.load(ctx + n * ctx_stride + source, mask=some, other=-1)
    at = tl.load(node + n * node_stride + source, mask=some, other=0)
    given = tl.load(logu + n * logu_stride + source, mask=some, other=float("-inf"))
    given = tl.where(some, given + tl.where(some, weight - old, 0.0), float("-inf"))
    size = tl.num_programs(0).to(tl.int64) * most
    to = n * most + place
    tl.store(out + to, context, mask=inside)
    tl.store(out + size + to, at, mask=inside)
    tl.store(weights + to, given, mask=inside)
    tl.store(weights + size + to, weight, mask=inside)
    line = packed + n * (2 * most + 2)
    tl.store(line + place, context, mask=inside)
    tl.store(line + most + place, tl.where(some, at, -1), mask=inside)


@kernel
def select(
    ranked, order, width, most, log_threshold, ctx, ctx_stride, node, node_stride, logu,
    logu_stride, out, weights, packed, WIDTH: tl.constexpr,
):  # fmt: skip
    """Keep at most `most` above the threshold's share of a lane, the best in any case.

    out int64[2, N, K]: ctx, node; weights float64[2, N, K]: logu, logw; packed int64[N, 2K + 2],
    for the host: ctx, node (-1: none), the bits of the total and of what was dropped. Grid: N.
    """
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    weight = tl.load(ranked + n * width + i, mask=i < width, other=float("-inf"))
    some = weight > float("-inf")
    top = tl.load(ranked + n * width)
    full = top > float("-inf")
    p = tl.where(some, tl.exp(tl.where(some, weight - top, 0.0)), 0.0)
    sum_ = tl.sum(p, 0)
    total = tl.where(full, top + tl.log(tl.where(full, sum_, 1.0)), float("-inf"))
    share = tl.where(some, weight - total, float("-inf"))
    keep = some & ((i == 0) | (share > _float(log_threshold))) & (i < most)
    lost = tl.sum(tl.where(keep | (some == 0), 0.0, tl.exp(tl.where(some, share, 0.0))), 0)
    gone = lost > 0
    dropped = tl.where(gone, total + tl.log(tl.where(gone, lost, 1.0)), float("-inf"))
    kept = tl.sum(tl.where(keep, p, 0.0), 0)
    any_ = kept > 0
    log_z = tl.where(any_, top + tl.log(tl.where(any_, kept, 1.0)), float("-inf"))
    source = tl.load(order + n * width + i, mask=i < width, other=0)
    left = tl.where(keep, weight, float("-inf"))
    _put(
        n, i, i < most, source, left, left, most, ctx, ctx_stride, node, node_stride, logu,
        logu_stride, out, weights, packed,
    )  # fmt: skip
    line = packed + n * (2 * most + 2) + 2 * most
    tl.store(line, _bits(log_z))
    tl.store(line + 1, _bits(dropped))


@kernel
def resample(
    ranked, order, width, most, uniform, ctx, ctx_stride, node, node_stride, logu,
    logu_stride, out, weights, packed, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Optimal resampling to `most`: see `TorchKernels.resample`; arrays as in `select`."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    weight = tl.load(ranked + n * width + i, mask=i < width, other=float("-inf"))
    count = tl.sum((weight > float("-inf")).to(tl.int64), 0)
    first = tl.load(ranked + n * width)
    top = tl.where(count > 0, first, 0.0)
    logp = weight - top
    left = tl.maximum(most - i, 1).to(tl.float64)
    rest = tl.associative_scan(logp, 0, _log_add, reverse=True) - tl.log(left)
    above = (i < most - 1) & (logp >= rest)
    big = tl.min(tl.where(above, WIDTH, i), 0)
    log_c = tl.sum(tl.where(i == big, rest, 0.0), 0)
    small = (i >= big) & (weight > float("-inf"))
    run = tl.cumsum(tl.where(small, tl.exp(tl.where(small, logp - log_c, 0.0)), 0.0), 0)
    u = tl.load(uniform + n)
    fits = count <= most
    best = tl.where(fits | (big > 0), first, top + log_c)
    sum_ = tl.zeros([TILE], dtype=tl.float64)
    for k in range(0, most, TILE):
        place = k + tl.arange(0, TILE)
        inside = place < most
        passed = (run[None, :] <= (u + (place - big))[:, None]) & (i < width)[None, :]
        drawn = tl.minimum(tl.sum(passed.to(tl.int64), 1), tl.maximum(count - 1, 0))
        as_is = fits | (place < big)
        pick = tl.where(as_is, place, drawn)
        old = tl.load(ranked + n * width + pick, mask=inside, other=float("-inf"))
        source = tl.load(order + n * width + pick, mask=inside, other=0)
        new = tl.where(as_is, old, top + log_c)
        some = inside & (new > float("-inf"))
        sum_ += tl.where(some, tl.exp(tl.where(some, new - best, 0.0)), 0.0)
        _put(
            n, place, inside, source, new, old, most, ctx, ctx_stride, node, node_stride, logu,
            logu_stride, out, weights, packed,
        )  # fmt: skip
    total = tl.sum(sum_, 0)
    any_ = total > 0
    log_z = tl.where(any_, best + tl.log(tl.where(any_, total, 1.0)), float("-inf"))
    line = packed + n * (2 * most + 2) + 2 * most
    tl.store(line, _bits(log_z))
    tl.store(line + 1, _bits(tl.full([], float("-inf"), tl.float64)))


@kernel
def normalise(block, total, out, CUT: tl.constexpr, BLOCK: tl.constexpr):
    """Rows less `total` float64[N], or with CUT less their own log sums. Grid: N."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    row = tl.load(block + n * 257 + i, mask=i < 257, other=float("-inf"))
    if CUT:
        top = tl.max(row, 0)
        full = top > float("-inf")
        some = row > float("-inf")
        sum_ = tl.sum(tl.where(some, tl.exp(tl.where(some, row - top, 0.0)), 0.0), 0)
        less = tl.where(full, top + tl.log(tl.where(full, sum_, 1.0)), float("-inf"))
    else:
        less = tl.load(total + n)
    full = less > float("-inf")
    tl.store(
        out + n * 257 + i,
        tl.where(full, row - tl.where(full, less, 0.0), float("-inf")),
        mask=i < 257,
    )


@kernel
def reserve(row, proxy, rescue, log_share, log_rest, out, BLOCK: tl.constexpr):
    """Rows in which impossible bytes that `rescue` marks share a part. Grid: N."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mine = tl.load(row + n * 257 + i, mask=i < 257, other=0.0)
    marked = tl.load(rescue + n * 256 + i, mask=i < 256, other=0) != 0
    gap = marked & (mine == float("-inf"))
    likely = tl.load(proxy + n * 257 + i, mask=gap, other=float("-inf"))
    likely = tl.where(gap, tl.exp(tl.where(gap, likely, 0.0)) + 1e-9, 0.0)
    total = tl.sum(likely, 0)
    some = total > 0
    shared = _float(log_share) + tl.log(tl.where(gap, likely, 1.0))
    shared = shared - tl.log(tl.where(some, total, 1.0))
    new = tl.where(gap, shared, mine + _float(log_rest))
    tl.store(out + n * 257 + i, tl.where(some, new, mine), mask=i < 257)


@kernel
def gather(
    lanes, width, ctx, ctx_stride, node, node_stride, logu, logu_stride, logw, logw_stride,
    out, weights, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lanes of all four arrays; `out`, `weights` as in `select`. Grid: lanes, width / BLOCK."""
    n = tl.program_id(0).to(tl.int64)
    lane = tl.load(lanes + n)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    size = tl.num_programs(0).to(tl.int64) * width
    to = n * width + i
    tl.store(out + to, tl.load(ctx + lane * ctx_stride + i, mask=inside, other=0), mask=inside)
    at = tl.load(node + lane * node_stride + i, mask=inside, other=0)
    tl.store(out + size + to, at, mask=inside)
    given = tl.load(logu + lane * logu_stride + i, mask=inside, other=0.0)
    tl.store(weights + to, given, mask=inside)
    weight = tl.load(logw + lane * logw_stride + i, mask=inside, other=0.0)
    tl.store(weights + size + to, weight, mask=inside)


@kernel
def extend(
    new, more, width, ctx, ctx_stride, node, node_stride, logu, logu_stride, logw, logw_stride,
    out, weights, BLOCK: tl.constexpr,
):  # fmt: skip
    """Candidates and, after them, new ones at the root: new int64[2, N, more], contexts and the
    bits of their weights. `out`, `weights` as in `select`. Grid: N, (width + more) / BLOCK."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    both = width + more
    old, fresh = i < width, (i >= width) & (i < both)
    size = tl.num_programs(0).to(tl.int64) * both
    added = n * more + i - width
    bits = tl.load(new + tl.num_programs(0).to(tl.int64) * more + added, mask=fresh, other=0)
    weight = _float(bits)
    context = tl.load(ctx + n * ctx_stride + i, mask=old, other=0)
    context = tl.where(old, context, tl.load(new + added, mask=fresh, other=0))
    at = tl.load(node + n * node_stride + i, mask=old, other=0)
    given = tl.load(logu + n * logu_stride + i, mask=old, other=0.0)
    held = tl.load(logw + n * logw_stride + i, mask=old, other=0.0)
    to = n * both + i
    tl.store(out + to, context, mask=i < both)
    tl.store(out + size + to, at, mask=i < both)
    tl.store(weights + to, tl.where(old, given, weight), mask=i < both)
    tl.store(weights + size + to, tl.where(old, held, weight), mask=i < both)
