"""Critics: potentials and functions that weigh whole texts, once a distinct text; draft models.

With `smc(draft=...)` a small model proposes blocks of bytes, and the target's models are a critic
that reads them whole. For a target LM(x) c(x) with cheap other factors c, and a draft D, particles
draw bytes from the rows of D c and are weighed by c over what they were drawn by. Where a block
ends, the weight is multiplied by LM.prefix(x) as a twist, which the next block takes back, and a
text that has ended keeps LM.complete(x). The weights telescope to LM(x) c(x) / q(x), whatever D
is, so D is nothing but a proposal; and as nothing is resampled inside a block, nobody needs the
rows of LM there.

Speculative decoding (Leviathan, Kalman & Matias 2023, arXiv:2211.17192) accepts or rejects what a
draft proposes; here it is weighed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from genlm.control.potential.base import Potential

from genlm_bytes_smc.alphabet import BytePotential, contexts_of, times
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.smc.factors import (
    check_alphabet,
    factors_of,
    has_language_model,
    name_of,
    random_beams,
)
from genlm_bytes_smc.smc.lanes import BadWeightError
from genlm_bytes_smc.smc.particles import BoolArray, Particles
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.weighers import Predicate, Reads, Weigher, twisted


class Critic(Weigher):
    """A potential, or a function of complete texts, that multiplies the target.

    It is scored once a distinct text, where a roll-out ends: between two resamplings nobody looks
    at weights. Texts that have ended by then are scored with the others.

    Args:
        critic: a potential over bytes; or a function that returns whether a complete text is
            admitted (anything that is true or false), or a `float`: its log weight in nats.
        twist: whether prefixes count before their text has ended.
        block: bytes of a roll-out.
        size: particles of a run.
        stops: what ends a text without a symbol (`terminate_when`), if anything does.

    Raises:
        TypeError, ValueError: neither of them, or a potential over other tokens.
    """

    def __init__(
        self, critic: Any, twist: bool, block: int, size: int, stops: Predicate | None
    ) -> None:
        self.critic, self.block, self.size, self.stops = critic, block, size, stops
        self.is_potential = isinstance(critic, Potential)
        if self.is_potential:
            check_alphabet(critic)
        elif not callable(critic):
            raise TypeError(
                "critic must be a Potential over bytes or a function of complete texts, "
                f"got {type(critic).__name__}"
            )
        self.potentials = (critic,) if self.is_potential else ()
        self.twist = twist and self.is_potential and not critic.is_terminal_only()
        shown = None if self.is_potential else getattr(critic, "__name__", None)
        self.name = f"critic {shown or name_of(critic)}"

    async def weigh(self, particles: Particles, reads: Reads) -> Particles:
        """See `Weigher`.

        Raises:
            BadWeightError: the critic gave NaN or +inf.
        """
        which = self._due(particles, reads)
        if len(which) == 0:
            return particles
        distinct = reads.distinct if self.block == 1 else Particles.distinct
        texts, first, inverse = distinct(particles, which)
        score = (await self._scores(texts, self._whole(particles)[first]))[inverse]
        particles = twisted(particles, which, particles.twist[which] + score)
        return particles._replace(twist=np.where(particles.ended, 0.0, particles.twist))

    def _due(self, particles: Particles, reads: Reads) -> IntArray:
        """Return the particles to score now: those that read on or ended in this roll-out.

        A roll-out ends early in a run none of whose particles reads on.
        """
        fresh = reads.lane_of >= 0
        if self.block > 1:
            begun = (reads.count - 1) // self.block * self.block
            ends = _each_run(fresh, self.size)
            if reads.count % self.block:
                ends &= ~_each_run(particles.active, self.size)
            ended = particles.ended & (particles.symbols_read(self.stops) > begun)
            fresh = ends & (fresh | ended)
        scored = particles.ended | (particles.active & self.twist)
        return np.flatnonzero(fresh & scored & ~particles.dead)

    def _whole(self, particles: Particles) -> BoolArray:
        """Return which texts are scored as whole ones, bool[N]."""
        return particles.ended

    async def _scores(self, texts: list[bytes], ended: BoolArray) -> FloatArray:
        """Return log weights of whole texts and of prefixes, float64[M], nats."""
        out = np.empty(len(texts))
        for complete in (True, False):
            which = np.flatnonzero(ended == complete)
            if len(which):
                out[which] = await self._weights([texts[i] for i in which], complete)
        bad = np.flatnonzero(np.isnan(out) | (out == np.inf))
        if len(bad):
            i = int(bad[0])
            kind = "whole text" if ended[i] else "prefix"
            raise BadWeightError(f"{self.name} gave {out[i]} for the {kind} {texts[i]!r}")
        return out

    async def _weights(self, texts: list[bytes], complete: bool) -> FloatArray:
        """Return log weights of texts, all whole or all prefixes, float64[len(texts)], nats."""
        if not self.is_potential:
            return np.array([self._admitted(text) for text in texts])
        # ours take whole texts; others want lists of tokens
        ours = isinstance(self.critic, BytePotential)
        score = self.critic.batch_complete if complete else self.critic.batch_prefix
        weights = await score(texts if ours else contexts_of(texts))
        array = weights.detach().cpu().numpy() if torch.is_tensor(weights) else np.asarray(weights)
        if array.shape != (len(texts),):
            shape = f"of shape {array.shape} for {len(texts)} texts"
            raise ValueError(f"{self.name} gave weights {shape}")
        return array.astype(np.float64)

    def _admitted(self, text: bytes) -> float:
        """Return 0 or -inf for what the function says is true or false, and a float as it is.

        Raises:
            TypeError: it returned an integer, which could be meant either way.
        """
        said = self.critic(text)
        if isinstance(said, float | np.floating):
            return float(said)
        if isinstance(said, int | np.integer) and not isinstance(said, bool):
            raise TypeError(
                f"{self.name} returned the integer {said}: return a bool, or a float (log weight)"
            )
        return 0.0 if said else -np.inf


def _each_run(which: BoolArray, size: int) -> BoolArray:
    """Return for each particle whether any of its run is among `which`, bool[R size]."""
    return np.repeat(which.reshape(-1, size).any(axis=1), size)


class Judge(Critic):
    """The target's language models, which weigh a text where a block of it ends.

    Unlike what another critic says of it, a text that `terminate_when` has ended keeps its weight
    as a prefix: nothing said that it is over but the caller.
    """

    def _whole(self, particles: Particles) -> BoolArray:
        """See `Critic`: the texts whose end was drawn."""
        return particles.symbols_read(self.stops) > particles.length


def split(target: Any, draft: Any, block: Any, others: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return what weighs bytes, what proposes them, and what weighs blocks.

    Args:
        target: of which the draft stands for the factors that hold language models.
        draft, block: see `smc`.
        others: further proposals and twists, by their names there.

    Returns:
        The target's other factors over the support of the draft, the same times the draft, and
        the product of the factors that hold language models.

    Raises:
        TypeError, ValueError: no potential over bytes, no number of bytes, another proposal or
            twist, or random beams in the target.
    """
    check_alphabet(draft)
    check_count("block", block, 1)
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"draft= proposes and weighs block by block, so {name}= has no place")
    if random_beams([target]):
        raise ValueError(
            "a target that reads whole texts has one beam a text in all runs, so with draft= none "
            f'may be random (prune="unbiased"), got {name_of(target)}'
        )
    factors = list(factors_of(target))
    models = [f for f in factors if has_language_model(f)]
    rest = [f for f in factors if not has_language_model(f)]
    return reduce(times, rest, draft**0.0), reduce(times, rest, draft), reduce(times, models)
