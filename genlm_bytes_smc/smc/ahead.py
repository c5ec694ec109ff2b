"""What a run needs of a look-ahead: a factor that values texts, as proposal and as twist.

A look-ahead gives every unfinished text x a positive number psi(x), a guess of the weight of
all that may follow it, and psi = 1 to ended texts. Then

- the *proposal* draws the next symbol b from a row proportional to target(b) psi(x b)^s, mixed
  with a small share of the target's own row so that nothing the target admits is left out;
- the *twist* multiplies a particle's weight by psi(x)^s until the next byte is read, so that
  resampling sees what is to come (twisted SMC: Whiteley & Lee 2014, Annals of Statistics
  42:115; Guarniero, Johansen & Lee 2017; for language models Zhao et al. 2024).

What a twist lends is taken back at the next step and an ended text has psi = 1, so the
factors telescope and the target of the run stays what it was, whatever psi is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from genlm_bytes_smc.smc.factors import Blocks, Combine, Factor


class AheadFactor(Factor):
    """A factor whose block is log psi(x b) - log psi(x), with the values themselves.

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
    async def start(self, target: Any, leaves: Sequence[Any], max_bytes: int) -> AheadFactor:
        """The factor of the empty text (D = 1), for a target and its leaves."""


class AheadLeaf:
    """A look-ahead among the leaves of a plan: bound to its target and length limit."""

    def __init__(self, ahead: Ahead, target: Any, leaves: Sequence[Any], max_bytes: int) -> None:
        self.ahead = ahead
        self.target = target
        self.leaves = tuple(leaves)
        self.max_bytes = max_bytes

    async def first_factor(self) -> AheadFactor:
        """At the empty text."""
        return await self.ahead.start(self.target, self.leaves, self.max_bytes)

    def __repr__(self) -> str:
        return repr(self.ahead)


def proposal_rows(target: Combine, at: int, ahead: Ahead) -> Combine:
    """The rows to draw from: target times psi^s, mixed with the target's own.

    Args:
        target: how blocks make the target's rows.
        at: which block is the look-ahead's.
        ahead: its strength and defensive share.
    """
    strength, share = ahead.strength, ahead.defensive

    def rows(blocks: Blocks) -> torch.Tensor:
        own = target(blocks)
        seen = own + strength * blocks[at].to(own.device)
        # A text with no future in sight: the share of psi is nothing, the target's all.
        seen, own = _normalised(seen), _normalised(own)
        lost = seen.isneginf().all(dim=1, keepdim=True)
        mixed = torch.logaddexp(seen + math.log1p(-share), own + math.log(share))
        return torch.where(lost, own, mixed)

    return rows


def _normalised(rows: torch.Tensor) -> torch.Tensor:
    total = torch.logsumexp(rows, dim=1, keepdim=True)
    return rows - torch.where(torch.isneginf(total), 0.0, total)
