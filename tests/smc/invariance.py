"""Tests of invariance: start from the exact law, move, and see whether it is still there."""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.stats import chi2

LEAST = 1e-4  # p-value below which a law is not the one it should be


def p_value(texts, weights):
    """Of a chi-squared test that `texts` are independent draws with these weights.

    Args:
        texts: what was drawn.
        weights: dict of text to (unnormalised) probability; others are impossible.
    """
    total = sum(weights.values())
    keys = sorted(weights)
    assert set(texts) <= set(keys), set(texts) - set(keys)
    expected = np.array([weights[k] for k in keys]) / total * len(texts)
    found = Counter(texts)
    counts = np.array([found[k] for k in keys])
    often = expected >= 5  # the others are one cell
    cells = [np.append(x[often], x[~often].sum()) for x in (counts, expected)]
    counts, expected = (x[cells[1] >= 5] for x in cells)
    assert len(expected) > 5, "too few draws for the test"
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), len(expected) - 1))


def exact_draws(weights, n, seed=0):
    """n texts from the law with these weights."""
    keys = sorted(weights)
    p = np.array([weights[k] for k in keys])
    chosen = np.random.default_rng(seed).choice(len(keys), size=n, p=p / p.sum())
    return [keys[i] for i in chosen]
