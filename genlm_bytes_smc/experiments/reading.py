"""Known texts read byte by byte: every next-byte row on the way, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.rows import RowStore

FloatArray = npt.NDArray[np.float64]


@dataclass
class Reading:
    """Log-probabilities of T texts, and the cost of reading them.

    Attributes:
        logp: for each text float64[n], nats: log weight of each of its bytes given those
            before, as the row says; -inf from where the beam died.
        rows: for each text float64[n, 257], nats, if they were kept; else empty.
        log_dropped: float64[T], nats: what pruning dropped is at most this.
        lm_rows: distinct contexts whose row was wanted.
        seconds, cpu: wall and processor time.
    """

    logp: list[FloatArray]
    rows: list[FloatArray]
    log_dropped: FloatArray
    lm_rows: int
    seconds: float
    cpu: float


class RowMeter:
    """A count of distinct rows that were wanted: the cost of a run that finds nothing computed.

    Contexts are counted by their ids, so none may be freed meanwhile: the meter holds them.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    @property
    def rows(self) -> int:
        """Distinct contexts so far."""
        return len(self._seen)

    def add(self, contexts: IntArray) -> None:
        """Count contexts, by id; negative ones are none."""
        self._seen.update(contexts[contexts >= 0].tolist())

    def context_ids(self) -> IntArray:
        """Return the contexts that may not be freed, int64."""
        return np.fromiter(self._seen, dtype=np.int64)


@contextmanager
def metered(store: RowStore) -> Iterator[RowMeter]:
    """Count the contexts that anybody asks a store for: those whose rows are missing.

    The store is emptied first.
    """
    store.clear()
    meter, ensure = RowMeter(), store.ensure

    async def counted(contexts: IntArray) -> None:
        meter.add(contexts)
        await ensure(contexts)

    store.ensure = counted  # type: ignore[method-assign]
    store.engine.tree.track(meter)
    try:
        yield meter
    finally:
        del store.ensure


async def read_texts(
    model: ByteModel, params: BeamParams, texts: Sequence[bytes], *, keep_rows: bool = False
) -> Reading:
    """Read T texts side by side, each from the model's start.

    With `keep_rows`, every next-byte row is kept (2 KiB a byte).
    """
    symbols = symbol_table(texts)
    logp = np.full(symbols.shape, -np.inf)
    rows = np.full((*symbols.shape, 257), -np.inf) if keep_rows else None
    wall, cpu = time.perf_counter(), time.process_time()
    with metered(model.store) as meter:
        lanes = (await ByteLanes.start(model, params, len(texts))).prune()
        for i in range(symbols.shape[1]):
            block = (await lanes.rows()).numpy()
            now = np.where(lanes.alive, symbols[:, i], -1)
            at = np.flatnonzero(now >= 0)
            logp[at, i] = block[at, now[at]]
            if rows is not None:
                rows[:, i] = block
            lanes = await lanes.step(now)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Reading(
        [line[: len(t)] for line, t in zip(logp, texts, strict=True)],
        [] if rows is None else [block[: len(t)] for block, t in zip(rows, texts, strict=True)],
        lanes.log_dropped,
        meter.rows,
        wall,
        cpu,
    )


def symbol_table(texts: Sequence[bytes]) -> IntArray:
    """Return texts as int64[T, longest], -1 after the end of a shorter one."""
    out = np.full((len(texts), max(map(len, texts), default=0)), -1, dtype=np.int64)
    for line, text in zip(out, texts, strict=True):
        line[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    return out
