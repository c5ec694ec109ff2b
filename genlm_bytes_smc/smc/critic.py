"""A critic: a potential that weighs texts as they grow, beside the target.

At each step a particle's weight is multiplied by the critic's `prefix` weight of its text,
which is taken back before the next one (a twist: it steers resampling and leaves the target
alone); when a text ends, its `complete` weight stays. So the particles target the product of
target and critic, as in genlm-control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from genlm.control.potential.base import Potential

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_SYMBOLS, TABLES
from genlm_bytes_smc.constraints.base import ByteConstraint
from genlm_bytes_smc.potential import ByteLLM
from genlm_bytes_smc.smc.errors import BadWeightError
from genlm_bytes_smc.smc.factors import check_alphabet, name_of
from genlm_bytes_smc.smc.particles import BoolArray, Particles
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

Predicate = Callable[[bytes], Any]


class PredicateCritic(Potential):  # type: ignore[misc]
    """A Python function of complete texts as a critic; prefixes weigh 1.

    Args:
        predicate: takes a whole text; returns whether it is admitted (anything that is true
            or false), or a `float`: its log weight in nats.
    """

    def __init__(self, predicate: Predicate) -> None:
        super().__init__(BYTES, tables=TABLES)
        self.predicate = predicate

    async def prefix(self, context: Sequence[bytes]) -> float:
        """Always 0."""
        return 0.0

    async def complete(self, context: Sequence[bytes]) -> float:
        """0 or -inf for what is true or false; a log weight as it is.

        Raises:
            TypeError: an integer, which could be meant either way.
        """
        said = self.predicate(b"".join(context))
        if isinstance(said, float | np.floating):
            return float(said)
        if isinstance(said, int | np.integer) and not isinstance(said, bool):
            raise TypeError(
                f"{self!r} returned the integer {said}: return a bool, or a float (log weight)"
            )
        return 0.0 if said else -np.inf

    def is_terminal_only(self) -> bool:
        """Yes."""
        return True

    def __repr__(self) -> str:
        return getattr(self.predicate, "__name__", None) or repr(self.predicate)


class Critic:
    """Weighs distinct texts once each, and particles accordingly.

    Args:
        critic: a potential over bytes or a predicate of complete texts.
        twist: whether prefixes count before their text has ended.

    Raises:
        TypeError, ValueError: neither of them, or a potential over other tokens.
    """

    def __init__(self, critic: Any, twist: bool) -> None:
        if not isinstance(critic, Potential):
            if not callable(critic):
                raise TypeError(
                    "critic must be a Potential over bytes or a function of complete texts, "
                    f"got {type(critic).__name__}"
                )
            critic = PredicateCritic(critic)
        check_alphabet(critic)
        self.potential = critic
        # ours take whole texts; others want lists of tokens
        self._takes_bytes = isinstance(critic, ByteConstraint | ByteLLM)
        self.twist = twist and not critic.is_terminal_only()
        self.name = f"critic {name_of(critic)}"

    async def weigh(self, particles: Particles, read: DistinctReads) -> Particles:
        """Particles that have just read a symbol, with the critic's weight.

        Raises:
            BadWeightError: the critic gave NaN or +inf.
        """
        which = np.flatnonzero(read.ended | self.twist)
        if len(which) == 0:
            return particles
        score = np.zeros(len(read.texts))
        score[which] = await self._scores([read.texts[i] for i in which], read.ended[which])
        mine = score[read.inverse]
        log_weights, twist = particles.log_weights.copy(), particles.twist.copy()
        log_weights[read.particle] += mine
        twist[read.particle] = np.where(read.ended[read.inverse] | (mine == -np.inf), 0.0, mine)
        return particles._replace(log_weights=log_weights, twist=twist)

    async def _scores(self, texts: list[bytes], ended: BoolArray) -> FloatArray:
        """Log weights of whole texts and of prefixes, float64[m], nats."""
        out = np.empty(len(texts))
        for complete in (True, False):
            which = np.flatnonzero(ended == complete)
            if len(which):
                contexts: list[Any] = [texts[i] for i in which]
                if not self._takes_bytes:
                    contexts = [[BYTES[b] for b in text] for text in contexts]
                of = self.potential.batch_complete if complete else self.potential.batch_prefix
                out[which] = _as_numpy(await of(contexts), len(which), self.name)
        bad = np.flatnonzero(np.isnan(out) | (out == np.inf))
        if len(bad):
            i = int(bad[0])
            kind = "whole text" if ended[i] else "prefix"
            raise BadWeightError(f"{self.name} gave {out[i]} for the {kind} {texts[i]!r}")
        return out


class DistinctReads:
    """The distinct texts that particles have just come to.

    Args:
        particles: after reading.
        lanes: int64[N], the lanes they were on, -1 for those that read nothing.
        symbols: int64[N], what they read.

    Attributes:
        particle: int64[A], who read and is not dead.
        inverse: int64[A], which text each of them came to.
        texts: the M distinct texts.
        ended: bool[M], whether they are complete.
    """

    def __init__(self, particles: Particles, lanes: IntArray, symbols: IntArray) -> None:
        self.particle = np.flatnonzero((lanes >= 0) & ~particles.dead)
        codes = lanes[self.particle] * N_SYMBOLS + symbols[self.particle]
        codes, first, self.inverse = np.unique(codes, return_index=True, return_inverse=True)
        someone = self.particle[first]
        rows = zip(particles.text[someone], particles.length[someone].tolist(), strict=True)
        self.texts = [row[:k].tobytes() for row, k in rows]
        self.ended: BoolArray = codes % N_SYMBOLS == EOS_COLUMN

    def stop(self, particles: Particles, when: Callable[[bytes], bool]) -> Particles:
        """End the texts for which `when` holds, without a weight."""
        stops = np.array([bool(when(t)) for t in self.texts], dtype=bool) & ~self.ended
        if not stops.any():
            return particles
        self.ended = self.ended | stops
        ended = particles.ended.copy()
        ended[self.particle] |= stops[self.inverse]
        return particles._replace(ended=ended)


def _as_numpy(weights: Any, n: int, name: str) -> FloatArray:
    array = weights.detach().cpu().numpy() if torch.is_tensor(weights) else np.asarray(weights)
    if array.shape != (n,):
        raise ValueError(f"{name} gave weights of shape {array.shape} for {n} texts")
    return array.astype(np.float64)
