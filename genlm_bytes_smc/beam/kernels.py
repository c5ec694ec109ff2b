"""What goes into the compiled steps of N byte beams, and what comes out: see `kernels_host`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.rules import Rules
from genlm_bytes_smc.beam.state import BeamState, FloatArray, SharedLanes
from genlm_bytes_smc.lm.contexts import IntArray

NOTHING: IntArray = np.empty(0, dtype=np.int64)

Limits = tuple[int, int]


class Look(NamedTuple):
    """What is known of lanes before they read a symbol.

    Attributes:
        extended: the candidates and their admitted token-ending extensions; None: not yet known.
        dropped: float64[N], log mass of the extensions left out, nats.
        row: float64[N, 257] on the host, log probabilities of the next symbol, if asked for.
        missing: int64[m], contexts whose rows are missing; unless it is empty `row` says nothing.
    """

    extended: BeamState | None
    dropped: FloatArray
    row: torch.Tensor | None = None
    missing: IntArray = NOTHING


@dataclass
class Ahead:
    """What is known of lanes before they read on; found once, when first asked for."""

    look: Look | None = None


class Read(NamedTuple):
    """One symbol read in every lane.

    Attributes:
        state: the candidates, best first.
        log_z: float64[N], their weights, nats; -inf where none could read the symbol. Of a text
            that ended, its own.
        log_dropped: float64[N], log of all the mass dropped so far, nats.
        missing: int64[m], contexts whose rows are missing; unless it is empty the rest says
            nothing.
        look: of the new state, as far as it is known.
    """

    state: BeamState
    log_z: FloatArray
    log_dropped: FloatArray
    missing: IntArray = NOTHING
    look: Look | None = None


class Texts(NamedTuple):
    """Texts that are known, a line each.

    Attributes:
        lines: uint8[N, L].
        lengths: int64[N].
        known: int64[N, L + 1], for each number of bytes a context that has read so many, -1 where
            none is known; filled in while they are read. An id may have been freed and be another
            context's by now: nothing but what is fetched early depends on it.
    """

    lines: npt.NDArray[np.uint8]
    lengths: IntArray
    known: IntArray

    @classmethod
    def of(cls, texts: list[bytes]) -> Texts:
        """Return the texts, of which nothing is known."""
        lengths = np.array([len(t) for t in texts], dtype=np.int64)
        longest = int(lengths.max(initial=0))
        flat = bytearray().join(t.ljust(longest, b"\0") for t in texts)
        lines = np.frombuffer(flat, dtype=np.uint8).reshape(len(texts), longest)
        return cls(lines, lengths, np.full((len(texts), longest + 1), -1, dtype=np.int64))


class Run(NamedTuple):
    """Texts read with the rows at hand.

    Attributes:
        state, log_z, log_dropped: after the last byte for which nothing was missing.
        read: how many bytes were read then, in all.
        missed: int64[m], contexts whose rows were missed from there on.
        at: int64[m], at which byte each was missed, ascending.
        ends: whether the likeliest symbol is then the end of the text, if such are followed.
    """

    state: BeamState
    log_z: FloatArray
    log_dropped: FloatArray
    read: int
    missed: IntArray
    at: IntArray
    ends: bool = False


class Lanes(SharedLanes):
    """N lanes as the kernels take them: see `ByteLanes`."""

    state: BeamState
    log_dropped: FloatArray
    rules: Rules
