"""Deterministic byte automata on the device: a lane is one integer, a step is one gather."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.alphabet import N_BYTES
from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.automata.nfa import combine
from genlm_bytes_smc.constraints.automata.table import MAX_STATES, Table, minimal, too_large
from genlm_bytes_smc.constraints.base import (
    DEAD,
    BoolArray,
    ByteConstraint,
    ConstraintError,
    log_of,
)


class ByteDFA(ByteConstraint):
    """The texts that a deterministic automaton accepts have weight 1 (log 0), others 0.

    The automaton is trimmed and minimised when it is made, so a prefix has log weight 0
    exactly when some accepted text begins with it. The states a lane can be in are
    0..`n_states`-1, and -1 once it has left the language.

    Args:
        table: int[S, 256], the state after each byte, or -1 for none. State 0 is the start.
        accept: bool[S], where a text may end.
        device: where the table lives and weights are returned (None: the CPU).
        max_states: refuse an automaton with more minimal states than this.

    Attributes:
        table: int32[n_states, 256] on the device, minimal.
        accept: bool[n_states] on the device.

    Raises:
        ConstraintError: wrong shapes, targets that are no states, or an empty language.
    """

    def __init__(
        self,
        table: npt.ArrayLike,
        accept: npt.ArrayLike,
        *,
        device: torch.device | str | None = None,
        max_states: int = MAX_STATES,
    ) -> None:
        check_count("max_states", max_states, 1)
        automaton = minimal(_checked(np.asarray(table), np.asarray(accept)))
        if len(automaton) > max_states:
            raise too_large(max_states)
        self._adopt(automaton, device)

    def _adopt(self, automaton: Table, device: torch.device | str | None) -> None:
        """Become this automaton, which is minimal and over bytes."""
        ByteConstraint.__init__(self, device)
        # The last row is the dead state's: indexing with -1 reads it.
        table = np.append(automaton.next, np.full((1, N_BYTES), DEAD, np.int32), axis=0)
        self._table = torch.from_numpy(table).to(self.device)
        self._accept = torch.from_numpy(np.append(automaton.accept, False)).to(self.device)

    @classmethod
    def _of(cls, automaton: Table, device: torch.device | str | None) -> ByteDFA:
        new = ByteDFA.__new__(ByteDFA)
        new._adopt(automaton, device)
        return new

    @property
    def table(self) -> torch.Tensor:
        """The state after each byte, int32[n_states, 256], -1 where there is none."""
        return self._table[:-1]

    @property
    def accept(self) -> torch.Tensor:
        """Mask of the states in which a text may end, bool[n_states]."""
        return self._accept[:-1]

    @property
    def n_states(self) -> int:
        """Number of states of the minimal automaton, the dead one not counted."""
        return len(self._table) - 1

    def block(self, state: torch.Tensor) -> torch.Tensor:
        """Log weights of next byte and EOS, 0 or -inf: int64[n] -> float64[n, 257]."""
        out = self.alloc_rows(len(state))
        out[:, :N_BYTES].masked_fill_(self._table[state] >= 0, 0.0)
        out[:, N_BYTES].masked_fill_(self._accept[state], 0.0)
        return out

    def step(self, state: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
        """Read one byte a lane: int64[n], int64[n] -> int64[n]."""
        return self._table[state, symbols].long()

    def log_complete(self, state: torch.Tensor) -> torch.Tensor:
        """0 where the text may end and -inf elsewhere: int64[n] -> float64[n]."""
        return log_of(self._accept[state])

    def host_table(self) -> Table:
        """Return the automaton as numpy arrays on the host."""
        return Table(self.table.cpu().numpy(), self.accept.cpu().numpy())

    def __and__(self, other: ByteDFA) -> ByteDFA:
        """Return the texts that both accept, as one minimal automaton on this one's device."""
        return self._combine(other, np.logical_and)

    def __or__(self, other: ByteDFA) -> ByteDFA:
        """Return the texts that either accepts, as one minimal automaton on this one's device."""
        return self._combine(other, np.logical_or)

    def __sub__(self, other: ByteDFA) -> ByteDFA:
        """Return the texts that this one accepts and the other does not."""
        return self._combine(other, lambda a, b: a & ~b)

    def _combine(
        self, other: ByteDFA, accept: Callable[[BoolArray, BoolArray], BoolArray]
    ) -> ByteDFA:
        if not isinstance(other, ByteDFA):
            return NotImplemented
        table = combine(self.host_table(), other.host_table(), accept, MAX_STATES)
        return ByteDFA._of(table, self.device)

    def _facts(self) -> dict[str, str]:
        return {"states": str(self.n_states)}


def _checked(table: npt.NDArray[np.generic], accept: npt.NDArray[np.generic]) -> Table:
    if table.ndim != 2 or table.shape[1] != N_BYTES or table.dtype.kind not in "iu":
        raise ConstraintError(
            f"table must be integers of shape [states, {N_BYTES}], "
            f"got {table.dtype} of shape {list(table.shape)}"
        )
    if accept.shape != (len(table),) or accept.dtype != np.bool_:
        raise ConstraintError(
            f"accept must be bool of shape [{len(table)}], one entry for each row of table, "
            f"got {accept.dtype} of shape {list(accept.shape)}"
        )
    if not len(table):
        raise ConstraintError("table must have at least one state, got none")
    low, high = int(table.min()), int(table.max())
    if low < DEAD or high >= len(table):
        raise ConstraintError(
            f"the targets in table must be -1 (none) or states 0..{len(table) - 1}, "
            f"got values from {low} to {high}"
        )
    return Table(table.astype(np.int32), accept.astype(np.bool_))
