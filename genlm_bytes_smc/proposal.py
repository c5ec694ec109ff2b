"""Token samplers for genlm-control in which one byte potential proposes for another.

Bytes are the alphabet that all models share, so the proposal may be a narrower beam, another
language model with another tokenizer, another prompt, or a product with a constraint; the
weights make up for the difference.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import torch
from genlm.control.potential.base import Potential
from genlm.control.sampler.token import AWRS, DirectTokenSampler
from genlm.control.util import draw_from

Draw = Callable[[Any], Any]


class ByteProposalSampler(DirectTokenSampler):  # type: ignore[misc]
    """Draws bytes from a proposal, properly weighted for a target.

    A byte x is drawn from the mixture

        m(x) = (1 - defensive) q(x) + defensive p(x)

    of the normalised rows q of the proposal and p of the target, and weighted by
    `target.logw_next[x] - log m(x)`. The share of the target keeps weights bounded by
    1 / defensive of the target's own and makes up for bytes the proposal cannot read, which
    a narrow beam has; the target's row is needed for the weight in any case. Where one of
    the rows is -inf throughout, the other is drawn from; where both are, the weight is -inf.

    Args:
        target: what samples are weighted for.
        proposal: what they are drawn from.
        defensive: share of the target in the mixture, in [0, 1). At 0 this is genlm-control's
            `DirectTokenSampler`, which is only right if the proposal has mass wherever the
            target has.
        autobatch: as in `DirectTokenSampler`.

    Raises:
        TypeError, ValueError: as `byte_sampler`.
    """

    def __init__(
        self,
        target: Potential,
        proposal: Potential,
        *,
        defensive: float = 0.05,
        autobatch: bool = True,
    ) -> None:
        check_bytes("target", target)
        check_bytes("proposal", proposal)
        if proposal.vocab_eos != target.vocab_eos:
            raise ValueError(
                f"target and proposal must have the same tokens, got {len(target.vocab)} and "
                f"{len(proposal.vocab)}; a coerced potential keeps all with prune=False"
            )
        if not 0 <= defensive < 1:
            raise ValueError(f"defensive must be in [0, 1), got {defensive!r}")
        super().__init__(target, proposal, autobatch=autobatch)
        self.defensive = defensive

    async def sample(
        self, context: list[bytes], draw: Draw | None = None
    ) -> tuple[Any, float, float]:
        """Draw a byte or EOS; return it, its log weight and its log probability (nats)."""
        proposed, wanted = await asyncio.gather(
            self.proposal.logw_next(context), self.potential.logw_next(context)
        )
        p = torch.as_tensor(wanted.weights).double()
        q = torch.as_tensor(proposed.weights, device=p.device).double()
        mixed = _mixture(q, p, self.defensive)
        if mixed is None:
            return self.target.eos, -math.inf, 0.0
        symbol, logw, logp = await draw_from(wanted.spawn(mixed), draw, target=wanted)
        return symbol, logw, logp


class ByteAWRS(AWRS):  # type: ignore[misc]
    """genlm-control's adaptive weighted rejection sampler, for rows that can be dead.

    A beam that can read nothing (a thinned one may, as part of being unbiased) has a row of
    -inf. `AWRS` fails on it with an `AssertionError` that ends the run; here the particle
    gets weight -inf.
    """

    async def _run_rejection(self, logws: Any, accept: Any, target_logws: Any = None) -> Any:
        if not bool((torch.as_tensor(logws.weights) > -torch.inf).any()):
            return self.target.eos, -math.inf, math.nan
        return await super()._run_rejection(logws, accept, target_logws)


def byte_sampler(
    target: Potential,
    proposal: Potential | None = None,
    *,
    defensive: float = 0.05,
    autobatch: bool = True,
) -> DirectTokenSampler:
    """Make a token sampler over bytes for genlm-control's `SMC`.

    Args:
        target: a potential over one-byte `bytes` tokens: a `ByteLLM`, a constraint of this
            package, a product of such.
        proposal: another one to draw from (`ByteProposalSampler`), or None to draw from the
            target's own rows (genlm-control's `DirectTokenSampler`).
        defensive: see `ByteProposalSampler`.
        autobatch: whether concurrent particles' calls are joined into one.

    Raises:
        TypeError: not a potential.
        ValueError: tokens that are not single bytes, different tokens in target and proposal,
            or `defensive` outside [0, 1).
    """
    if proposal is not None:
        return ByteProposalSampler(target, proposal, defensive=defensive, autobatch=autobatch)
    check_bytes("target", target)
    return DirectTokenSampler(target, autobatch=autobatch)


def _mixture(q: torch.Tensor, p: torch.Tensor, share: float) -> torch.Tensor | None:
    """Return log((1 - share) softmax(q) + share softmax(p)), float64[257]; None if both die."""
    q_total, p_total = torch.logsumexp(q, 0), torch.logsumexp(p, 0)
    q_alive, p_alive = bool(q_total > -torch.inf), bool(p_total > -torch.inf)
    if q_alive and p_alive and share > 0:
        return torch.logaddexp(q - q_total + math.log1p(-share), p - p_total + math.log(share))
    if q_alive:
        return q - q_total
    return p - p_total if p_alive and share > 0 else None


def check_bytes(role: str, potential: Potential) -> None:
    """Raise unless every token of a potential is one byte.

    Raises:
        TypeError: no potential. ValueError: other tokens.
    """
    if not isinstance(potential, Potential):
        raise TypeError(f"the {role} must be a Potential, got {type(potential).__name__}")
    odd = next((x for x in potential.vocab if not isinstance(x, bytes) or len(x) != 1), None)
    if odd is None:
        return
    hint = '; take it over bytes: potential.coerce(byte_llm, f=b"".join)'
    raise ValueError(
        f"the {role} {potential!r} must have one-byte `bytes` tokens, got {odd!r}"
        + (hint if isinstance(odd, int) else "")
    )
