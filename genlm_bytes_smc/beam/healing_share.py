"""The share of a next-byte row that is set aside for bytes which only healing can read.

What those bytes weigh exactly would cost rows of the model for bytes that are mostly never read.
So they share `HEAL_RESERVE` of the row, in proportion to how likely the best candidate's row holds
a token to begin with them: none of them reads as impossible, and the others hardly change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.model import NO_CUT, ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.state import BeamState
from genlm_bytes_smc.beam.steps import Rescues
from genlm_bytes_smc.lm.contexts import IntArray

FloatArray = npt.NDArray[np.float64]

HEAL_RESERVE = 5e-5


class HealingShare:
    """Sets the share aside, for lanes of one model with equal parameters and cut.

    Args:
        model: the byte model.
        params: says whether beams are healed, and its limits.
        cut: trie positions of the tokens that are no text.

    Attributes:
        share: of a row; 0: healing is off.
    """

    def __init__(self, model: ByteModel, params: BeamParams, cut: IntArray) -> None:
        self.share = HEAL_RESERVE if params.heal else 0.0
        self._model, self._cut = model, cut
        self._limits = params.heal_max_backoff, params.heal_max_splits
        self._rescues: Rescues | None = None
        self._roots: tuple[IntArray, torch.Tensor] | None = None  # what `_root_block` gave last

    def lossy(self, log_dropped: FloatArray) -> npt.NDArray[np.bool_]:
        """Lanes of which a share is set aside, bool[N]: where nothing was ever dropped, what
        reads as impossible is impossible.

        Args:
            log_dropped: float64[N], log of the largest mass dropped, nats.
        """
        if not self.share:
            return np.zeros(len(log_dropped), dtype=bool)
        return log_dropped > -np.inf

    @property
    def rescues(self) -> Rescues:
        """Which bytes healing could read: what compiled steps take; always the same object."""
        if self._rescues is None:
            self._rescues = self._model.rescues(tuple(self._cut.tolist()), *self._limits)
        return self._rescues

    def set_aside(
        self, row: torch.Tensor, state: BeamState, lossy: npt.NDArray[np.bool_]
    ) -> torch.Tensor:
        """Rows float64[N, 257] with the share set aside in lanes `lossy` bool[N].

        Args:
            row: normalised log probabilities, nats.
            state: the candidates, before their extensions.
            lossy: see `lossy`.
        """
        if not lossy.any():
            return row
        kernels = self._model.kernels
        rescue = self._model.rescue_rows(kernels.nodes(state), self._cut, *self._limits)
        block = self._root_block(state)
        return kernels.reserve(row, block, rescue & lossy[:, None], HEAL_RESERVE)

    def context_ids(self) -> IntArray:
        """Contexts that must stay valid while this object is in use, int64[m]."""
        return NO_CUT if self._roots is None else self._roots[0].ravel()

    def _root_block(self, state: BeamState) -> torch.Tensor:
        """Log mass of each byte as the first of the best candidate's next token: [N, 257].

        Kept while the best candidates stay in the same token, which is most of the time.
        """
        kernels = self._model.kernels
        roots = kernels.roots(state)
        contexts = kernels.contexts(roots)
        if self._roots is None or not np.array_equal(self._roots[0], contexts):
            self._roots = contexts, kernels.next_block(roots, self._cut)
        return self._roots[1]
