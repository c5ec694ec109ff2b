"""The particles as a struct of arrays, and their weights.

A particle is a row in each array of `Particles`. It is `active` while it reads bytes; then it
has either `ended` (it drew the end of the text, or was ended by the length limit) or died
(its weight is zero). Nothing here knows of language models.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
Uint8Array = npt.NDArray[np.uint8]
SaltArray = npt.NDArray[np.uint64]


class Weights:
    """N log weights and what is derived from them, each computed at most once.

    Args:
        log: float64[N] log weights, nats; -inf for a dead particle.
    """

    def __init__(self, log: FloatArray) -> None:
        self.log = log

    def __len__(self) -> int:
        """Number of particles."""
        return len(self.log)

    @cached_property
    def _top(self) -> float:
        return float(self.log.max())

    @cached_property
    def _scaled(self) -> FloatArray:
        return np.exp(self.log - self._top) if self._top > -np.inf else np.zeros(len(self.log))

    @cached_property
    def normalised(self) -> FloatArray:
        """Weights that sum to one, float64[N]; all zero if every particle is dead."""
        total = self._scaled.sum()
        out: FloatArray = self._scaled / total if total > 0 else self._scaled
        return out

    @cached_property
    def ess(self) -> float:
        """Effective sample size 1 / sum(W^2), in [1, N]; 0 if every particle is dead."""
        squares = float(np.square(self.normalised).sum())
        return 1.0 / squares if squares > 0 else 0.0

    @cached_property
    def log_mean(self) -> float:
        """Log of the mean weight, nats: the estimate of the log marginal likelihood."""
        if self._top == -np.inf:
            return -np.inf
        return self._top + float(np.log(self._scaled.mean()))


class Particles(NamedTuple):
    """N particles that have read at most t bytes.

    Attributes:
        text: uint8[N, t], the bytes read, zeros after the end of a text.
        length: int64[N], how many of them count.
        ended: bool[N], whether the text is complete.
        log_weights: float64[N], nats; -inf for a dead particle. Includes `twist`.
        twist: float64[N], what the critic lent to the weight until the next step, nats.
        eve: int64[N], which of the N first particles it descends from.
        salt: uint64[N, t + 1] if each particle has random beams of its own
            (`share_beams=False`): what the draws at the empty text and after each byte are
            keyed by besides the bytes. None: equal texts have equal beams.
    """

    text: Uint8Array
    length: IntArray
    ended: BoolArray
    log_weights: FloatArray
    twist: FloatArray
    eve: IntArray
    salt: SaltArray | None = None

    @classmethod
    def first(cls, n: int, log_weight: float) -> Particles:
        """N particles that have read nothing, of equal weight."""
        return cls(
            text=np.zeros((n, 0), dtype=np.uint8),
            length=np.zeros(n, dtype=np.int64),
            ended=np.zeros(n, dtype=bool),
            log_weights=np.full(n, log_weight),
            twist=np.zeros(n),
            eve=np.arange(n),
        )

    @property
    def active(self) -> BoolArray:
        """Particles that read on, bool[N]."""
        out: BoolArray = ~self.ended & (self.log_weights > -np.inf)
        return out

    @property
    def dead(self) -> BoolArray:
        """Particles of weight zero, bool[N]."""
        out: BoolArray = self.log_weights == -np.inf
        return out

    def untwisted(self) -> Particles:
        """The particles without what the critic lent them."""
        return self._replace(
            log_weights=self.log_weights - self.twist, twist=np.zeros(len(self.twist))
        )

    def read(self, symbols: IntArray, log_weights: FloatArray) -> Particles:
        """Append a symbol to each active particle and multiply its weight.

        Args:
            symbols: int64[N], a byte or `EOS_COLUMN`; not looked at where not active.
            log_weights: float64[N], factors of the weights, nats; likewise.
        """
        reads = self.active & (log_weights > -np.inf)
        ends = reads & (symbols == EOS_COLUMN)
        column = np.where(reads & ~ends, symbols, 0).astype(np.uint8)
        return self._replace(
            text=np.concatenate([self.text, column[:, None]], axis=1),
            length=self.length + (reads & ~ends),
            ended=self.ended | ends,
            log_weights=np.where(self.active, self.log_weights + log_weights, self.log_weights),
        )

    def gather(self, ancestors: IntArray, log_weight: float | FloatArray) -> Particles:
        """The particles `ancestors` int64[N], with these weights (or all with one)."""
        return Particles(
            text=self.text[ancestors],
            length=self.length[ancestors],
            ended=self.ended[ancestors],
            log_weights=np.array(np.broadcast_to(log_weight, len(ancestors))),
            twist=self.twist[ancestors],
            eve=self.eve[ancestors],
            salt=None if self.salt is None else self.salt[ancestors],
        )

    def salted(self, rng: np.random.Generator) -> Particles:
        """With a fresh salt a particle for the next draws of its beams.

        Copies of one particle get different ones, so what they share is their past.
        """
        n = len(self.length)
        fresh = rng.integers(0, 2**64, size=(n, 1), dtype=np.uint64)
        salt = fresh if self.salt is None else np.concatenate([self.salt, fresh], axis=1)
        return self._replace(salt=salt)

    def texts(self) -> list[bytes]:
        """What each particle has read."""
        return [row[:k].tobytes() for row, k in zip(self.text, self.length.tolist(), strict=True)]
