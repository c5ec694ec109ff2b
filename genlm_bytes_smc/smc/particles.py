"""The particles as a struct of arrays, their weights, and what a run keeps of each step.

A particle is a row in each array of `Particles`. It is `active` while it reads bytes; then it
has either `ended` (it drew the end of the text, or was ended by the length limit) or died
(its weight is zero). Nothing here depends on language models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
Int16Array = npt.NDArray[np.int16]
Uint8Array = npt.NDArray[np.uint8]
SaltArray = npt.NDArray[np.uint64]

NO_SYMBOL = -1  # where a particle has read nothing, or nothing is prescribed


class Weights:
    """N log weights and what is derived from them, each computed at most once.

    Args:
        log: float64[N] log weights, nats; -inf for a dead particle.
    """

    def __init__(self, log: FloatArray) -> None:
        self.log = log

    def __len__(self) -> int:
        """Return the number of particles."""
        return len(self.log)

    @cached_property
    def _top(self) -> float:
        return float(self.log.max(initial=-np.inf))

    @cached_property
    def _scaled(self) -> FloatArray:
        return np.exp(self.log - self._top) if self._top > -np.inf else np.zeros(len(self.log))

    @cached_property
    def normalised(self) -> FloatArray:
        """Weights that sum to one, float64[N]; all zero if every particle is dead."""
        total = self._scaled.sum()
        return self._scaled / total if total > 0 else self._scaled

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
    """N particles that have read at most t bytes, t symbols ago.

    Attributes:
        text: uint8[N, t], the bytes read, zeros after the end of a text.
        length: int64[N], how many of them count.
        ended: bool[N], whether the text is complete.
        log_weights: float64[N], nats; -inf for a dead particle. Includes `twist`.
        twist: float64[N], what critic and look-ahead added to the weight until the next step,
            nats.
        eve: int64[N], which of the N first particles it descends from.
        salt: uint64[N, t + 1] if each particle has random beams of its own
            (`share_beams=False`): the keys, besides the bytes, of the beam's draws from the
            empty text on and from each byte on. None: equal texts have equal beams.
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
        """Return N particles that have read nothing, of equal weight."""
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
        return ~self.ended & (self.log_weights > -np.inf)

    @property
    def dead(self) -> BoolArray:
        """Particles of weight zero, bool[N]."""
        out: BoolArray = self.log_weights == -np.inf
        return out

    def untwisted(self, which: BoolArray) -> Particles:
        """Take back what the twists added to the weights of some particles, bool[N]."""
        taken = np.where(which, self.twist, 0.0)
        return self._replace(log_weights=self.log_weights - taken, twist=self.twist - taken)

    def read(self, symbols: IntArray, log_weights: FloatArray) -> Particles:
        """Append a symbol to each active particle and multiply its weight.

        Args:
            symbols: int64[N], a byte or `EOS_COLUMN`, `NO_SYMBOL` for one that waits; not looked
                at where not active.
            log_weights: float64[N], factors of the weights, nats; likewise.
        """
        reads = self.active & (log_weights > -np.inf) & (symbols != NO_SYMBOL)
        ends = reads & (symbols == EOS_COLUMN)
        grows = np.flatnonzero(reads & ~ends)
        text = np.concatenate([self.text, np.zeros((len(self.text), 1), dtype=np.uint8)], axis=1)
        text[grows, self.length[grows]] = symbols[grows]
        return self._replace(
            text=text,
            length=self.length + (reads & ~ends),
            ended=self.ended | ends,
            log_weights=np.where(self.active, self.log_weights + log_weights, self.log_weights),
        )

    def gather(self, ancestors: IntArray, log_weight: float | FloatArray) -> Particles:
        """Return the particles `ancestors` int64[N], with these weights (or all with one)."""
        return Particles(
            text=self.text[ancestors],
            length=self.length[ancestors],
            ended=self.ended[ancestors],
            log_weights=np.array(np.broadcast_to(log_weight, len(ancestors))),
            twist=self.twist[ancestors],
            eve=self.eve[ancestors],
            salt=None if self.salt is None else self.salt[ancestors],
        )

    def salted(self, salt: SaltArray) -> Particles:
        """Append `salt` uint64[N], which keys the next draws of each particle's beams."""
        column = salt.reshape(-1, 1)
        return self._replace(salt=column if self.salt is None else np.hstack([self.salt, column]))

    def end_in(self, strings: Sequence[bytes]) -> BoolArray:
        """Return whether each text ends in one of these strings, bool[N]."""
        out = np.zeros(len(self.length), dtype=bool)
        for string in strings:
            first = self.length - len(string)
            found = first >= 0
            for k, byte in enumerate(string):
                at = np.flatnonzero(found)
                found[at] = self.text[at, first[at] + k] == byte
            out |= found
        return out

    def symbols_read(self, stops: Callable[[bytes], Any] | None) -> IntArray:
        """Return how many symbols each has read, int64[N]: its end is one if it drew it.

        Args:
            stops: what ends texts of at least one byte without a symbol, if anything does.
        """
        drew = self.ended.copy()
        if stops is not None:
            ends = np.flatnonzero(drew & (self.length > 0))
            texts, _, inverse = self.distinct(ends)
            drew[ends] = ~np.array([bool(stops(text)) for text in texts], dtype=bool)[inverse]
        return self.length + drew

    def distinct(
        self, which: IntArray, codes: IntArray | None = None
    ) -> tuple[list[bytes], IntArray, IntArray]:
        """Find the distinct texts of some particles, ended ones apart from others.

        Args:
            which: int64[A].
            codes: int64[A], equal for equal texts, if the caller has such numbers.

        Returns:
            M texts, a particle of each (int64[M]), and the text of each particle (int64[A]).
        """
        if codes is None:
            keys = np.column_stack([self.text[which], self.length[which], self.ended[which]])
            _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        else:
            _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        first = which[first]
        return self.texts(first), first, inverse.reshape(-1)

    def texts(self, which: IntArray | slice = slice(None)) -> list[bytes]:
        """Return the bytes that particles have read, all of them or some."""
        rows = zip(self.text[which], self.length[which].tolist(), strict=True)
        return [row[:k].tobytes() for row, k in rows]


class StepInfo(NamedTuple):
    """The record of one step; nothing later depends on it.

    Attributes:
        step: how many bytes active particles had read before it (0 for the first step; with
            `resample_at`, how many steps were made).
        ess: effective sample size of all N particles after reading and before resampling.
        log_ml: log of their mean weight, nats (it includes the twists).
        active, ended, dead: how many particles are in each condition after reading; they
            sum to N (to N times the candidates inside a roll-out).
        lanes: for how many distinct texts rows were computed.
        forced: whether the length limit ended every particle in this step.
        deaths: for each factor that gave weight zero, how many particles it killed.
        ancestors: int64[N] if the particles were resampled after reading, else None.
        moved: how many particles `rejuvenate` gave another text, None if it was not due.
        uncovered: the largest share of a target row on symbols that the proposal excludes.
        rows, forwards: rows and forwards the language models computed during the step.
            Concurrent runs over one model share forwards, and each counts them.
        seconds: wall time.
        symbols: int16[N] with `record`, what each particle read (-1: nothing).
        log_weights: float64[N] with `record`, weights after reading, nats.
    """

    step: int
    ess: float
    log_ml: float
    active: int
    ended: int
    dead: int
    lanes: int
    forced: bool = False
    deaths: tuple[tuple[str, int], ...] = ()
    ancestors: IntArray | None = None
    moved: int | None = None
    uncovered: float = 0.0
    rows: int = 0
    forwards: int = 0
    seconds: float = 0.0
    symbols: Int16Array | None = None
    log_weights: FloatArray | None = None


class SMCState(NamedTuple):
    """The whole state of a run after some byte; a value, from which it can be resumed.

    The states of language models and constraints are not part of it: they follow from the
    texts, and `resume` computes them again.

    Attributes:
        particles: the N particles; inside a roll-out all candidates of each, one after the
            other.
        step: how many bytes the active ones have read (with `resample_at`: steps made).
        seed: of the run's draws; those of a step are a function of (seed, step).
        beam_seed: of the beams' draws with `prune="unbiased"`; None: the beams' own.
        start: log weight of the empty text, nats.
        history: one entry a step so far.
        max_bytes: the length limit it was run with; None if that is not known.
    """

    particles: Particles
    step: int
    seed: int
    beam_seed: int | None
    start: float
    history: tuple[StepInfo, ...] = ()
    max_bytes: int | None = None


def generator(seed: int, step: int, *stream: int) -> np.random.Generator:
    """Return random numbers that depend on a run's seed, the step and the stream alone."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step, *stream)))


def derived_seed(seed: int, *stream: int, kind: Any = np.uint64) -> int:
    """Return a seed that depends on another and the stream alone, a number of this dtype."""
    return int(np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, kind)[0])
