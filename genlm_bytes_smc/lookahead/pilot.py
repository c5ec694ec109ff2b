"""Pilot runs: where particles go, and what the language model says there."""

from __future__ import annotations

import operator
from collections import Counter
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch

from genlm_bytes_smc.alphabet import BYTES
from genlm_bytes_smc.lookahead.find import language_models_of
from genlm_bytes_smc.lookahead.ngram import Float
from genlm_bytes_smc.smc.loop import smc_steps
from genlm_bytes_smc.smc.runs import AllParticlesDeadError

_BATCH = 256


class Visits(NamedTuple):
    """Texts that pilot particles were at, with what follows.

    Attributes:
        texts: the V distinct texts.
        counts: float64[V], how many particles were at each.
        rows: float64[V, 257], mass of the next byte and of the end under the language models.
    """

    texts: list[bytes]
    counts: Float
    rows: Float

    def __add__(self, other: Visits) -> Visits:  # type: ignore[override]
        return Visits(
            self.texts + other.texts,
            np.concatenate([self.counts, other.counts]),
            np.concatenate([self.rows, other.rows]),
        )


async def visits_of(target: Any, n_particles: int, max_bytes: int, **options: Any) -> Visits:
    """Run `smc` and gather where its particles were (those that died, until they did)."""
    count: Counter[bytes] = Counter()
    try:
        async for state in smc_steps(target, n_particles, max_bytes=max_bytes, **options):
            texts = state.particles.texts()
            count.update(texts[i] for i in np.flatnonzero(state.particles.active))
    except AllParticlesDeadError:
        pass  # what was seen before is still worth knowing
    texts = sorted(count, key=len)
    llm = reduce(operator.mul, language_models_of(target))
    rows = []
    for some in range(0, len(texts), _BATCH):
        contexts = [[BYTES[b] for b in t] for t in texts[some : some + _BATCH]]
        weights = torch.as_tensor((await llm.batch_logw_next(contexts)).weights).double()
        rows.append(weights.exp().cpu().numpy())
    return Visits(texts, np.array([float(count[t]) for t in texts]), np.concatenate(rows))


def longest(seen: Visits, most: int) -> list[bytes]:
    """At most so many of the texts visited that no other one goes on from, of all lengths."""
    begun = {text[:-1] for text in seen.texts}
    found = sorted({t for t in seen.texts if t not in begun}, key=lambda t: (len(t), t))
    return found[:: -(-len(found) // most)]
