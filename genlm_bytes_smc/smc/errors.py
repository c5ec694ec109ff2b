"""What can go wrong while particles run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genlm_bytes_smc.smc.result import SMCResult
    from genlm_bytes_smc.smc.state import SMCState


class BadWeightError(ValueError):
    """A factor, proposal or critic gave NaN or +inf where a log weight is due."""


class AllParticlesDeadError(RuntimeError):
    """Every particle has weight zero: nothing is left to go on with.

    As an estimate of the marginal likelihood such a run counts as zero (`smc_repeat` counts
    it so).

    Attributes:
        byte: which byte of the text the last particles died at, counted from 0.
        causes: for each factor, how many particles it killed there.
        state: the particles as they died; `on_step` and `smc_steps` saw those before.
        result: the same as a result: texts, weights (all -inf) and history.
    """

    def __init__(self, message: str, byte: int, causes: Mapping[str, int], state: SMCState):
        super().__init__(message)
        self.byte = byte
        self.causes = dict(causes)
        self.state = state

    @property
    def result(self) -> SMCResult:
        """The run up to its death."""
        from genlm_bytes_smc.smc.result import SMCResult

        return SMCResult(self.state)


class RunFailedError(RuntimeError):
    """A run broke off because something under it failed: an engine that died, memory that ran out.

    The failure itself is the cause (`__cause__`).

    Attributes:
        state: the particles after the last whole step; with a model that works again,
            `smc(..., resume=error.state)` goes on as if nothing had happened. None if not
            even the first step was reached.
        states: of `smc_many` and `smc_repeat`: the same of every run, in their order.
    """

    def __init__(self, message: str, state: SMCState | None):
        super().__init__(message)
        self.state = state
        self.states: list[SMCState | None] = [state]

    @property
    def result(self) -> SMCResult | None:
        """The run so far."""
        from genlm_bytes_smc.smc.result import SMCResult

        return None if self.state is None else SMCResult(self.state)
