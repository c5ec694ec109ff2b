"""Targets small enough to sum over all their texts, and the checks that use the sums."""

from __future__ import annotations

import math

import numpy as np

from genlm_bytes_smc import BeamParams, as_engine
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc import AllParticlesDeadError, smc
from tests.toys import EOS_TOKEN, Enumeration, ToyLM

TEXTS = [b"ab", b"ba", b"abc", b"cab", b"bb", b"abab", b"caba", b"c"]
PATTERN = "|".join(t.decode() for t in TEXTS)
FREE = "(a[bc]|b[ca])*[ab]?"  # every prefix of its texts is one of them
LONGEST = max(map(len, TEXTS))

EXACT = BeamParams(K=None, prune_threshold=0.0, eos_byte_strings=[EOS_TOKEN])
TOPK = BeamParams(K=2, prune_threshold=0.1, eos_byte_strings=[EOS_TOKEN])
RANDOM = BeamParams(K=1, prune_threshold=0.3, eos_byte_strings=[EOS_TOKEN], prune="unbiased")


def toy(seed=1, params=EXACT, sharpness=1.0):
    """A byte language model over a toy, with an engine of its own."""
    return ByteLLM(as_engine(ToyLM(seed=seed, sharpness=sharpness)), params)


def finite(llm, texts=TEXTS):
    """The language model restricted to a finite set of texts."""
    return llm * ByteRegex("|".join(t.decode() for t in texts))


async def weights_of(llm, texts=TEXTS):
    """exp of the potential's own weight of each text."""
    log_weights = await llm.batch_complete([[bytes([b]) for b in t] for t in texts])
    return dict(zip(texts, np.exp(np.asarray(log_weights)).tolist(), strict=True))


def exact_weights(llm, texts=TEXTS):
    """The exact language model's probability of each text, by enumeration."""
    inner = llm.model.engine.llm if hasattr(llm.model.engine, "llm") else llm.llm.llm
    truth = Enumeration(inner, frozenset([EOS_TOKEN]))
    return {t: truth.ended(t) for t in texts}


class Estimates:
    """Estimates of a marginal likelihood from many runs, dead runs as zero."""

    def __init__(self, values):
        self.values = np.array(values)
        self.mean = float(self.values.mean())
        self.error = float(self.values.std(ddof=min(1, len(values) - 1)) / math.sqrt(len(values)))

    def agree(self, truth):
        return abs(self.mean - truth) <= 4 * self.error + 1e-12 * truth

    def __repr__(self):
        return f"{self.mean:.6g} ± {self.error:.2g}"


async def estimates(target, runs, n=4, ess=0.5, max_bytes=LONGEST, first=0, **options):
    """exp(log_ml) of runs with seeds `first`, `first` + 1, ..."""
    values = []
    for seed in range(first, first + runs):
        try:
            result = await smc(target, n, ess, max_bytes, seed=seed, progress=False, **options)
            values.append(math.exp(result.log_ml))
        except AllParticlesDeadError:
            values.append(0.0)
    return Estimates(values)


def total_variation(posterior, weights):
    """Half the l1 distance of a chart and normalised weights."""
    total = sum(weights.values())
    keys = set(posterior) | set(weights)
    return 0.5 * sum(abs(posterior.get(k, 0.0) - weights.get(k, 0.0) / total) for k in keys)


def same(a, b):
    """Whether two results are equal in texts, weights and history but for times."""
    names = ("log_weights", "ended", "eve")
    return (
        a.texts == b.texts
        and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)
        and [_plain(i) for i in a.history] == [_plain(i) for i in b.history]
    )


def _plain(info):
    """What of a step does not depend on caches and clocks, comparable by ==."""
    values = info._replace(seconds=0, rows=0, forwards=0)
    return [v.tolist() if isinstance(v, np.ndarray) else v for v in values]
