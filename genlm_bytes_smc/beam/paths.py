"""The weight of lanes after each byte of texts that are known in advance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.deferred import DeferredLanes
from genlm_bytes_smc.beam.deferred_rows import RowSource
from genlm_bytes_smc.beam.deferred_text import read_texts
from genlm_bytes_smc.beam.prefill import fetch_ahead
from genlm_bytes_smc.lm.contexts import IntArray

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
        limit, n = lanes.model.store.table.limit, len(texts)
        if n > 1 and sum(map(len, texts)) > limit // 2:  # `read_texts` would halve them, too
            parts = [
                await read_paths(lanes.gather(np.arange(n)[half]), texts[half])
                for half in (slice(n // 2), slice(n // 2, n))
            ]
            return DeferredLanes.cat([p for p, _ in parts]), [q for _, qs in parts for q in qs]
        noting = await read_texts(_Noting.of(lanes), texts)
        assert isinstance(noting, _Noting)
        return noting.plain(), _cut(noting.path(max(map(len, texts))), texts)
    return await _read_bytewise(lanes, texts)


@dataclass(frozen=True, eq=False)
class _Noting(DeferredLanes):
    """Lanes that keep their weight after each byte: `noted` is (what was noted before, log_z)."""

    noted: tuple[Any, FloatArray] | None = None

    @classmethod
    def of(cls, lanes: DeferredLanes) -> _Noting:
        return cls(**_fields(lanes))

    def plain(self) -> DeferredLanes:
        """Return the lanes without what they noted."""
        return DeferredLanes(**_fields(self))

    async def stepped(self, symbols: IntArray, rows: RowSource) -> _Noting:
        """As in `DeferredLanes`."""
        after = await super().stepped(symbols, rows)
        return dataclasses.replace(after, noted=(self.noted, after.log_z))  # type: ignore[call-arg, return-value]

    def path(self, most: int) -> FloatArray:
        """Return `log_z` after each of `most` bytes, float64[N, most]."""
        found, link = [], self.noted
        while link is not None:
            found.append(link[1])
            link = link[0]
        missing = [np.full(len(self), -np.inf)] * (most - len(found))  # all lanes had died
        return np.stack([*reversed(found), *missing], axis=1)


def _fields(lanes: DeferredLanes) -> dict[str, Any]:
    return {f.name: getattr(lanes, f.name) for f in dataclasses.fields(DeferredLanes)}


def _cut(path: FloatArray, texts: Sequence[bytes]) -> list[FloatArray]:
    return [path[n, : len(text)] for n, text in enumerate(texts)]


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
    return type(lanes).cat(done).gather(np.argsort(order)), _cut(path, texts)
