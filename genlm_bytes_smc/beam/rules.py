"""How lanes prune, and what of their rows is set aside for bytes that only healing can read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam.symbols import N_BYTES
from genlm_bytes_smc.lm.contexts import IntArray

HEAL_RESERVE = 5e-5
"""Share of a row set aside for bytes that only healing can read.

What such bytes weigh exactly would cost LM rows for bytes that are mostly never read. So they
share this much of the row, in proportion to how likely the best candidate's row holds a token to
begin with them (see `ByteLanes.logp_next`).
"""


class Rescues:
    """Which bytes healing could read from each trie node, looked up as nodes occur.

    Args:
        nodes: number of trie nodes, M.
        find: the bytes of one node, bool[256].

    Attributes:
        line_of: int32[M], line of `lines` for a node, or -1.
        lines: bool[R, 256].
    """

    def __init__(self, nodes: int, find: Callable[[int], npt.NDArray[np.bool_]]) -> None:
        self._find = find
        self._known = 0
        self.line_of = np.full(nodes, -1, dtype=np.int32)
        self.lines = np.zeros((64, N_BYTES), dtype=bool)

    def learn(self, nodes: IntArray) -> None:
        """Look up the lines of these nodes (0 and negative ones are ignored)."""
        nodes = nodes[nodes > 0]
        for node in nodes[self.line_of[nodes] < 0].tolist():
            if self.line_of[node] < 0:
                if self._known == len(self.lines):
                    self.lines = np.concatenate([self.lines, np.zeros_like(self.lines)])
                self.lines[self._known] = self._find(node)
                self.line_of[node] = self._known
                self._known += 1

    def of(self, nodes: IntArray) -> npt.NDArray[np.bool_]:
        """Return the bytes that healing could read in each lane, bool[N, 256].

        Args:
            nodes: int64[N, C]; at the root (0) and in empty places (-1) nothing is in flight.
        """
        self.learn(nodes)
        out = np.zeros((len(nodes), N_BYTES), dtype=bool)
        lane, place = np.nonzero(nodes > 0)
        np.logical_or.at(out, lane, self.lines[self.line_of[nodes[lane, place]]])
        return out


@dataclass(frozen=True, eq=False)
class Rules:
    """How lanes of one model prune and heal, as kernels take it.

    Attributes:
        in_prompt: whether end-of-sequence tokens are ordinary tokens (prompt) or ends.
        literal: in a prompt, whether special tokens are left out, so that text which looks
            like one is spelled from ordinary tokens.
        cut: sorted int64[c], trie positions of the tokens that are no text.
        k: most candidates kept, -1 for all.
        log_threshold: log share below which candidates and extensions are dropped or thinned.
        random: whether pruning is unbiased.
        heals: whether dead lanes are healed.
        max_backoff, max_splits: limits of healing, as in `BeamParams`.
        rescues: bytes that healing could read.
        share: of each row of a lane that dropped mass, set aside for them; 0: healing is off.
    """

    in_prompt: bool
    literal: bool
    cut: IntArray
    k: int
    log_threshold: float
    random: bool
    heals: bool
    max_backoff: int | None
    max_splits: int | None
    rescues: Rescues

    @property
    def share(self) -> float:
        """See the class."""
        return HEAL_RESERVE if self.heals else 0.0

    def lossy(
        self, log_dropped: npt.NDArray[np.float64], left_out: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.bool_]:
        """Return lanes that set a share aside, bool[N]: where nothing was ever dropped, what
        reads as impossible is impossible.

        Args:
            log_dropped: float64[N], log mass dropped up to the last byte, nats.
            left_out: float64[N], that of the extensions left out since.
        """
        lost: npt.NDArray[np.bool_] = np.maximum(log_dropped, left_out) > -np.inf
        return lost if self.heals else np.zeros(len(lost), dtype=bool)
