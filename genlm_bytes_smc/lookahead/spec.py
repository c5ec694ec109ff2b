"""`Lookahead`: the expected future mass of an automaton constraint, for proposals and twists."""

from __future__ import annotations

import asyncio
import math
import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from genlm_bytes_smc.constraints import ByteDFA, ByteWFSA
from genlm_bytes_smc.lookahead.factor import TableFactor, Tracker
from genlm_bytes_smc.lookahead.find import automata_of, language_models_of, meet
from genlm_bytes_smc.lookahead.ngram import ByteNgram
from genlm_bytes_smc.lookahead.table import Arcs, Float, FutureTable
from genlm_bytes_smc.smc.ahead import Ahead, AheadFactor
from genlm_bytes_smc.smc.plan import check_count

Horizon = int | Literal["run"] | None
ORDER = 2


class Lookahead(Ahead):
    """psi(x): the expected mass of what an automaton admits after x, under a byte n-gram.

    `smc(..., proposal=Lookahead())` draws bytes with an eye on what they lead to, and
    `smc(..., twist=Lookahead())` resamples with an eye on it; one object can be both. The
    target of the run does not change, and an estimate stays unbiased, however bad psi is.

    Without arguments it finds the automata in the target by itself (every `ByteDFA` that is a
    factor, intersected, and one `ByteWFSA`), fits a bigram to 64 texts that the target's
    language models write without the constraint, and respects the run's `max_bytes`. What was
    fitted is kept in the object and used again by later runs of the same target.

    Args:
        model: a `ByteNgram`, or the order of one that is fitted to the target's language
            models (None: 2).
        strength: power of psi. Between 0 (no look-ahead) and 1 it trusts psi less.
        defensive: share of the target's own row in the proposal, in (0, 1): keeps the
            proposal above zero wherever the target is, so that no text is left out.
        constraint: look ahead along this automaton instead of those found in the target. It
            may be an approximation, such as a regular expression for a grammar: a text that
            leaves it is given psi = exp(outside) of what the empty text has.
        outside: see `constraint`, nats.
        max_bytes: length limit that psi respects: "run" is the run's own, None is no limit
            (psi then does not change when a run is resumed with a larger limit).
        ends: what ends a text: "eos", the end-of-sequence symbol with its probability under
            the model; or "accept", reaching a state in which the automaton may end (for runs
            with `terminate_when` that stop there).
        n_texts, fit_bytes, seed: of the texts that the n-gram is fitted to.
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
        constraint: ByteDFA | ByteWFSA | None = None,
        outside: float = -10.0,
        max_bytes: Horizon = "run",
        ends: Literal["eos", "accept"] = "eos",
        n_texts: int = 64,
        fit_bytes: int = 64,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if model is not None and not isinstance(model, ByteNgram):
            check_count("model (the order of an n-gram)", model, 0)
        if not (isinstance(strength, int | float) and math.isfinite(strength) and strength >= 0):
            raise ValueError(f"strength must be a number of at least 0, got {strength!r}")
        if not 0 < defensive < 1:
            raise ValueError(f"defensive must be in (0, 1), got {defensive!r}")
        if constraint is not None and not isinstance(constraint, ByteDFA | ByteWFSA):
            raise TypeError(
                f"constraint must be a ByteDFA or a ByteWFSA, got {type(constraint).__name__}"
            )
        if max_bytes not in ("run", None):
            check_count("max_bytes", max_bytes, 1)
        if ends not in ("eos", "accept"):
            raise ValueError(f'ends must be "eos" or "accept", got {ends!r}')
        check_count("n_texts", n_texts, 1)
        check_count("fit_bytes", fit_bytes, 1)
        self.model = model
        self.strength = float(strength)
        self.defensive = float(defensive)
        self.constraint = constraint
        self.outside = float(outside)
        self.max_bytes = max_bytes
        self.ends = ends
        self.n_texts = n_texts
        self.fit_bytes = fit_bytes
        self.seed = seed
        self.device = None if device is None else torch.device(device)
        self.pair_rows: dict[tuple[int, int], Float] | None = None
        self._made: list[tuple[tuple[Any, ...], int | None, Tracker, FutureTable]] = []
        self._fitted: list[tuple[list[Any], ByteNgram]] = []
        self._locks: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()

    async def start(self, target: Any, leaves: Sequence[Any], max_bytes: int) -> AheadFactor:
        """The factor of the empty text; what it takes is fitted on the first call."""
        limit = max_bytes if self.max_bytes == "run" else self.max_bytes
        lock = self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with lock:  # runs side by side fit once
            tracker, table = await self._make(target, tuple(leaves), limit)
        return TableFactor.first(tracker.spawn(), table, limit)

    async def fit(self, target: Any, max_bytes: int = 100) -> FutureTable:
        """What a run of `target` would fit at its start, for a look at it."""
        limit = max_bytes if self.max_bytes == "run" else self.max_bytes
        return (await self._make(target, (target,), limit))[1]

    async def _make(
        self, target: Any, leaves: tuple[Any, ...], limit: int | None
    ) -> tuple[Tracker, FutureTable]:
        for key, had, tracker, table in self._made:
            same = len(key) == len(leaves) and all(map(operator.is_, key, leaves))
            if same and had == limit:
                return tracker, table
        automata = automata_of(target) if self.constraint is None else [self.constraint]
        dfa, wfsa = meet(automata)
        model = await self.ngram(target)
        arcs = Arcs.of(wfsa) if wfsa is not None else None
        if dfa is not None:
            arcs = Arcs.of(dfa) if arcs is None else arcs.meet(dfa.host_table())
        assert arcs is not None
        if self.ends == "accept":
            arcs = arcs.stopping()
        device = self.device or (dfa or wfsa).device  # type: ignore[union-attr]
        table = FutureTable(arcs, model, limit, device, self.pair_rows)
        outside = None if self.constraint is None else self.outside
        tracker = Tracker(dfa, wfsa, arcs, model, outside, device)
        self._made = [*self._made[-7:], (leaves, limit, tracker, table)]
        return tracker, table

    async def ngram(self, target: Any) -> ByteNgram:
        """The byte model: the one given, or fitted to the target's language models."""
        if isinstance(self.model, ByteNgram):
            return self.model
        models = language_models_of(target)
        for known, model in self._fitted:
            if len(known) == len(models) and all(map(operator.is_, known, models)):
                return model
        model = await ByteNgram.from_model(
            reduce(operator.mul, models),
            order=ORDER if self.model is None else self.model,
            n_texts=self.n_texts,
            max_bytes=self.fit_bytes,
            seed=self.seed,
        )
        self._fitted = [*self._fitted[-7:], (models, model)]
        return model

    def __repr__(self) -> str:
        model = ORDER if self.model is None else self.model
        return f"Lookahead({model}, strength={self.strength:g})"
