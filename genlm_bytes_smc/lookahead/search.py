"""Best-first search of the texts of a target: the rows of a budget go where most mass is expected.

A tree of texts whose rows are known is kept, with the sums of `lookahead.seen`: below a known text
the mass of its end and of each next byte times the mass below that, below an unknown one a
guess. The next row is that of the unknown text with the largest expected mass

    (weight of the text as a beginning) * (guessed mass below it).

As rows come in, the guesses below a beginning that proved bad fall, and others take over. A
likely text that begins in an unlikely way is found once what looked better has been refuted.
This is A* search (Hart, Nilsson & Raphael 1968) with a guess that is learned on the way in place
of a bound. Bounds alone, 1 below every unknown text, lead to short texts and never to an end.

The search draws nothing, so nothing in it is random. What it has found are exact weights of whole
texts, a sure lower bound of their total, and what a look-ahead needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN, N_SYMBOLS, contexts_of
from genlm_bytes_smc.constraints.matcher import ByteMatcher
from genlm_bytes_smc.lookahead.future_mass import TableFactor
from genlm_bytes_smc.lookahead.lookahead import TAUGHT, constraints_of
from genlm_bytes_smc.lookahead.seen import (
    AS_IT_IS,
    guesses_after,
    guesses_of,
    settings_of,
    solve,
)
from genlm_bytes_smc.smc.particles import BoolArray
from genlm_bytes_smc.smc.plan import Plan
from genlm_bytes_smc.smc.pooled import Found
from genlm_bytes_smc.smc.resampling import FloatArray
from genlm_bytes_smc.smc.weighers import AheadLanes, SeenRows

GROWTH = 1.15  # of the number of texts, after which guesses are learned anew
MOST_TEXTS = 100  # a row that may be spent
_ROUNDING = 1e-6  # of the sum of a row
AT_ONCE = 1 / 100  # of the known texts, whose rows are asked for in one forward


class Search:
    """The texts that are known, and a guess of what is below the others.

    Args:
        plan: of a run of the target.

    Attributes:
        texts: the known ones.
        settings: of tables (`settings_of`), once they are known.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.texts: list[bytes] = []
        self.settings: dict[str, Any] | None = None
        self._parent: list[int] = []
        self._final: set[bytes] = set()
        self._lanes: list[tuple[AheadLanes, int]] = []  # of each text: the lanes, and which
        self._target, self._after, self._open = (np.empty((64, N_SYMBOLS)) for _ in range(3))
        self._weight, self._value, self._best = (np.empty(64) for _ in range(3))
        self._fitted = 0  # texts that the guesses were learned from
        self._asked = False  # whether settings are known
        self._engines = plan.engines

    def _rows_spent(self) -> int:
        return sum(engine.counts.rows for engine in self._engines)

    async def spend(self, rows: int) -> None:
        """Go on until so many rows are computed from now on, or every text is known.

        Texts whose rows cost nothing are read too, up to `MOST_TEXTS` a row.
        """
        start, most_texts = self._rows_spent(), len(self.texts) + MOST_TEXTS * max(rows, 1)
        if not self.texts:
            await self._know([])
        while self._rows_spent() - start < rows and len(self.texts) < most_texts:
            if len(self.texts) >= GROWTH * self._fitted:
                await self._fit()
            best = self._best[: len(self.texts)]
            most = max(1, int(AT_ONCE * len(best)))
            nodes = np.argpartition(-best, most - 1)[:most] if most < len(best) else best.argsort()
            nodes = nodes[best[nodes] > -np.inf]
            if not len(nodes):
                return
            await self._know([(i, int(self._open[i].argmax())) for i in nodes.tolist()])

    def rows(self) -> SeenRows:
        """Return what is known, for a look-ahead: each text counts as seen by all particles."""
        n = len(self.texts)
        parent = np.array(self._parent, dtype=np.int64)
        final = frozenset(self._final)
        return SeenRows(self.texts, parent, self._target[:n], np.ones((n, 2)), final)

    @property
    def share(self) -> float:
        """The mass of the whole texts that are known, over the guess of all there is."""
        return float(np.exp(self._total() - self._value[0])) if self._value[0] > -np.inf else 1.0

    def found(self, rows: int, start: float) -> Found:
        """Return what was found, for so many rows; the empty text's log weight is `start` nats."""
        upper = np.full((len(self.texts), N_SYMBOLS), 0.0)
        for text in reversed(range(1, len(self.texts))):  # those that are longer come later
            here = np.logaddexp.reduce(self._target[text] + upper[text])
            upper[self._parent[text], self.texts[text][-1]] = here
        high = float(np.logaddexp.reduce(self._target[0] + upper[0]))
        if (np.exp(self._target[: len(self.texts)]).sum(axis=1) > 1 + _ROUNDING).any():
            high = np.inf
        return Found(rows, self.share, self._total() + start, high + start)

    def _total(self) -> float:
        """Return the log weight of all whole texts that are known, over the empty text's, nats."""
        whole = list(self.rows().whole().values())
        return float(np.logaddexp.reduce(whole)) if whole else -np.inf

    async def _fit(self) -> None:
        """Learn guesses from what is known, and sum up."""
        seen, target = self.rows(), self._plan.potential
        if not self._asked and len(self.texts) >= self._least():
            self._asked = True
            terminated = self._plan.terminate_when is not None
            self.settings = settings_of(target, seen, terminated=terminated)
        every: BoolArray = np.ones(len(self.texts), dtype=bool)
        leaves = self._plan.leaves[: self._plan.n_target]
        root = await guesses_of(seen, every, target, leaves, self._plan.max_bytes, self.settings)
        if not isinstance(root, TableFactor):  # a table would be too large, now and later
            self.settings = None
        solved = await solve(seen, root)
        n = self._fitted = len(self.texts)
        self._after[:n], self._value[:n] = solved.after, solved.value
        length = [len(text) for text in self.texts]
        places = zip(length, solved.place.tolist(), strict=True)
        self._lanes = [(solved.lanes[t], place) for t, place in places]
        score = self._target[:n] + self._after[:n]
        score[np.isneginf(self._open[:n])] = -np.inf
        self._open[:n] = score
        self._best[:n] = self._weight[:n] + score.max(axis=1)

    def _least(self) -> int:
        """Return how many texts teach an automaton that approximates a constraint."""
        try:
            found = constraints_of(self._plan.potential)
        except ValueError:
            return 1
        return TAUGHT if any(isinstance(c, ByteMatcher) for c in found) else 1

    async def _know(self, asked: Sequence[tuple[int, int]]) -> None:
        """Compute the rows of texts and note them; none asked: the empty text.

        Of each is given the place of the text that it goes on from, and its last byte.
        """
        texts, stops = [], self._plan.terminate_when
        going = list[tuple[int, int]]()
        for i, byte in asked:
            text = self.texts[i] + BYTES[byte]
            if stops is not None and stops(text):
                self._final.add(text)
                self._after[i, byte] = 0.0
                self._close(i, byte)
            else:
                texts.append(text)
                going.append((i, byte))
        if not going and asked:
            return
        rows = await self._target_rows(texts or [b""])
        for row, text, (i, byte) in zip(rows, texts or [b""], going or [(-1, 0)], strict=True):
            await self._add(text, i, byte, row)

    async def _target_rows(self, texts: Sequence[bytes]) -> FloatArray:
        """Return the target's log weights of each symbol after texts, float64[n, 257], nats."""
        contexts, blocks = contexts_of(texts), []
        for leaf in self._plan.leaves[: self._plan.n_target]:
            weights = (await leaf.batch_logw_next(contexts)).weights
            blocks.append(torch.as_tensor(weights).double())
        out: FloatArray = self._plan.target(blocks).cpu().numpy().copy()
        full = [len(text) >= self._plan.max_bytes for text in texts]
        out[full, :EOS_COLUMN] = -np.inf
        return out

    async def _add(self, text: bytes, parent: int, byte: int, row: FloatArray) -> None:
        """Note a text and its row."""
        i = len(self.texts)
        if i == len(self._weight):
            for name in ("_target", "_after", "_open", "_weight", "_value", "_best"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.empty_like(old)]))
        self.texts.append(text)
        self._parent.append(parent)
        self._target[i], self._after[i], self._weight[i] = row, 0.0, 0.0
        if parent >= 0:
            self._weight[i] = self._weight[parent] + self._target[parent, byte]
            lanes, place = self._lanes[parent]
            moved, _ = await lanes.gather(np.array([place])).step(np.array([byte]))
            assert isinstance(moved, AheadLanes)
            self._lanes.append((moved, 0))
            self._after[i] = (await guesses_after(moved, AS_IT_IS, len(text))).numpy()[0]
        self._after[i, EOS_COLUMN] = 0.0
        self._open[i] = row + self._after[i]
        self._open[i, EOS_COLUMN] = -np.inf
        self._best[i] = self._weight[i] + self._open[i].max()
        self._value[i] = np.logaddexp.reduce(row + self._after[i])
        if parent >= 0:
            self._after[parent, byte] = self._value[i]
            self._close(parent, byte)

    def _close(self, i: int, byte: int) -> None:
        """Note that what follows text i by a byte is known, and tell those above."""
        self._open[i, byte] = -np.inf
        self._best[i] = self._weight[i] + self._open[i].max()
        while i >= 0:
            self._value[i] = np.logaddexp.reduce(self._target[i] + self._after[i])
            above = self._parent[i]
            if above >= 0:
                self._after[above, self.texts[i][-1]] = self._value[i]
            i = above
