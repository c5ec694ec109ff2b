"""Beams side by side: what was made in one step stays together, and an entry is a place in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.alphabet import N_SYMBOLS
from genlm_bytes_smc.lm.contexts import IntArray

FloatArray = npt.NDArray[np.float64]


@dataclass(eq=False)
class Block:
    """Beams made in one step.

    Attributes:
        lanes: n of them.
        weight: float64[n] on the host: log weight of each lane's text, nats.
        entries: how many texts the cache finds here; at none the block is forgotten.
        rows: float64[n, 257] on the model's device, next-symbol rows of the lanes.
        has_row: bool[n], lanes whose row was asked for; the other rows are not filled in.
    """

    lanes: Any
    weight: FloatArray
    entries: int = 0
    nbytes: int = field(init=False)
    rows: torch.Tensor = field(init=False)
    has_row: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        n, device = len(self.weight), self.lanes.model.engine.device
        self.rows = torch.empty((n, N_SYMBOLS), dtype=torch.float64, device=device)
        self.has_row = np.zeros(n, dtype=bool)
        self.nbytes = self.lanes.nbytes + self.weight.nbytes + self.rows.nbytes

    async def fill(self) -> Block:
        """Return this block with the rows of all its lanes."""
        self.rows = await self.lanes.logp_next()
        self.has_row[:] = True
        return self


@dataclass(frozen=True, eq=False)
class Entry:
    """The beam of one text: lane `lane` of `block`."""

    block: Block
    lane: int


async def fill_rows(entries: Sequence[Entry | None]) -> None:
    """Compute the next-symbol rows that beams still lack."""
    lacking = {(id(e.block), e.lane): e for e in entries if e and not e.block.has_row[e.lane]}
    if not lacking:
        return
    ordered = list(lacking.values())
    first = ordered[0].block
    if len(ordered) == len(first.weight) and all(e.block is first for e in ordered):
        await first.fill()
        return
    lanes, order = side_by_side(ordered)
    rows = await lanes.logp_next()
    for block, where, at in by_block([ordered[i] for i in order]):
        device = rows.device
        block.rows[torch.from_numpy(at).to(device)] = rows[torch.from_numpy(where).to(device)]
        block.has_row[at] = True


def side_by_side(entries: list[Entry]) -> tuple[Any, IntArray]:
    """Put the lanes of `entries` side by side, lane j being that of `entries[order[j]]`."""
    blocks = by_block(entries)
    lanes = [block.lanes.gather(lane) for block, _, lane in blocks]
    order = np.concatenate([where for _, where, _ in blocks])
    return lanes[0] if len(lanes) == 1 else type(lanes[0]).cat(lanes), order


def by_block(entries: Sequence[Entry | None]) -> list[tuple[Block, IntArray, IntArray]]:
    """(block, places in `entries`, lanes) of each block among the entries."""
    blocks: dict[int, Block] = {}
    places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for n, entry in enumerate(entries):
        if entry is not None:
            blocks[id(entry.block)] = entry.block
            places[id(entry.block)].append((n, entry.lane))
    pairs = {i: np.array(p, dtype=np.int64) for i, p in places.items()}
    return [(blocks[i], p[:, 0], p[:, 1]) for i, p in pairs.items()]


def extended(entries: Sequence[Entry | None], columns: Sequence[int]) -> FloatArray:
    """Log weight of each text with one more symbol, float64[N], nats."""
    out = np.full(len(entries), -np.inf)
    column = np.asarray(columns, dtype=np.int64)
    for block, where, lanes in by_block(entries):
        device = block.rows.device
        index = torch.from_numpy(lanes).to(device), torch.from_numpy(column[where]).to(device)
        out[where] = block.weight[lanes] + block.rows[index].cpu().numpy()
    return out


def weight_of(entries: Sequence[Entry | None]) -> FloatArray:
    """Return the log weight of each text, float64[N], nats."""
    weights = [-np.inf if e is None else e.block.weight[e.lane] for e in entries]
    return np.array(weights, dtype=np.float64)


def pick(rows: torch.Tensor, lanes: IntArray) -> torch.Tensor:
    """Return the rows of some lanes."""
    return rows[torch.from_numpy(lanes).to(rows.device)]
