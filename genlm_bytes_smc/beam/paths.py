"""The weight of lanes after each byte of texts that are known in advance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.deferred import DeferredLanes
from genlm_bytes_smc.beam.deferred_text import read_weighed
from genlm_bytes_smc.beam.prefill import fetch_ahead

FloatArray = npt.NDArray[np.float64]


async def read_paths(lanes: Any, texts: Sequence[bytes]) -> tuple[Any, list[FloatArray]]:
    """Read each lane's own text.

    Args:
        lanes: N of them, of either class.
        texts: N, whose lengths may differ.

    Returns:
        The lanes after their texts, and for each text its lane's `log_z` after each of its bytes,
        float64[bytes], nats; -inf from the first byte on that nothing could read.
    """
    if not any(texts):
        return lanes, [np.empty(0) for _ in texts]
    if isinstance(lanes, DeferredLanes):
        return await read_weighed(lanes, texts)
    return await _read_bytewise(lanes, texts)


async def _read_bytewise(lanes: Any, texts: Sequence[bytes]) -> tuple[Any, list[FloatArray]]:
    """Read byte by byte; a lane whose text is over is taken out."""
    path = np.full((len(texts), max(map(len, texts))), -np.inf)
    done, order = list[Any](), list[int]()
    going = np.arange(len(texts))
    lengths = np.array([len(text) for text in texts])
    ahead = await fetch_ahead(lanes, list(texts))
    with lanes.model.engine.tree.pinned(ahead):
        for at in range(path.shape[1] + 1):
            over, rest = np.flatnonzero(lengths[going] == at), np.flatnonzero(lengths[going] > at)
            if len(over):
                done.append(lanes.gather(over))
                order += going[over].tolist()
                lanes, going = lanes.gather(rest), going[rest]
            if len(going):
                lanes = await lanes.prune().read([texts[n][at] for n in going.tolist()])
                path[going, at] = lanes.log_z
    return type(lanes).cat(done).gather(np.argsort(order)), [
        path[n, : len(text)] for n, text in enumerate(texts)
    ]
