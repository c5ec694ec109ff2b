"""The distinct unfinished texts of a run: where language models and constraints do work.

Particles with equal texts share one lane, so a step costs what its distinct texts cost.
Lanes that no particle is on any more (they ended, died, or were not resampled) are left out
before anything is computed for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.lm.transfer import send
from genlm_bytes_smc.smc.factors import Combine, Factor, LanesFactor, start_factor, together
from genlm_bytes_smc.smc.particles import Particles, Uint8Array
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray


class Rows(NamedTuple):
    """Log weights of what may come next after each distinct text, nats.

    Attributes:
        blocks: one float64[D, 257] a factor.
        target: float64[D, 257], unnormalised.
        proposal: float64[D, 257] to draw from, unnormalised; None: the target itself.
    """

    blocks: Sequence[torch.Tensor]
    target: torch.Tensor
    proposal: torch.Tensor | None


class Frontier(NamedTuple):
    """D distinct unfinished texts and what each factor knows about them; a value.

    Attributes:
        factors: what each leaf of target and proposal knows.
        target, proposal: how their rows combine.
        lane_of: int64[N], the lane of each particle, -1 for one that reads no more.
        size: D.
    """

    factors: Sequence[Factor]
    target: Combine
    proposal: Combine | None
    lane_of: IntArray
    size: int

    @classmethod
    async def start(
        cls,
        leaves: Sequence[Any],
        target: Combine,
        proposal: Combine | None,
        particles: Particles,
        beam_seed: int | None,
    ) -> Frontier:
        """At the texts of `particles`, all active ones of which have read equally many bytes."""
        factors = [await start_factor(leaf, beam_seed) for leaf in leaves]
        active = particles.active
        frontier = cls(factors, target, proposal, np.zeros(len(active), dtype=np.int64), 1)
        parents, symbols, lane_of = _replay(particles.text[active])
        for p, s in zip(parents, symbols, strict=True):
            frontier = await frontier._move(p, s, frontier.lane_of)
        lanes = np.full(len(active), -1, dtype=np.int64)
        lanes[active] = lane_of
        return frontier._replace(lane_of=lanes)

    async def rows(self) -> Rows:
        """Rows of all factors; language models that share a model share a forward."""
        slow = iter(await together([f.block() for f in self.factors if f.waits]))
        blocks = [next(slow) if f.waits else await f.block() for f in self.factors]
        return Rows(blocks, self.target(blocks), self.proposal and self.proposal(blocks))

    async def step(self, particles: Particles, lanes: IntArray, symbols: IntArray) -> Frontier:
        """Read on with the particles that are still active.

        Args:
            particles: after reading and resampling.
            lanes: int64[N], the lane each was on.
            symbols: int64[N], the byte each read.
        """
        active = particles.active
        codes, inverse = np.unique(lanes[active] * N_SYMBOLS + symbols[active], return_inverse=True)
        lane_of = np.full(len(active), -1, dtype=np.int64)
        lane_of[active] = inverse
        return await self._move(codes // N_SYMBOLS, codes % N_SYMBOLS, lane_of)

    async def _move(self, parents: IntArray, symbols: IntArray, lane_of: IntArray) -> Frontier:
        if len(parents) == 0:
            return self._replace(factors=(), lane_of=lane_of, size=0)
        factors = [await factor.step(parents, symbols) for factor in self.factors]
        return self._replace(factors=factors, lane_of=lane_of, size=len(parents))

    def engines(self) -> list[Any]:
        """The distinct token-level engines behind the factors."""
        found = [f.lanes.model.engine for f in self.factors if isinstance(f, LanesFactor)]
        return list({id(engine): engine for engine in found}.values())


def draw(rows: Rows, lanes: IntArray, uniform: FloatArray) -> tuple[IntArray, FloatArray]:
    """Draw the next symbol of A particles and weigh it.

    Without a proposal a symbol comes from the normalised target row and its weight is the
    row's total; with one, from the normalised proposal row q, weighted target / q.

    Args:
        rows: of D lanes.
        lanes: int64[A], each particle's lane.
        uniform: float64[A], in [0, 1).

    Returns:
        symbols int64[A] (0..256) and log weights float64[A], nats: -inf where a row holds
        nothing.
    """
    q = rows.target if rows.proposal is None else rows.proposal
    top = q.amax(dim=1).clamp_(min=torch.finfo(q.dtype).min)  # finite for an empty row
    run = torch.exp(q - top[:, None]).cumsum(1)
    total = top + torch.log(run[:, -1])
    at = send(lanes, q.device)
    run = run[at]
    point = send(uniform, q.device) * run[:, -1]
    symbol = torch.searchsorted(run, point[:, None], right=True)[:, 0].clamp_(max=EOS_COLUMN)
    log_weight = total[at]
    if rows.proposal is not None:
        ratio = rows.target[at, symbol] - (q[at, symbol] - log_weight)
        log_weight = torch.where(torch.isneginf(log_weight), log_weight, ratio)
    symbols, log_weights = torch.stack([symbol.double(), log_weight]).cpu().numpy()
    return symbols.astype(np.int64), log_weights


def uncovered(rows: Rows) -> float:
    """The largest share of a target row on symbols that the proposal gives weight zero."""
    if rows.proposal is None:
        return 0.0
    hidden = rows.target.masked_fill(~torch.isneginf(rows.proposal), -torch.inf)
    share = torch.logsumexp(hidden, 1) - torch.logsumexp(rows.target, 1)
    return float(torch.exp(share).nan_to_num(0.0).max()) if len(share) else 0.0


def _replay(text: Uint8Array) -> tuple[list[IntArray], list[IntArray], IntArray]:
    """How to get from the empty text to `text` uint8[A, t], equal prefixes once.

    Returns:
        For each byte, the lanes it is read after and the bytes, int64[D] both; and the last
        lanes of the A texts, int64[A].
    """
    n, length = text.shape
    order = np.lexsort(text.T[::-1]) if length else np.arange(n)
    text = text[order]
    # new[i, k]: the first k + 1 bytes of text i differ from those of text i - 1
    new = np.ones((n, length), dtype=bool)
    new[1:] = np.logical_or.accumulate(text[1:] != text[:-1], axis=1)
    lane = np.zeros(n, dtype=np.int64)
    parents, symbols = [], []
    for k in range(length):
        first = np.flatnonzero(new[:, k])
        parents.append(lane[first])
        symbols.append(text[first, k].astype(np.int64))
        lane = np.cumsum(new[:, k]) - 1
    lane_of = np.empty(n, dtype=np.int64)
    lane_of[order] = lane
    return parents, symbols, lane_of
