"""`Lookahead`: the expected future mass of an automaton constraint, for proposals and twists."""

from __future__ import annotations

import asyncio
import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Generic, Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from genlm.control.potential.tempered import Tempered

from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints import ByteDFA, ByteWFSA, ConstraintError, approximate_automaton
from genlm_bytes_smc.constraints.learning import MAX_STATES
from genlm_bytes_smc.constraints.matcher import ByteMatcher
from genlm_bytes_smc.lm.devices import device_of
from genlm_bytes_smc.lookahead.future_mass import FutureTable, TableFactor
from genlm_bytes_smc.lookahead.ngram import (
    ByteNgram,
    PilotSamples,
    RowMeans,
    pilot_means,
    rows_after,
    soft_counts_of,
)
from genlm_bytes_smc.smc.factors import compile_rows, factors_of, has_language_model, name_of
from genlm_bytes_smc.smc.loop import smc_steps
from genlm_bytes_smc.smc.runs import AllParticlesDeadError
from genlm_bytes_smc.smc.weighers import Ahead, AheadLanes

T = TypeVar("T")
ORDER = 2
FIT_BYTES = 64
TAUGHT = 64  # texts of earlier runs that an approximating automaton learns from

Automaton = ByteDFA | ByteWFSA


class Automata(NamedTuple):
    """The automata to look ahead along: two side by side, either of which may be missing.

    Attributes:
        dfa, wfsa: the deterministic and the weighted one.
        approximate: whether texts of the target may leave them.
    """

    dfa: ByteDFA | None
    wfsa: ByteWFSA | None
    approximate: bool


def automata_of(
    target: Any,
    constraint: Automaton | ByteMatcher | None = None,
    max_states: int = MAX_STATES,
    texts: Sequence[bytes] = (),
) -> Automata:
    """Return the constraint given, or else the automata, grammars and schemas of the target.

    Args:
        target, constraint: the target, and what to look along instead.
        max_states: most states of an automaton that approximates a grammar or a schema.
        texts: texts of the target that such an automaton learns from.

    Raises:
        ValueError: nothing to look along, or several weighted automata.
    """
    found = constraints_of(target) if constraint is None else [constraint]
    exact = [f for f in found if not isinstance(f, ByteMatcher)]
    matchers = [f for f in found if isinstance(f, ByteMatcher)]
    near = [approximate_automaton(m, max_states=max_states, texts=texts) for m in matchers]
    approximate = constraint is not None or bool(near)
    try:
        return Automata(*meet([*exact, *near]), approximate)
    except ConstraintError:
        if not exact or not near:
            raise
        # What the factors share is beyond what the approximation reached.
        return Automata(*meet(exact), False)


def constraints_of(target: Any) -> list[Automaton | ByteMatcher]:
    """Return the automata, grammars and schemas that a text of the target must pass.

    A power of one that is not weighted admits the same texts, so it counts as that.

    Raises:
        ValueError: there is none.
    """
    found: list[Automaton | ByteMatcher] = []
    for factor in factors_of(target):
        inner = factor
        while isinstance(inner, Tempered) and inner.beta > 0:
            inner = inner.p
        if isinstance(inner, ByteDFA | ByteMatcher) or isinstance(factor, ByteWFSA):
            found.append(inner)
    if not found:
        raise ValueError(
            f"no byte automaton, grammar or schema is a factor of {name_of(target)}, so there is "
            "nothing to look ahead along; name an automaton that approximates the constraint: "
            "Lookahead(constraint=...)"
        )
    return found


def meet(automata: list[Automaton]) -> tuple[ByteDFA | None, ByteWFSA | None]:
    """Return one deterministic automaton for all deterministic ones, and the weighted one.

    Raises:
        ValueError: several weighted ones.
    """
    weighted = [a for a in automata if isinstance(a, ByteWFSA)]
    if len(weighted) > 1:
        raise ValueError(
            f"a look-ahead takes at most one weighted automaton, got {len(weighted)}; name one: "
            "Lookahead(constraint=...)"
        )
    plain = [a for a in automata if isinstance(a, ByteDFA)]
    both = reduce(lambda a, b: a & b, plain) if plain else None
    return both, weighted[0] if weighted else None


def language_models_of(target: Any) -> list[Any]:
    """Return the factors of a target that hold language models.

    Raises:
        ValueError: there is none.
    """
    models = [f for f in factors_of(target) if has_language_model(f)]
    if not models:
        raise ValueError(f"no language model is a factor of {name_of(target)}")
    return models


class _LastFew(Generic[T]):
    """The eight values made last, each found by the very objects that it was made of."""

    def __init__(self) -> None:
        self._held: list[tuple[tuple[Any, ...], Any, T]] = []

    def get(self, objects: Sequence[Any], option: Any = None) -> T | None:
        """Return the value made of these objects and an equal option; None if none is held."""
        for held, had, value in self._held:
            if had == option and [*map(id, held)] == [*map(id, objects)]:
                return value
        return None

    def keep(self, value: T, objects: Sequence[Any], option: Any = None) -> T:
        """Hold a value, and return it."""
        self._held = [*self._held[-7:], (tuple(objects), option, value)]
        return value


class Lookahead(Ahead):
    """psi(x): the expected mass of what an automaton admits after x, under a byte n-gram.

    `smc(..., proposal=Lookahead())` draws bytes with an eye on what they lead to, and
    `smc(..., twist=Lookahead())` resamples with an eye on it; one object can be both. The
    target of the run does not change, and an estimate stays unbiased, however bad psi is.

    Without arguments it finds the automata in the target by itself (every `ByteDFA` that is a
    factor, intersected, and one `ByteWFSA`), approximates grammars and schemas by automata
    (`approximate_automaton`), fits a bigram to 64 texts that the target's language models
    write without the constraint, and respects the run's `max_bytes`. What was fitted is kept
    in the object and used again by later runs of the same target.

    Args:
        model: a `ByteNgram`, or the order of one that is fitted to the target's language
            models (None: 2).
        strength: power of psi. Between 0 (no look-ahead) and 1 it trusts psi less.
        defensive: share of the target's own row in the proposal, in (0, 1): keeps the
            proposal above zero wherever the target is, so that no text is left out.
        constraint: look ahead along this automaton, grammar or schema instead of those found
            in the target. It may be an approximation, such as a regular expression for a
            grammar: a text that leaves it is given psi = exp(outside) of what the empty text
            has. So is one that leaves the automaton found for a grammar or a schema. (In runs with
            `terminate_when` or a larger `max_bytes`, one that an automaton of the target cannot
            complete in time has the psi of the empty text.)
        outside: see `constraint`, nats.
        max_states: most states of the automaton that approximates a grammar or a schema.
        max_bytes: length limit that psi respects: "run" is the run's own, None is no limit
            (psi then does not change when a run is resumed with a larger limit).
        ends: what ends a text: "eos", the end-of-sequence symbol with its probability under
            the model; or "accept", reaching a state in which the automaton may end (for runs
            with `terminate_when` that stop there).
        n_texts, seed: of the texts that the n-gram is fitted to.
        fit_bytes: most bytes of each (None: those of the run, but at most 64).
        device: where psi is solved and kept (None: that of the automaton).

    Raises:
        TypeError, ValueError: bad arguments; at the start of a run, a target without automata.
    """

    def __init__(
        self,
        model: ByteNgram | int | None = None,
        *,
        strength: float = 1.0,
        defensive: float = 1e-3,
        constraint: ByteDFA | ByteWFSA | ByteMatcher | None = None,
        outside: float = -10.0,
        max_states: int = MAX_STATES,
        max_bytes: int | Literal["run"] | None = "run",
        ends: Literal["eos", "accept"] = "eos",
        n_texts: int = 64,
        fit_bytes: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if model is not None and not isinstance(model, ByteNgram):
            check_count("model (the order of an n-gram)", model, 0)
        if not (isinstance(strength, int | float) and math.isfinite(strength) and strength >= 0):
            raise ValueError(f"strength must be a number of at least 0, got {strength!r}")
        if not 0 < defensive < 1:
            raise ValueError(f"defensive must be in (0, 1), got {defensive!r}")
        if not isinstance(constraint, ByteDFA | ByteWFSA | ByteMatcher | None):
            raise TypeError(
                "constraint must be a ByteDFA, a ByteWFSA, a ByteGrammar or a ByteJsonSchema, "
                f"got {type(constraint).__name__}"
            )
        check_count("max_states", max_states, 1)
        if not outside < math.inf:
            raise ValueError(f"outside must be a log weight below infinity, got {outside!r}")
        if max_bytes not in ("run", None):
            check_count("max_bytes", max_bytes, 1)
        if ends not in ("eos", "accept"):
            raise ValueError(f'ends must be "eos" or "accept", got {ends!r}')
        check_count("n_texts", n_texts, 1)
        if fit_bytes is not None:
            check_count("fit_bytes", fit_bytes, 1)
        self.model = model
        self.strength, self.defensive = float(strength), float(defensive)
        self.constraint, self.max_states = constraint, max_states
        self.outside = float(outside)
        self.max_bytes, self.ends = max_bytes, ends
        self.n_texts, self.fit_bytes, self.seed = n_texts, fit_bytes, seed
        self.device = None if device is None else device_of(device)
        self.local: RowMeans | None = None
        self._solved: _LastFew[FutureTable] = _LastFew()
        self._automata: _LastFew[Automata] = _LastFew()
        self._fitted: _LastFew[ByteNgram] = _LastFew()
        self._locks: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()

    @classmethod
    async def from_pilot(
        cls,
        target: Any,
        n_particles: int = 32,
        max_bytes: int = 100,
        *,
        rounds: int = 4,
        order: int = 4,
        smoothing: float = 1.0,
        seed: int = 0,
        explore: float = 0.05,
        first: Lookahead | None = None,
        terminate_when: Callable[[bytes], bool] | None = None,
        **settings: Any,
    ) -> Lookahead:
        """Learn from pilot runs of the target what its language model writes where.

        Each round runs `smc` with the look-ahead so far and counts the language models' rows
        at the texts its particles visit, by automaton state and by state and context; psi is
        then solved anew with these rows in place of the n-gram's (in the spirit of the
        iterated auxiliary particle filter, Guarniero, Johansen & Lee 2017, with averaged rows
        and a linear system where they regress). Later runs with other seeds stay unbiased, as
        for any psi that does not depend on their own draws.

        Args:
            target, max_bytes, terminate_when: as for the runs to come. Its automata must be
                deterministic. One that approximates a grammar or a schema is explored first
                where the pilot's texts pass.
            n_particles: of the pilot runs. They do not resample, as a branch that dies out
                early in a pilot is never learned about.
            explore: share of the target's own rows in the proposals of pilot runs.
            rounds: how many pilot runs, each with what the ones before taught.
            order: of the contexts that rows are counted in.
            smoothing: visits that a coarser row counts as.
            seed: of the first pilot run; later ones have seed + 1 and so on. Choose other
                seeds for the runs to come.
            first: the look-ahead of the first round (None: none).
            settings: of the look-ahead that comes out: `strength`, `defensive`, `constraint`
                and so on.

        Raises:
            ValueError: no deterministic automaton, or bad numbers.
        """
        check_count("rounds", rounds, 1)
        check_count("order", order, 1)
        ahead = first
        seen: PilotSamples | None = None
        for k in range(rounds):
            options: dict[str, Any] = {"seed": seed + k, "terminate_when": terminate_when}
            if ahead is not None:
                options["proposal"] = ahead.but(defensive=explore)
            visits = await pilot_samples(target, n_particles, max_bytes, **options)
            seen = visits if seen is None else seen + visits
            model = ByteNgram.from_rows(soft_counts_of(*seen), order, smoothing)
            ahead = cls(model, **settings)
            dfa, wfsa, approximate = automata_of(
                target, ahead.constraint, ahead.max_states, longest(seen.texts)
            )
            if wfsa is not None or dfa is None:
                raise ValueError("a pilot run learns about deterministic automata only")
            if approximate:  # the rows below are those of this automaton's states
                ahead.constraint = dfa
            state = dfa.states(seen.texts).cpu().numpy()
            ahead.local = pilot_means(dfa, model, state, seen, smoothing)
        assert ahead is not None
        return ahead

    def but(self, *, strength: float | None = None, defensive: float | None = None) -> Lookahead:
        """Return the same psi, which is solved once for both, with other settings."""
        new = copy.copy(self)
        new.strength = self.strength if strength is None else strength
        new.defensive = self.defensive if defensive is None else defensive
        return new

    async def start(
        self, target: Any, leaves: Sequence[Any], max_bytes: int, *, terminated: bool = False
    ) -> AheadLanes:
        """Return the factor of the empty text; what it needs is fitted on the first call."""
        lock = self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with lock:  # runs side by side fit once
            table = await self._table(target, tuple(leaves), max_bytes, terminated)
        return TableFactor.first(table.spawn())

    async def fit(self, target: Any, max_bytes: int = 100) -> FutureTable:
        """Return the table that a run of `target` would fit at its start."""
        leaves: list[Any] = []
        compile_rows(target, leaves)
        return await self._table(target, tuple(leaves), max_bytes)

    async def _table(
        self, target: Any, leaves: tuple[Any, ...], max_bytes: int, terminated: bool = False
    ) -> FutureTable:
        limit = max_bytes if self.max_bytes == "run" else self.max_bytes
        # What the automata cannot end within the limit may have weight all the same.
        unsure = terminated or (limit is not None and limit < max_bytes)
        if (found := self._solved.get(leaves, (limit, unsure))) is not None:
            return found
        dfa, wfsa, approximate = self._automata.get(leaves) or self._automata.keep(
            automata_of(target, self.constraint, self.max_states), leaves
        )
        model = await self.ngram(target, self.fit_bytes or min(max_bytes, FIT_BYTES))
        device = self.device or (dfa or wfsa).device  # type: ignore[union-attr]
        beyond = self.outside if approximate else 0.0 if unsure else None
        table = FutureTable(
            dfa, wfsa, model, limit, device, self.local, stops=self.ends == "accept", outside=beyond
        )
        return self._solved.keep(table, leaves, (limit, unsure))

    async def ngram(self, target: Any, fit_bytes: int = FIT_BYTES) -> ByteNgram:
        """Return the byte model: the one given, or fitted to the target's language models."""
        if isinstance(self.model, ByteNgram):
            return self.model
        models = language_models_of(target)
        if (found := self._fitted.get(models)) is not None:
            return found
        how = {"n_texts": self.n_texts, "max_bytes": fit_bytes, "seed": self.seed}
        order = ORDER if self.model is None else self.model
        model = await ByteNgram.from_model(reduce(operator.mul, models), order=order, **how)
        return self._fitted.keep(model, models)

    def __repr__(self) -> str:
        model = ORDER if self.model is None else self.model
        return f"Lookahead({model}, strength={self.strength:g})"


async def pilot_samples(
    target: Any, n_particles: int, max_bytes: int, **options: Any
) -> PilotSamples:
    """Run `smc` and gather the texts its particles visited (those that died, until they did)."""
    count: Counter[bytes] = Counter()
    try:
        async for state in smc_steps(target, n_particles, 0.0, max_bytes, **options):
            texts = state.particles.texts()
            count.update(texts[i] for i in np.flatnonzero(state.particles.active))
    except AllParticlesDeadError:
        pass  # what was seen before is still worth knowing
    texts = sorted(count, key=len)
    llm = reduce(operator.mul, language_models_of(target))
    rows = (await rows_after(llm, texts)).exp().numpy()
    return PilotSamples(texts, np.array([float(count[t]) for t in texts]), rows)


def longest(texts: Sequence[bytes]) -> list[bytes]:
    """Return at most `TAUGHT` of the texts that no other one goes on from, of all lengths."""
    begun = {text[:-1] for text in texts}
    found = sorted({t for t in texts if t not in begun}, key=lambda t: (len(t), t))
    return found[:: max(-(-len(found) // TAUGHT), 1)]
