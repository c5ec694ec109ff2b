"""The share of next-byte rows that is set aside for bytes that only healing can read.

What such bytes weigh exactly would cost LM rows for bytes that are mostly never read. So they
get `HEAL_RESERVE` of the row between them, in proportion to how likely the best candidate's
row holds a token to begin with them (see `ByteLanes.logp_next`).
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.kernels import Kernels
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import BeamState
from genlm_bytes_smc.beam.steps import Rescues
from genlm_bytes_smc.lm.contexts import IntArray

FloatArray = npt.NDArray[np.float64]

HEAL_RESERVE = 5e-5
"""Share of a row set aside for bytes that only healing can read."""


class RootBlock(NamedTuple):
    """How likely a next token begins with each byte, after each lane's best candidate.

    Attributes:
        contexts: int64[N, 1], the best candidates' contexts.
        block: float64[N, 257], log masses of their rows' tokens by first byte, nats.
    """

    contexts: IntArray
    block: torch.Tensor


def root_block(
    kernels: Kernels, state: BeamState, cut: IntArray, before: RootBlock | None
) -> RootBlock:
    """Return the root block of a state.

    Args:
        kernels: the arithmetic.
        state: the candidates, best first; their rows are there.
        cut: trie positions that are no text.
        before: what was found a byte ago: it still holds while the best candidates stay in
            the same token, which is most of the time.
    """
    roots = kernels.roots(state)
    contexts = kernels.contexts(roots)
    if before is not None and np.array_equal(before.contexts, contexts):
        return before
    return RootBlock(contexts, kernels.next_block(roots, cut))


class Reserve:
    """What beams of equal parameters set aside for healing.

    Args:
        model: the byte model.
        params: whether, and within which limits, to heal.
        cut: trie positions of the tokens that are no text.

    Attributes:
        share: of each row; 0: healing is off.
    """

    def __init__(self, model: ByteModel, params: BeamParams, cut: IntArray) -> None:
        self.model = model
        self.cut = cut
        self.share = HEAL_RESERVE if params.heal else 0.0
        self._limits = params.heal_max_backoff, params.heal_max_splits

    @cached_property
    def rescues(self) -> Rescues:
        """Which bytes healing could read, for compiled steps: looked up once, as they ask for
        it at every byte."""
        return self.model.rescues(tuple(self.cut.tolist()), *self._limits)

    def lossy(self, log_dropped: FloatArray, ext_dropped: FloatArray) -> npt.NDArray[np.bool_]:
        """Lanes that set a share aside, bool[N]: where nothing was ever dropped, what reads as
        impossible is impossible.

        Args:
            log_dropped: float64[N], log mass dropped up to the last byte, nats.
            ext_dropped: float64[N], that of the extensions left out since.
        """
        if not self.share:
            return np.zeros(len(log_dropped), dtype=bool)
        return np.maximum(log_dropped, ext_dropped) > -np.inf

    def give(
        self,
        row: torch.Tensor,
        state: BeamState,
        block: torch.Tensor,
        lossy: npt.NDArray[np.bool_],
    ) -> torch.Tensor:
        """Give the bytes that only healing can read their share of the rows.

        Args:
            row: float64[N, 257], log probabilities.
            state: the candidates.
            block: of their `RootBlock`.
            lossy: bool[N], which lanes.
        """
        kernels = self.model.kernels
        rescue = self.model.rescue_rows(kernels.nodes(state), self.cut, *self._limits)
        return kernels.reserve(row, block, rescue & lossy[:, None], self.share)
