"""Which particles go on after a byte: drawn with replacement, or distinct texts without it.

`resampled` is the usual way. `advance_distinct` is the other one (`smc(distinct=True)`): one row of
the target tells the weight of every text that is one byte longer, so nothing has to be drawn
before the choice. Among all these candidates, and the texts that have ended, N are kept by the
optimal resampling of Fearnhead & Clifford 2003 (*On-line inference for hidden Markov models via
particle filters*, section 3.2): with the c that solves

    sum over candidates of min(1, s_i / c) = N

a candidate whose selection weight s_i is at least c is kept for sure, and the others by
systematic sampling with probability s_i / c. Its weight w_i is divided by the probability of
having been kept, so the mean of every weighted sum stays what it was. Without a twist s_i is w_i.
With a look-ahead s_i is the weight that it promises, in which a proposal's defensive share is
mixed, so that nothing of weight is left out.

A text stands in one particle, except where there are fewer texts than particles: then copies
of a text share its weight. They share its lane too, so they cost nothing, and count as one
text in the next step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.lanes import Rows
from genlm_bytes_smc.smc.particles import NO_SYMBOL, Particles, StepInfo, Weights
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.reading import Advance, advance
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.runs import Runs
from genlm_bytes_smc.smc.weighers import Twist

_ROUNDING = 1e-9  # relative, of an effective sample size


Chosen = tuple[Particles, IntArray | None, dict[int, IntArray]]


async def resampled(
    runs: Runs,
    particles: Particles,
    weights: Sequence[Weights],
    infos: Sequence[StepInfo],
    rngs: Sequence[np.random.Generator | None],
) -> Chosen:
    """Keep a candidate of each roll-out that ends, and resample the runs that need it.

    Returns:
        The particles that go on, with their weights; their places before, int64[R N], None if
        all go on; and the ancestors in each run that was resampled, int64[N].
    """
    plan = runs.plans[0]
    if not plan.rollout.ends(runs.step, sum([info.active for info in infos])):
        return particles, None, {}
    index, log_weights = np.arange(len(particles.length)), particles.log_weights
    if plan.rollout.candidates > 1 and rngs[0] is not None:  # of one run
        index, log_weights = plan.rollout.pick(log_weights, rngs[0])
        weights = [Weights(log_weights)]
    ancestors: dict[int, IntArray] = {}
    least = plan.ess_threshold * (len(index) // len(rngs)) * (1 - _ROUNDING)
    for r, rng in enumerate(rngs):
        if rng is not None and infos[r].active and weights[r].ess < least:
            ancestors[r] = plan.resample(weights[r].normalised, rng)
            if runs.pins is not None:  # ascending; independent of the place from here on
                ancestors[r] = rng.permutation(ancestors[r])
    if not ancestors and plan.rollout.candidates == 1:
        return particles, None, {}
    if runs.pins is not None:
        due = list(ancestors)
        firsts = await runs.pins.ancestors(runs, particles, due)
        for r, first in zip(due, firsts.tolist(), strict=True):
            ancestors[r][0] = first
    kept, log_weights = index.copy(), log_weights.copy()
    n = len(index) // len(rngs)
    for r, mine in ancestors.items():
        kept[r * n : (r + 1) * n] = index[mine + r * n]
        log_weights[r * n : (r + 1) * n] = weights[r].log_mean
    return particles.gather(kept, log_weights), kept, ancestors


async def advance_distinct(
    runs: Runs, rngs: Sequence[np.random.Generator | None]
) -> tuple[Runs, Advance]:
    """Choose distinct texts that are one symbol longer, and read that symbol.

    Args:
        runs: before the step.
        rngs: of its random numbers, one a run, one number of each; None for a run that is over.

    Returns:
        The runs with the particles that were chosen, before they read, and the reading.
    """
    particles, frontier = runs.particles, runs.frontier
    rows = await frontier.rows()
    gain = _gains(frontier.plan, rows, runs.step)
    index, symbols = np.arange(len(particles.length)), np.full(len(particles.length), NO_SYMBOL)
    log_weights = particles.log_weights.copy()
    for r, rng in enumerate(rngs):
        if rng is not None:
            mine, own = runs.of(r), runs.some(particles, r)
            chosen, symbols[mine], log_weights[mine] = _choose(
                gain, own, frontier.lane_of[mine], rng.random()
            )
            index[mine] = mine.start + chosen
    # Whatever was added to equal texts is equal, so it can be taken back from their sum.
    before = particles.gather(index, log_weights)
    at = frontier._replace(lane_of=frontier.lane_of[index])
    none = np.zeros(len(index))
    read = await advance(before, at, runs.step, none, symbols, score=True, rows=rows)
    return runs._replace(particles=before, frontier=at), read


def _gains(plan: Plan, rows: Rows, step: int) -> FloatArray:
    """Return by what symbols multiply the selection weight of texts of `step` bytes.

    Returns:
        float64[D, 257], nats.
    """
    promised, q = rows.target, rows.target if rows.proposal is None else rows.proposal
    for weigher in plan.weighers:
        if isinstance(weigher, Twist):
            psi = rows.blocks[weigher.ahead].to(promised.device)
            promised = promised + weigher.strength * psi
    gain = q.cpu().numpy().copy()
    if promised is not q:
        drawn, total = _log_sums(q), _log_sums(promised)
        gain += (total - np.where(np.isneginf(drawn), 0.0, drawn))[:, None]
    if step >= plan.max_bytes:
        gain[:, :EOS_COLUMN] = -np.inf
        gain[:, EOS_COLUMN] = rows.target[:, EOS_COLUMN].cpu().numpy()
    return gain


def _choose(
    gain: FloatArray, particles: Particles, lane_of: IntArray, u: float
) -> tuple[IntArray, IntArray, FloatArray]:
    """Choose n texts of a run of n particles.

    Args:
        gain: see `_gains`.
        particles: of the run, before reading.
        lane_of: int64[n], their lanes.
        u: a random number in [0, 1).

    Returns:
        The particle that each goes on from and the symbol that it reads (`NO_SYMBOL` if it
        has ended), int64[n] each, and its log weight before reading, float64[n], nats.
    """
    n, w = len(lane_of), particles.log_weights
    here = np.flatnonzero(particles.active)
    ended = np.flatnonzero(particles.ended & ~particles.dead)
    lanes, first, group = np.unique(lane_of[here], return_index=True, return_inverse=True)
    total = np.full(len(lanes), -np.inf)
    np.logaddexp.at(total, group, w[here])
    gain = gain[lanes]
    lane, symbol = np.nonzero(gain > -np.inf)
    source = np.concatenate([here[first[lane]], ended])
    symbols = np.concatenate([symbol, np.full(len(ended), NO_SYMBOL)])
    weight = np.concatenate([total[lane], w[ended]])
    score = np.concatenate([total[lane] + gain[lane, symbol], w[ended]])
    if not len(source):  # all die by what they read
        return np.arange(n), np.full(n, EOS_COLUMN), np.full(n, -np.inf)
    kept, log_share = without_replacement(score, n, u)
    weight = weight[kept] - log_share
    # Where texts are fewer than particles, the heaviest ones that read on are copied first.
    many = np.flatnonzero(symbols[kept] >= 0)
    many = many if len(many) else np.arange(len(kept))
    heaviest = many[np.argsort(-score[kept][many], kind="stable")]
    place = np.concatenate([np.arange(len(kept)), np.resize(heaviest, n - len(kept))])
    count = np.bincount(place, minlength=len(kept))
    chosen = kept[place]
    return source[chosen], symbols[chosen], (weight - np.log(count))[place]


def _log_sums(rows: torch.Tensor) -> FloatArray:
    """Return the log of the sum of each row, float64[D], the same however many rows there are."""
    top = rows.amax(dim=1).clamp_(min=torch.finfo(rows.dtype).min)
    sums = torch.exp(rows - top[:, None]).cumsum(1)[:, -1]
    return (top + torch.log(sums)).cpu().numpy()


def without_replacement(log_weights: FloatArray, n: int, u: float) -> tuple[IntArray, FloatArray]:
    """Choose at most n of M items, each at most once, by the optimal resampling.

    Args:
        log_weights: float64[M], finite, nats.
        n: how many, at least 1.
        u: a random number in [0, 1).

    Returns:
        The items, int64[min(n, M)], ascending, and the log of the probability with which each was
        chosen, float64, nats.
    """
    m = len(log_weights)
    if m <= n:
        return np.arange(m), np.zeros(m)
    order = np.argsort(-log_weights, kind="stable")
    falling = log_weights[order]
    rest = np.logaddexp.accumulate(falling[::-1])[::-1]  # log of the sum from each on
    c = rest[:n] - np.log(n - np.arange(n))
    light = np.flatnonzero(falling[:n] < c)
    sure = int(light[0]) if len(light) else n
    log_share = np.zeros(m)
    if sure == n:  # equal weights, up to rounding
        return np.sort(order[:n]), log_share[:n]
    others = np.sort(order[sure:])
    log_share[others] = np.minimum(log_weights[others] - c[sure], 0.0)
    run = np.exp(log_share[others]).cumsum()
    points = (u + np.arange(n - sure)) * (run[-1] / (n - sure))
    drawn = np.searchsorted(run, points, side="right").clip(max=len(others) - 1)
    kept = np.unique(np.concatenate([order[:sure], others[drawn]]))
    return kept, log_share[kept]
