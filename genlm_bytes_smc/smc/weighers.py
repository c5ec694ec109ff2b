"""Weighers: what changes the weights of particles once they have read a byte.

A run has a tuple of them, applied in this order:

- `Ending` ends texts of which `terminate_when` holds, without a weight;
- `critics.Critic` multiplies by a potential's weight of the text: an ended text keeps its
  `complete` weight, an unfinished one has its `prefix` weight until it reads on (a twist);
- `Twist` multiplies unfinished texts by psi(x)^s of a look-ahead, until the next byte is read;
- `Tempering` raises what was added so far, and the target's soft factors, to the power beta_t;
- `Recorder` changes no weight, and notes the rows that particles were drawn from.

A twist steers resampling and leaves the target alone: `Particles.twist` says what was added,
it is taken back before the next byte is weighed, and an ended text has none. So with t bytes
read resampling sees the target

    gamma_t(x) = LM(x) (soft(x) critic(x) psi(x)^s)^beta_t,

a bridge from the language model to the whole target as beta_t rises to 1 (annealing as in Del
Moral, Doucet & Jasra 2006, along the text), and the weights telescope to those of the target.
What is impossible (-inf) is so for every beta > 0: only weights between can be graded.

A look-ahead gives every unfinished text x a positive number psi(x), a guess of the weight of all
that may follow it, and psi = 1 to ended texts (twisted SMC: Whiteley & Lee 2014, Annals of
Statistics 42:115; Guarniero, Johansen & Lee 2017; for language models Zhao et al. 2024). As a
proposal it draws the next symbol b in proportion to target(b) psi(x b)^s, mixed with a small
share of the target's own row so that nothing the target admits is left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS, contexts_of
from genlm_bytes_smc.smc.factors import Tree, normalised
from genlm_bytes_smc.smc.lanes import Lanes, Rows
from genlm_bytes_smc.smc.particles import Particles
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

Combine = Callable[[Sequence[torch.Tensor]], torch.Tensor]
Predicate = Callable[[bytes], Any]
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Reads:
    """The symbols that particles have just read.

    Attributes:
        count: how many bytes active particles have read now.
        lane_of: int64[N], the lane each particle was on, -1 for one that read nothing.
        symbols: int64[N], what it read.
        rows: the rows they were drawn from.
        lanes: the factors' lanes before reading.
    """

    count: int
    lane_of: IntArray
    symbols: IntArray
    rows: Rows
    lanes: Sequence[Lanes]

    def going(self, particles: Particles) -> IntArray:
        """Return the particles that have read and will read on, int64[A]."""
        return np.flatnonzero(particles.active & (self.lane_of >= 0))

    def distinct(
        self, particles: Particles, which: IntArray
    ) -> tuple[list[bytes], IntArray, IntArray]:
        """Find the distinct texts of some particles that have read; see `Particles.distinct`."""
        codes = self.lane_of[which] * N_SYMBOLS + self.symbols[which]
        return particles.distinct(which, codes)


class Weigher(ABC):
    """A step of weighing, applied after every byte.

    Attributes:
        name: how errors name it; empty if it gives no particle weight zero.
        potentials: those that it asks about texts.
    """

    name = ""
    potentials: tuple[Any, ...] = ()

    @abstractmethod
    async def weigh(self, particles: Particles, reads: Reads) -> Particles:
        """Return particles that have just read a symbol with new weights."""


class Ending(Weigher):
    """Ends the texts of which a function says so, without a weight.

    Raises:
        TypeError: no function.
    """

    def __init__(self, when: Any) -> None:
        if not callable(when):
            raise TypeError(f"terminate_when must be a function of bytes, got {when!r}")
        self.when = when

    async def weigh(self, particles: Particles, reads: Reads) -> Particles:
        """See `Weigher`."""
        going = reads.going(particles)
        texts, _, inverse = reads.distinct(particles, going)
        stops = np.array([bool(self.when(text)) for text in texts], dtype=bool)
        ended = particles.ended.copy()
        ended[going] |= stops[inverse]
        return particles._replace(ended=ended)


class AheadLanes(Lanes):
    """A look-ahead at D texts: its rows are log psi(x b) - log psi(x).

    Attributes:
        value: float64[D], log psi of each text, nats; -inf for one that cannot be completed.
    """

    waits = False
    value: torch.Tensor


class Ahead(ABC):
    """A look-ahead that can be given to `smc` as `proposal` or `twist`.

    Attributes:
        strength: s, the power of psi.
        defensive: share of the target's row in the proposal.
    """

    strength: float
    defensive: float

    @abstractmethod
    async def start(self, target: Any, leaves: Sequence[Any], max_bytes: int) -> AheadLanes:
        """Return the lane of the empty text (D = 1), for a target and its leaves."""


def proposal_rows(target: Tree, at: int, ahead: Ahead) -> Combine:
    """Return how blocks make the rows to draw from: target times psi^s, mixed with the target.

    Args:
        target: how blocks make the target's rows.
        at: which block is that of `ahead`.
    """
    strength, share = ahead.strength, ahead.defensive

    def rows(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
        own = target(blocks)
        seen = own + strength * blocks[at].to(own.device)
        # A text with no future in sight: the share of psi is nothing, the target's all.
        seen, own = normalised(seen), normalised(own)
        lost = seen.isneginf().all(dim=1, keepdim=True)
        mixed = torch.logaddexp(seen + math.log1p(-share), own + math.log(share))
        return torch.where(lost, own, mixed)

    return rows


class Twist(Weigher):
    """A look-ahead's psi to a power, as a twist of unfinished texts.

    Args:
        ahead: which of the lanes is the look-ahead's.
        strength: power of psi.
        name: see `Weigher`.
    """

    def __init__(self, ahead: int, strength: float, name: str) -> None:
        self.ahead = ahead
        self.strength = strength
        self.name = f"the twist {name}"

    async def weigh(self, particles: Particles, reads: Reads) -> Particles:
        """See `Weigher`."""
        going = reads.going(particles)
        if not len(going):
            return particles
        lanes, ahead = reads.lane_of[going], reads.lanes[self.ahead]
        assert isinstance(ahead, AheadLanes)
        now = ahead.value.cpu().numpy()[lanes]
        gain = reads.rows.blocks[self.ahead].cpu().numpy()[lanes, reads.symbols[going]]
        log_psi = np.where(now == -np.inf, 0.0, now) + gain
        return twisted(particles, going, particles.twist[going] + self.strength * log_psi)


class Tempering(Weigher):
    """The power beta_t of twists and soft factors.

    Args:
        schedule: beta after t bytes.
        soft: the target's factors whose prefix weights are graded.
    """

    def __init__(self, schedule: Schedule, soft: Sequence[Any]) -> None:
        self.schedule = schedule
        self.soft = tuple(soft)

    async def weigh(self, particles: Particles, reads: Reads) -> Particles:
        """See `Weigher`.

        Raises:
            ValueError: the schedule gave a number outside (0, 1].
        """
        going = reads.going(particles)
        if not len(going):
            return particles
        beta, count = float(self.schedule(reads.count)), reads.count
        if not 0 < beta <= 1:
            raise ValueError(f"tempering must give numbers in (0, 1], got {beta} for {count} bytes")
        twist = beta * particles.twist[going]
        if self.soft and beta != 1:
            texts, _, inverse = reads.distinct(particles, going)
            score = np.zeros(len(texts))
            for factor in self.soft:
                score += np.asarray(await factor.batch_prefix(contexts_of(texts)), dtype=np.float64)
            twist += (beta - 1) * score[inverse]
        return twisted(particles, going, twist)


def twisted(particles: Particles, going: IntArray, twist: FloatArray) -> Particles:
    """Replace the twist of some particles int64[A] by float64[A], nats; -inf kills them."""
    log_weights, twists = particles.log_weights.copy(), particles.twist.copy()
    log_weights[going] += twist - twists[going]
    twists[going] = np.where(twist == -np.inf, 0.0, twist)
    return particles._replace(log_weights=log_weights, twist=twists)


def schedule_of(tempering: Any) -> Schedule | None:
    """Return the schedule that `smc(tempering=...)` names.

    Args:
        tempering: None; a number of bytes T, for beta_t = min(1, t / T); a sequence of
            exponents, one a byte read, beginning with that after the first; or a function of
            the number of bytes read (1 or more).

    Raises:
        TypeError, ValueError: none of these, or exponents outside (0, 1].
    """
    if tempering is None:
        return None
    if callable(tempering):
        given: Schedule = tempering
        return given
    if isinstance(tempering, Sequence) and not isinstance(tempering, str | bytes):
        betas = [float(b) for b in tempering]
        if not betas or not all(0 < b <= 1 for b in betas):
            raise ValueError(f"tempering must hold numbers in (0, 1], got {list(tempering)}")
        return lambda t: betas[t - 1] if t <= len(betas) else 1.0
    if not isinstance(tempering, int | float) or isinstance(tempering, bool):
        raise TypeError(
            "tempering must be a number of bytes, a sequence of exponents or a function of the "
            f"number of bytes read, got {tempering!r}"
        )
    if not (math.isfinite(tempering) and tempering > 0):
        raise ValueError(f"tempering must be a positive number of bytes, got {tempering}")
    return lambda t: min(1.0, t / tempering)


class SeenRows(NamedTuple):
    """What is known of V texts; each comes after all that are shorter, its beginnings included.

    Attributes:
        texts: V distinct texts, by length.
        parent: int64[V], the text that is one byte shorter; -1 of the empty text.
        target: float64[V, 257], the target's log weight of each symbol after it, nats.
        visits: float64[V, 2], how many particles with even and with odd numbers came to it.
        final: texts that ended without a symbol for it (`terminate_when`).
    """

    texts: list[bytes]
    parent: IntArray
    target: FloatArray
    visits: FloatArray
    final: frozenset[bytes]

    def levels(self) -> list[IntArray]:
        """Return the places of the texts of 0, 1, 2, ... bytes."""
        length = np.array([len(text) for text in self.texts], dtype=np.int64)
        return [np.flatnonzero(length == k) for k in range(int(length.max(initial=-1)) + 1)]

    def whole(self) -> dict[bytes, float]:
        """Return the log weight of every whole text whose rows are all known, nats.

        It is the sum of the target's entries along the text and at its end.
        """
        logw = np.zeros(len(self.texts))
        byte = np.array([text[-1] if text else 0 for text in self.texts], dtype=np.int64)
        for nodes in self.levels()[1:]:
            above = self.parent[nodes]
            logw[nodes] = logw[above] + self.target[above, byte[nodes]]
        number = {text: i for i, text in enumerate(self.texts)}
        found = {
            text: float(logw[number[text[:-1]]] + self.target[number[text[:-1]], text[-1]])
            for text in sorted(self.final)
        }
        ends = logw + self.target[:, EOS_COLUMN]
        for i in np.flatnonzero(np.isfinite(ends)):
            found.setdefault(self.texts[i], float(ends[i]))
        return found


class Seen:
    """A growing store of rows, by text."""

    def __init__(self) -> None:
        self._rows: dict[bytes, tuple[FloatArray, FloatArray]] = {}  # and visits, see `SeenRows`
        self._final: set[bytes] = set()

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._rows)

    def add(self, texts: Sequence[bytes], target: FloatArray, visits: FloatArray) -> None:
        """Store the rows of texts, and count visits (see `SeenRows`) of those that are known."""
        for text, row, count in zip(texts, target, visits, strict=True):
            known, before = self._rows.get(text, (row, 0.0))
            self._rows[text] = known, before + count

    def end(self, texts: Iterable[bytes]) -> None:
        """Note texts that ended without a symbol for it."""
        self._final.update(texts)

    def rows(self) -> SeenRows:
        """Return what is stored."""
        texts = sorted(self._rows, key=lambda text: (len(text), text))
        number = {text: i for i, text in enumerate(texts)}
        parent = [number.get(text[:-1], -1) if text else -1 for text in texts]
        return SeenRows(
            texts,
            np.array(parent, dtype=np.int64),
            np.array([self._rows[text][0] for text in texts]).reshape(-1, N_SYMBOLS),
            np.array([self._rows[text][1] for text in texts]).reshape(-1, 2),
            frozenset(self._final),
        )


class Recorder(Weigher):
    """Stores the rows that particles were drawn from, so that later runs can look ahead by them.

    It weighs nothing, and needs to know the `max_bytes` of its run.
    """

    def __init__(self, seen: Seen, max_bytes: int) -> None:
        self._seen, self._max_bytes = seen, max_bytes

    async def weigh(self, particles: Particles, reads: Reads) -> Particles:
        """See `Weigher`; the particles come back as they are."""
        at = np.flatnonzero(reads.lane_of >= 0)
        lanes, first = np.unique(reads.lane_of[at], return_index=True)
        if not len(lanes):
            return particles
        before = reads.count - 1
        texts = [row[:before].tobytes() for row in particles.text[at[first]]]
        target = reads.rows.target.double().cpu().numpy()[lanes]
        if before >= self._max_bytes:
            target[:, :EOS_COLUMN] = -np.inf
        visits = np.zeros((reads.rows.target.shape[0], 2))
        np.add.at(visits, (reads.lane_of[at], at % 2), 1.0)
        self._seen.add(texts, target, visits[lanes])
        stopped = np.flatnonzero(particles.ended[at] & (reads.symbols[at] != EOS_COLUMN))
        self._seen.end(particles.distinct(at[stopped])[0])
        return particles
