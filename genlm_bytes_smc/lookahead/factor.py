"""A look-ahead as a factor of a run: many texts read at once, and their expected future mass."""

from __future__ import annotations

import numpy as np
import torch

from genlm_bytes_smc.alphabet import N_BYTES, N_SYMBOLS
from genlm_bytes_smc.constraints import ByteDFA, ByteWFSA
from genlm_bytes_smc.constraints.base import DEAD
from genlm_bytes_smc.lookahead.future_mass import Arcs, FutureTable
from genlm_bytes_smc.lookahead.ngram import ByteNgram
from genlm_bytes_smc.smc.resampling import IntArray
from genlm_bytes_smc.smc.weighers import AheadLanes


class Tracker:
    """Reads bytes into automaton states and n-gram contexts, and finds their pairs.

    Args:
        dfa: the deterministic part, or None.
        wfsa: the weighted part, or None; a text is then a distribution over its states.
        arcs: of the whole automaton; its states are those of `wfsa` times those of `dfa`.
        model: the byte model.
        outside: log psi, against the empty text's, of texts that left the automaton; None:
            they are impossible.
        device: where the table is.
    """

    def __init__(
        self,
        dfa: ByteDFA | None,
        wfsa: ByteWFSA | None,
        arcs: Arcs,
        model: ByteNgram,
        outside: float | None,
        device: torch.device,
    ) -> None:
        self.dfa = None if dfa is None else dfa.to(device)
        self.wfsa = None if wfsa is None else wfsa.to(device)
        self.width = len(model)
        self.after = torch.from_numpy(model.after.astype(np.int64)).to(device)
        self.start_context = model.start
        self.outside = outside
        self.device = device
        if wfsa is not None:
            source, byte, target, weight, _, _ = wfsa.pushed()
            self.source, self.byte, self.target, self.weight = (
                torch.from_numpy(x).to(device) for x in (source, byte, target, weight)
            )

    def spawn(self) -> Tracker:
        """Return a copy with a memory of its own."""
        new = object.__new__(Tracker)
        new.__dict__.update(self.__dict__)
        if new.wfsa is not None:
            new.wfsa = new.wfsa.spawn()
        return new

    @property
    def n_dfa(self) -> int:
        """States of the deterministic part (1 without one)."""
        return 1 if self.dfa is None else self.dfa.n_states

    def first(self) -> torch.Tensor:
        """Return where the empty text stands: state of each part and context, int64[1, 3]."""
        return torch.tensor([[0, 0, self.start_context]], device=self.device)

    def step(self, at: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """Read a byte a lane: int64[n, 3], int64[n] -> int64[n, 3]."""
        dfa, wfsa = at[:, 0], at[:, 1]
        if self.dfa is not None:
            dfa = self.dfa.step(dfa, symbols)
        if self.wfsa is not None:
            wfsa = self.wfsa.step(wfsa, symbols)
        return torch.stack([dfa, wfsa, self.after[at[:, 2], symbols]], dim=1)

    def now(self, at: torch.Tensor, table: FutureTable, left: int) -> torch.Tensor:
        """Return log psi of each text, float64[n]."""
        dfa, context = at[:, 0], at[:, 2]
        if self.wfsa is None:
            codes = torch.where(dfa == DEAD, -1, dfa * self.width + context)
            return table.look(codes, left)
        share = self.wfsa.forward(at[:, 1])
        state = torch.arange(share.shape[1], device=self.device) * self.n_dfa
        codes = (state + dfa[:, None]) * self.width + context[:, None]
        codes = torch.where(dfa[:, None] == DEAD, -1, codes)
        return torch.logsumexp(share + table.look(codes, left), 1)

    def next(self, at: torch.Tensor, table: FutureTable, left: int) -> torch.Tensor:
        """Return log psi after each byte, with `left` bytes left after it: float64[n, 256]."""
        byte = torch.arange(N_BYTES, device=self.device).expand(len(at), N_BYTES)
        dfa, context = at[:, :1].expand_as(byte), self.after[at[:, 2]]
        if self.dfa is not None:
            dfa = self.dfa.step(at[:, :1].expand_as(byte), byte)
        if self.wfsa is None:
            return table.look(torch.where(dfa == DEAD, -1, dfa * self.width + context), left)
        mass = self.wfsa.block(at[:, 1])[:, :N_BYTES]
        b = self.byte
        codes = (self.target * self.n_dfa + dfa[:, b]) * self.width + context[:, b]
        codes = torch.where(dfa[:, b] == DEAD, -1, codes)
        share = self.wfsa.forward(at[:, 1])[:, self.source]
        terms = share + self.weight + table.look(codes, left)
        top = terms.amax(1, keepdim=True)
        shift = torch.where(torch.isneginf(top), 0.0, top)
        total = torch.zeros_like(mass).index_add_(1, b, (terms - shift).exp())
        future = total.log() + shift
        return torch.where(torch.isneginf(mass), -torch.inf, future - mass)


class TableFactor(AheadLanes):
    """Expected future mass as a factor: what `Tracker` and `FutureTable` say of D texts.

    Args:
        tracker, table: see there.
        limit: most bytes of a text, or None.
        at: int64[D, 3], where the texts stand.
        age: how many bytes they have read.
        value: float64[D], log psi of each.
        base: log psi of the empty text.
    """

    def __init__(
        self,
        tracker: Tracker,
        table: FutureTable,
        limit: int | None,
        at: torch.Tensor,
        age: int,
        value: torch.Tensor,
        base: float,
    ) -> None:
        self.tracker = tracker
        self.table = table
        self.limit = limit
        self.at = at
        self.age = age
        self.value = value
        self.base = base
        self._block: torch.Tensor | None = None

    @classmethod
    def first(cls, tracker: Tracker, table: FutureTable, limit: int | None) -> TableFactor:
        """Return the factor at the empty text."""
        at = tracker.first()
        value = tracker.now(at, table, limit or 0)
        return cls(tracker, table, limit, at, 0, value, float(value[0]))

    def _left(self, age: int) -> int:
        """Return how many bytes are left after `age`; 0 without a limit (one row for all)."""
        return max(0, self.limit - age) if self.limit is not None else 0

    async def rows(self) -> torch.Tensor:
        """log psi(x b) - log psi(x), and 0 - log psi(x) for the end: float64[D, 257]."""
        if self._block is None:
            following = self.tracker.next(self.at, self.table, self._left(self.age + 1))
            ended = following.new_zeros((len(following), N_SYMBOLS - N_BYTES))
            self._block = torch.cat([self._floored(following), ended], dim=1)
            lost = torch.isneginf(self.value)[:, None]
            self._block = self._block - torch.where(lost, 0.0, self.value[:, None])
        return self._block

    async def step(self, symbols: IntArray) -> tuple[TableFactor, None]:
        """See `Lanes`."""
        at = self.tracker.step(self.at, torch.from_numpy(symbols).to(self.at.device))
        age = self.age + 1
        value = self._floored(self.tracker.now(at, self.table, self._left(age)))
        if self.tracker.wfsa is not None and age % 64 == 0:
            self.tracker.wfsa.keep([at[:, 1]])
        after = TableFactor(self.tracker, self.table, self.limit, at, age, value, self.base)
        return after, None

    def gather(self, lanes: IntArray) -> TableFactor:
        """See `Lanes`."""
        where = torch.from_numpy(lanes).to(self.at.device)
        at, value = self.at[where], self.value[where]
        return TableFactor(self.tracker, self.table, self.limit, at, self.age, value, self.base)

    def _floored(self, psi: torch.Tensor) -> torch.Tensor:
        if self.tracker.outside is None:
            return psi
        return torch.where(torch.isneginf(psi), self.base + self.tracker.outside, psi)
