"""Conditional SMC and particle Gibbs: Markov chains over whole texts.

`conditional_smc` runs N particles one of which is held to a given text, and returns one of the
final texts, drawn by weight. For every N >= 1 this leaves the target invariant (Andrieu, Doucet
& Holenstein 2010, JRSS-B 72:269, section 4.3). Resampling is multinomial: the held particle goes
on, the other N - 1 ancestors are independent draws. With ancestor sampling (Lindsten, Jordan &
Schön 2014, JMLR 15:2145) the held text also draws, at each resampling, which particle's text
its own rest is put after, in proportion to the weight of the particle times the target's ratio
of the joined text to the particle's own. That mixes where resampling would otherwise have every
text begin like the held one, and costs a pass over the rest of the text for each particle.

What is invariant with `prune="unbiased"`: with shared beams the estimated model is a fixed
measure, a function of the beam seed and the text, and that measure, times the other factors,
is what the chain keeps. With `share_beams=False` a text keeps the random numbers of its own
beams from one iteration to the next, the chain keeps the joint law of text and beams whose
density is the estimate (a pseudo-marginal method: Andrieu & Roberts 2009, Annals of Statistics
37:697), and the texts have the exact model's law.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any, TypedDict, Unpack

import numpy as np

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.beam.state import padded
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.smc.loop import run
from genlm_bytes_smc.smc.particles import Particles, SaltArray, Weights, derived_seed, generator
from genlm_bytes_smc.smc.plan import Plan, make_plan
from genlm_bytes_smc.smc.reading import replay
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray
from genlm_bytes_smc.smc.result import SMCResult
from genlm_bytes_smc.smc.runs import AllParticlesDeadError, Pins, Runs

_CHOICE, _ANCESTOR = 3, 4  # random numbers of a run besides those of its steps


class ConditionalOptions(TypedDict, total=False):
    """The keyword arguments of both kernels, as for `smc`."""

    proposal: Any
    critic: Any
    twist_with_critic: bool
    terminate_when: Any
    beam_seed: int | None
    share_beams: bool
    rollout: int | None
    twist: Any
    tempering: Any


@dataclass(frozen=True)
class Held:
    """A whole text as the state of a chain.

    Attributes:
        text: its bytes.
        salt: uint64[t] or None: what its own beams are drawn by, see `Particles.salt`.
    """

    text: bytes
    salt: SaltArray | None = None


@dataclass(frozen=True)
class ConditionalResult:
    """One conditional run.

    Attributes:
        text: the text drawn from the final particles, the next state of the chain.
        held: the same with what its beams are drawn by.
        result: all particles; the first is the one that was held.
    """

    text: bytes
    held: Held
    result: SMCResult


async def conditional_smc(
    target: Any,
    text: bytes | Held,
    n_particles: int,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    *,
    ancestor_sampling: bool = False,
    seed: int | None = None,
    **options: Unpack[ConditionalOptions],
) -> ConditionalResult:
    """Make one step of a Markov chain over whole texts that leaves the target invariant.

    Args:
        target, n_particles, ess_threshold, max_bytes, seed, **options: as for `smc`.
        text: the state of the chain. With `share_beams=False` a `Held` that an earlier step
            returned; given as bytes its beams are drawn anew, which starts the chain and is
            no step that leaves anything invariant.
        ancestor_sampling: whether the held text may change its beginning at resamplings.

    Raises:
        TypeError, ValueError: as for `smc`; a text that is longer than `max_bytes`, has
            weight zero, or is ended earlier by `terminate_when`.
    """
    plan = _plan(target, n_particles, ess_threshold, max_bytes, seed=seed, **options)
    (result,) = await _conditional([plan], [_held(text, plan)], ancestor_sampling)
    return result


async def conditional_runs(
    target: Any,
    texts: Sequence[bytes],
    n_particles: int,
    ess_threshold: float,
    max_bytes: int,
    seeds: Sequence[int],
) -> list[SMCResult]:
    """Return the results of `conditional_smc`, one a text with its seed, run side by side."""
    size = n_particles, ess_threshold, max_bytes
    plans = [_plan(target, *size, seed=seed) for seed in seeds]
    held = [_held(text, plan) for text, plan in zip(texts, plans, strict=True)]
    return [found.result for found in await _conditional(plans, held, False)]


class Chains:
    """The chains that `particle_gibbs` made.

    Attributes:
        chains: for each chain its texts, one an iteration.
        held: the last state of each, to go on from.
        changed: float64[chains], share of the iterations in which the text changed.
    """

    def __init__(self, starts: Sequence[Held], states: Sequence[Sequence[Held]]) -> None:
        self.chains = [[held.text for held in chain] for chain in states]
        self.held = [chain[-1] if chain else s for chain, s in zip(states, starts, strict=True)]
        paths = [[s.text, *chain] for s, chain in zip(starts, self.chains, strict=True)]
        changes = [[a != b for a, b in pairwise(path)] or [False] for path in paths]
        self.changed: FloatArray = np.array([np.mean(change) for change in changes])

    @property
    def texts(self) -> list[bytes]:
        """All texts, chain after chain."""
        return [text for chain in self.chains for text in chain]

    def posterior(self, burn_in: int = 0) -> dict[bytes, float]:
        """Return the share of each text, likeliest first.

        Args:
            burn_in: how many texts to leave out at the beginning of each chain.
        """
        kept = [text for chain in self.chains for text in chain[burn_in:]]
        share = dict.fromkeys(kept, 0.0)
        for text in kept:
            share[text] += 1 / len(kept)
        return dict(sorted(share.items(), key=lambda item: -item[1]))

    def __repr__(self) -> str:
        length = len(self.chains[0]) if self.chains else 0
        return f"Chains({len(self.chains)} of {length} texts, changed {self.changed.mean():.0%})"


async def particle_gibbs(
    target: Any,
    n_particles: int,
    iterations: int,
    ess_threshold: float = 0.5,
    max_bytes: int = 100,
    *,
    start: bytes | Held | Sequence[bytes | Held] | None = None,
    chains: int = 1,
    ancestor_sampling: bool = True,
    seed: int | None = None,
    **options: Unpack[ConditionalOptions],
) -> Chains:
    """Make Markov chains of whole texts by repeated conditional SMC, all chains side by side.

    Args:
        target, n_particles, ess_threshold, max_bytes, **options: as for `smc`.
        iterations: texts to draw in each chain.
        start: the first state of every chain, or one a chain (such as `Chains.held`); None
            takes it from an ordinary run of `n_particles`.
        chains: how many.
        ancestor_sampling: see `conditional_smc`.
        seed: of all draws (None: 0). The beams keep `beam_seed` throughout.

    Raises:
        TypeError, ValueError: as for `conditional_smc`.
        AllParticlesDeadError: without `start`, no run found a text.
    """
    check_count("iterations", iterations, 0)
    check_count("chains", chains, 1)
    if seed is not None:
        check_count("seed", seed, 0)
    first = _plan(target, n_particles, ess_threshold, max_bytes, **options)

    def plans(iteration: int) -> list[Plan]:
        seeds = [derived_seed(seed or 0, chain, iteration) for chain in range(chains)]
        return [
            _plan(target, n_particles, ess_threshold, max_bytes, seed=s, **options) for s in seeds
        ]

    held = await _starts(start, chains, first, plans(0))
    starts, states = held, [[] for _ in range(chains)]  # type: tuple[list[Held], list[list[Held]]]
    for iteration in range(1, iterations + 1):
        results = await _conditional(plans(iteration), held, ancestor_sampling)
        held = [result.held for result in results]
        for chain, state in zip(states, held, strict=True):
            chain.append(state)
    return Chains(starts, states)


def _pins(held: Sequence[Held], sampling: bool) -> Pins:
    """Return what holds the first particle of each run to a text."""
    drawn = [np.zeros(0, dtype=np.uint64) if h.salt is None else h.salt for h in held]
    texts = [h.text for h in held]
    symbols = padded(texts, EOS_COLUMN, 1 + max(map(len, texts)))
    salts = np.zeros((len(held), 1 + max(map(len, drawn))), dtype=np.uint64)
    for line, salt in zip(salts, drawn, strict=True):
        line[: len(salt)] = salt  # zero where a text has no more
    return Pins(symbols, salts, partial(_ancestors, sampling))


async def _ancestors(
    sampling: bool, runs: Runs, particles: Particles, due: Sequence[int]
) -> IntArray:
    """Return the held particle itself, or any that its rest may follow, by weight (see `Pins`).

    Raises:
        ValueError: a held text has died.
    """
    assert runs.pins is not None
    for r in due:
        if particles.dead[runs.of(r).start]:
            symbols = runs.pins.symbols[r]
            raise _dead(bytes(symbols[symbols != EOS_COLUMN].tolist()))
    if not sampling:
        return np.zeros(len(due), dtype=np.int64)
    index = np.concatenate([np.arange(runs.of(r).start, runs.of(r).stop) for r in due])
    joined = await _joined(runs, particles, index, due)
    untwisted = (particles.log_weights - particles.twist)[index]
    weights = (untwisted + joined).reshape(len(due), -1)
    rngs = [generator(runs.plans[r].seed, runs.step, _ANCESTOR) for r in due]
    return np.array([_drawn(w, rng) for w, rng in zip(weights, rngs, strict=True)])


async def _joined(
    runs: Runs, particles: Particles, index: IntArray, due: Sequence[int]
) -> FloatArray:
    """Return the log of the target's weight of each particle's text with the rest of its
    run's held text, over that of its text: float64[len(index)], nats."""
    assert runs.pins is not None
    pins, after, share = runs.pins, runs.step + 1, runs.plan.share_beams
    run = np.repeat(np.asarray(due), runs.size)
    own = np.repeat(np.arange(len(due)) * runs.size, runs.size)  # the held particle of each
    walkers = particles.gather(index, 0.0)._replace(twist=np.zeros(len(index)))
    lost = particles.dead[index] | (walkers.ended != walkers.ended[own])
    walkers = walkers._replace(log_weights=np.where(lost, -np.inf, 0.0))
    # beams of one's own go on with the held text's draws
    walkers = walkers._replace(salt=None) if share else walkers.salted(pins.salt(after)[run])
    reads = walkers.active
    walk = await replay(
        runs.plan,
        walkers,
        [runs.plans[r].beam_seed for r in due],
        count(after),
        lambda step: pins.read(step)[run],
        salt=None if share else lambda step: pins.salt(step)[run],
        score=True,
    )
    symbols = walk.symbols_read + after * reads
    return np.where(symbols == symbols[own], walk.particles.log_weights, -np.inf)


def _drawn(log_weights: FloatArray, rng: np.random.Generator) -> int:
    """Draw a place by weight, never one of weight zero unless all are."""
    total = np.cumsum(Weights(log_weights).normalised)
    at = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
    return min(at, len(total) - 1)


def _dead(text: bytes) -> ValueError:
    """Return the error for a held text of weight zero."""
    return ValueError(f"the text {text!r} has weight zero under the target")


async def _conditional(
    plans: Sequence[Plan], held: Sequence[Held], sampling: bool
) -> list[ConditionalResult]:
    """Return one conditional run a plan."""
    outcomes = await run(plans, pins=_pins(held, sampling))
    results = [outcome.result for outcome in outcomes]
    return [_choose(p, r, h.text) for p, r, h in zip(plans, results, held, strict=True)]


def _choose(plan: Plan, result: SMCResult, text: bytes | None) -> ConditionalResult:
    """Draw one of the final texts, by weight.

    Raises:
        ValueError: the text that was held has died.
    """
    particles = result.state.particles
    if text is not None and particles.dead[0]:
        raise _dead(text)
    k = _drawn(result.log_weights, generator(plan.seed, result.state.step, _CHOICE))
    salt = particles.salt
    held = Held(result.texts[k], None if salt is None else salt[k].copy())
    return ConditionalResult(held.text, held, result)


async def _starts(start: Any, chains: int, plan: Plan, plans: Sequence[Plan]) -> list[Held]:
    """Return the first states of all chains.

    Raises:
        TypeError, ValueError: what is wrong with those given.
        AllParticlesDeadError: none are given, and a run found none.
    """
    if start is None:
        found = []
        for p, outcome in zip(plans, await run(plans), strict=True):
            if isinstance(outcome, AllParticlesDeadError):
                raise AllParticlesDeadError(
                    f"no text to start from: all {plan.n_particles} particles died at byte "
                    f"{outcome.byte}; give a start, or more particles",
                    byte=outcome.byte,
                    causes=outcome.causes,
                    state=outcome.state,
                )
            found.append(_choose(p, outcome, None).held)
        return found
    if isinstance(start, bytes | Held):
        return [_held(start, plan, chain) for chain in range(chains)]
    if not isinstance(start, Iterable) or isinstance(start, str):
        raise TypeError(f"start must be bytes, one or one a chain, got {start!r}")
    given = list(start)
    if len(given) != chains:
        raise ValueError(f"start must hold one text for each of {chains} chains, got {len(given)}")
    return [_held(text, plan, chain) for chain, text in enumerate(given)]


def _held(text: Any, plan: Plan, chain: int = 0) -> Held:
    """Check a state of a chain, and give it draws for beams of its own if it has none.

    Raises:
        TypeError: neither bytes nor `Held`. ValueError: too long.
    """
    held = text if isinstance(text, Held) else Held(text)
    if not isinstance(held.text, bytes):
        raise TypeError(f"a text is due as bytes, got {type(held.text).__name__}")
    if len(held.text) > plan.max_bytes:
        raise ValueError(
            f"the text must have at most max_bytes = {plan.max_bytes} bytes, got {len(held.text)}"
        )
    if plan.terminate_when is not None:
        lengths = range(1, len(held.text))
        stop = next((k for k in lengths if plan.terminate_when(held.text[:k])), None)
        if stop is not None:
            raise ValueError(f"terminate_when ends {held.text!r} after {stop} bytes")
    if plan.share_beams:
        return Held(held.text)
    if held.salt is not None:
        return held
    rng = generator(plan.seed, chain, _CHOICE)
    return Held(held.text, rng.integers(0, 2**64, size=len(held.text) + 2, dtype=np.uint64))


def _plan(
    target: Any, n_particles: int, ess_threshold: float, max_bytes: int, **options: Any
) -> Plan:
    for name in ("draft", "resample_at"):
        if options.get(name) is not None:
            raise ValueError(f"conditional SMC takes no {name}=, got {options[name]!r}")
    plan = make_plan(
        target, n_particles, ess_threshold, max_bytes, resampling_method="multinomial", **options
    )
    if plan.rollout.candidates > 1 or plan.rejuvenate is not None:
        raise ValueError(
            "conditional SMC is made for plain particles, without rejuvenate and with a rollout "
            f"that is a number of bytes; got {plan.rejuvenate} and {plan.rollout}"
        )
    return plan
