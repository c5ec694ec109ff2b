"""The total weight of everything that can follow each state of a weighted automaton."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.constraints.base import ConstraintError

IntArray = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]

MOST_STATES = 4096


def total_weights(source: IntArray, target: IntArray, weight: Float, final: Float) -> Float:
    """Log weight of all paths from each state to an end, float64[S]; -inf where none is.

    The sums solve b = A b + F. Both sides are first divided by the weight of each state's
    best path (found by relaxing arcs, Bellman 1958), so that what is solved is near 1 whatever
    the scale of the weights, and what underflows in it is relatively nothing.

    Args:
        source, target: int64[E], the ends of each arc.
        weight: float64[E], its log weight.
        final: float64[S], log weight of ending.

    Raises:
        ConstraintError: a total is infinite, or there are more than 4096 states.
    """
    n = len(final)
    if n > MOST_STATES:
        raise ConstraintError(f"at most {MOST_STATES} weighted states are supported, got {n}")
    best = final.copy()
    for _ in range(n):
        before = best.copy()
        np.maximum.at(best, source, weight + before[target])
        if (best == before).all():
            break
    else:
        raise _infinite()
    ends = np.isfinite(best)
    used = ends[source] & ends[target] & np.isfinite(weight)
    source, target, weight = source[used], target[used], weight[used]
    name = np.cumsum(ends) - 1
    step = np.zeros((int(ends.sum()),) * 2)
    scaled = np.exp(weight + best[target] - best[source])
    np.add.at(step, (name[source], name[target]), scaled)
    last = np.exp(final[ends] - best[ends])
    try:
        total = np.linalg.solve(np.eye(len(step)) - step, last)
    except np.linalg.LinAlgError:
        raise _infinite() from None
    # A positive solution exists exactly where the series converges: every state here reaches
    # an end, so a step then loses weight somewhere on the way (Perron and Frobenius).
    if not (total > 0).all() or not np.isfinite(total).all():
        raise _infinite()
    out = np.full(n, -np.inf)
    out[ends] = best[ends] + np.log(total)
    return out


def _infinite() -> ConstraintError:
    return ConstraintError(
        "the weights of all texts add up to infinity (a cycle returns with weight one or more), "
        "so prefixes have no weight; scale the weights down"
    )
