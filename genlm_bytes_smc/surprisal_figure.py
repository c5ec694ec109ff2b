"""Pictures of surprisal: bars a part, one row a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from genlm_bytes_smc.html import printable

WIDEST = 60.0  # inches


def draw(results: Sequence[Any]) -> Figure:
    """Return a picture of the surprisal of the same text's parts, in bits, one row a model.

    Args:
        results: `Surprisal`s of one text and the same parts, as of `compare_surprisal`.

    Raises:
        ValueError: none, or of different parts.
    """
    if not results:
        raise ValueError("there is nothing to draw: no results were given")
    first = results[0]
    for other in results[1:]:
        if other.text != first.text or not np.array_equal(other.spans, first.spans):
            raise ValueError("the results are of different texts or parts")
    width = min(max(6.0, 0.3 * len(first)), WIDEST)
    figure = Figure(figsize=(width, 1.2 + 1.8 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    places = np.arange(len(first))
    for result, axis in zip(results, axes, strict=True):
        axis.bar(places, np.where(np.isfinite(result.bits), result.bits, 0.0), color="#2563c9")
        axis.set_ylabel("bits")
        if result.model:
            axis.set_title(result.model, loc="left", fontsize=9)
    # A dollar sign would begin mathematics.
    labels = [printable(part).replace("$", r"\$") for part in first.parts]
    axes[-1].set_xticks(places, labels, rotation=90, family="monospace")
    return figure
