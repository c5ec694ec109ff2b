"""How candidates read a known byte where no compiled step does it whole."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.commit import contexts_after
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.rng import KeyArray, read_keys
from genlm_bytes_smc.beam.state import BeamState
from genlm_bytes_smc.lm.contexts import IntArray

FloatArray = npt.NDArray[np.float64]


class Reading(NamedTuple):
    """Candidates after one byte a lane.

    Attributes:
        state: the candidates, best first.
        log_z: float64[N], their weights, nats; -inf where none could read the byte.
        log_dropped: float64[N], log of all the mass dropped so far, nats.
    """

    state: BeamState
    log_z: FloatArray
    log_dropped: FloatArray


async def read_topk(
    model: ByteModel,
    state: BeamState,
    log_dropped: FloatArray,
    bytes_: IntArray,
    cut: IntArray,
    log_threshold: float,
) -> Reading:
    """Read one byte a lane, extending only what can read it.

    Args:
        model: the byte model.
        state: the candidates, whose rows are there.
        log_dropped: float64[N], log mass dropped before, nats.
        bytes_: int64[N]; -1 empties a lane.
        cut: trie positions that are no text.
        log_threshold: log share of the candidates that can read the byte, below which
            extensions are dropped.
    """
    kernels = model.kernels
    state, _, ext = kernels.open_read(state, bytes_, cut, log_threshold, prune=None)
    contexts = await contexts_after(model, state, ext)
    state, log_z = kernels.close_read(state, ext, contexts, bytes_, cut)
    return Reading(state, log_z, np.logaddexp(log_dropped, ext.dropped))


def read_unbiased(
    model: ByteModel,
    extended: BeamState,
    key: KeyArray,
    log_dropped: FloatArray,
    bytes_: IntArray,
    cut: IntArray,
) -> Reading:
    """Read one byte a lane in candidates that were extended at random: nothing is dropped.

    Args:
        model: the byte model.
        extended: the candidates with their extensions.
        key: uint64[N], generator keys before the byte.
        log_dropped: float64[N], as it stays.
        bytes_: int64[N]; -1 empties a lane.
        cut: trie positions that are no text.
    """
    kernels = model.kernels
    state, _ = kernels.select(kernels.advance(extended, bytes_, cut), None, -np.inf)
    log_z = kernels.log_z(state)
    return Reading(state._replace(key=read_keys(key, bytes_)), log_z, log_dropped)
