"""Ensembles of byte potentials: power means of their weights, and proxy tuning.

The target of an ensemble is a function f of the members' weights of a text, f(p_1(x), .., p_k(x)),
as in Chan et al. 2026, "Ensembling Language Models with Sequential Monte Carlo". A product of
next-byte rows is another distribution than the product of text weights once rows are normalised;
here everything is a function of the weights of whole texts and whole prefixes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from genlm.control.potential.base import Potential

from genlm_bytes_smc.alphabet import BYTES, BytePotential, contexts_of
from genlm_bytes_smc.beam.state import BoolArray, FloatArray

Mean = Callable[[torch.Tensor], torch.Tensor]

_ORDERS = {"sum": 1.0, "prod": 0.0, "harmonic": -1.0, "min": -math.inf, "max": math.inf}


def log_power_mean(logs: torch.Tensor, shares: torch.Tensor, order: float) -> torch.Tensor:
    """Return log M_r of the weights exp(logs): (sum_i w_i p_i^r)^(1/r), exact also near r = 0.

    A weight of zero makes the mean zero for r <= 0, which is the limit.

    Args:
        logs: float64[k, ...], log weights, nats; -inf is a weight of zero.
        shares: float64[k], w: positive, of sum one.
        order: r; 0 is the geometric mean, inf the largest, -inf the smallest weight.
    """
    top = logs.amax(0)
    if order == math.inf:
        return top
    if order == -math.inf:
        return logs.amin(0)
    w = shares.to(logs.device).view(-1, *[1] * (logs.ndim - 1))
    if order == 0:
        return (w * logs).sum(0)
    # log(sum w p^r) / r = c + log1p(sum w expm1(r (log p - c))) / r, which keeps its digits as
    # r -> 0; the pivot c makes every exponent at most zero
    pivot = top if order > 0 else logs.amin(0)
    shift = torch.where(torch.isneginf(pivot), 0.0, pivot)
    terms = w * torch.expm1((logs - shift) * order)
    mean = shift + torch.log1p(terms.sum(0).clamp_(min=-1.0)) / order
    return torch.where(torch.isneginf(pivot), -torch.inf, mean)


class PowerMean(BytePotential):
    """The power mean of the weights of potentials over bytes: an ensemble.

    For members p_i and shares w_i of sum one

        prefix(x) = log f(p_1(x), .., p_k(x)),   f(p) = (sum_i w_i p_i^r)^(1/r),

    with the members' prefix weights, and `complete(x)` the same of their weights of whole texts.
    r = 1 is the mixture: draw a member, then a text of it. r = 0 is the geometric mean, r = -1 the
    harmonic one; the smaller r, the more the members must agree. A text of weight zero under any
    member has weight zero for r <= 0. For r <= 1 next-byte rows sum to at most one if those of
    the members do.

    `smc` computes it beside its other factors, one forward a model a byte; every sampler of
    genlm-control takes it as any other potential. Members may have different tokenizers, be
    products with constraints, powers, or ensembles.

    With `prune="unbiased"` members, only the mixture is unbiased for the exact models: any other
    mean of estimates is that of the estimates.

    Args:
        members: at least one potential over single bytes.
        order: r, any number, `math.inf` (largest weight) or `-math.inf` (smallest); or a name of
            genlm-control's `Ensemble`: "sum", "prod", "harmonic", "min", "max" (its "min" and
            "max" with unequal shares are other functions).
        weights: w, one a member, at least zero; scaled to sum one (None: equal). A member of
            weight zero is left out.

    Attributes:
        members: those of positive weight.
        order: r.
        weights: float64[k], their shares.

    Raises:
        TypeError: a member is no potential, or a number no number.
        ValueError: no member, a member over other tokens, an unknown order or bad weights.
    """

    def __init__(
        self,
        members: Sequence[Any],
        order: float | str = 1.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.order = _order(order)
        given = [_member(m) for m in members]
        shares = _shares(weights, len(given))
        self.members = tuple(m for m, w in zip(given, shares, strict=True) if w > 0)
        self.weights: FloatArray = shares[shares > 0]

    def mean(self, logs: torch.Tensor) -> torch.Tensor:
        """Return log f of log weights float64[k, ...], one for each of `members`; nats."""
        return log_power_mean(logs, torch.from_numpy(self.weights), self.order)

    async def weights_of(self, texts: Sequence[bytes], *, complete: bool = False) -> FloatArray:
        """See `BytePotential`."""
        asked = "batch_complete" if complete else "batch_prefix"
        return np.asarray(self.mean(await self._of_members(asked, contexts_of(texts))))

    async def rows_of(self, texts: Sequence[bytes]) -> tuple[torch.Tensor, BoolArray]:
        """See `BytePotential`; rows are where those of the members are."""
        contexts = contexts_of(texts)
        before = await self._of_members("batch_prefix", contexts)
        rows = await asyncio.gather(
            *(_rows(m, contexts, w) for m, w in zip(self.members, before, strict=True))
        )
        device = next((r.device for r in rows if r.device.type != "cpu"), rows[0].device)
        after = torch.stack([r.to(device) for r in rows]) + before.to(device)[:, :, None]
        possible = np.asarray(self.mean(before) > -torch.inf)
        return next_rows(self.mean, before.to(device), after), possible

    async def _of_members(self, asked: str, texts: list[list[bytes]]) -> torch.Tensor:
        """Return what a method of the members says of N texts, float64[k, N] on the host."""
        found = await asyncio.gather(*(getattr(m, asked)(texts) for m in self.members))
        return torch.stack([torch.as_tensor(w).double().cpu() for w in found])

    def spawn(self) -> PowerMean:
        """Return the same ensemble of spawned members."""
        return PowerMean([m.spawn() for m in self.members], self.order, list(self.weights))

    def __repr__(self) -> str:
        shares = ", ".join(f"{w:.3g}" for w in self.weights)
        members = ", ".join(map(repr, self.members))
        return f"PowerMean([{members}], order={self.order:g}, weights=[{shares}])"


def power_mean(
    members: Sequence[Any], order: float | str = 1.0, weights: Sequence[float] | None = None
) -> PowerMean:
    """Return the power mean of the weights of potentials; see `PowerMean`."""
    return PowerMean(members, order, weights)


def mixture(members: Sequence[Any], weights: Sequence[float] | None = None) -> PowerMean:
    """Return the mixture of potentials: their mean weight (`PowerMean` of order 1)."""
    return PowerMean(members, 1.0, weights)


def proxy_tuning(base: Any, tuned: Any, untuned: Any, alpha: float = 1.0) -> Any:
    """Return base * (tuned / untuned)^alpha, a large model steered by a small tuned one.

    Liu et al. 2024, "Tuning Language Models by Proxy" (arXiv:2401.08565), on the weights of texts
    instead of normalised rows. A text of weight zero under `untuned` has weight zero here: a
    negative power of zero counts as zero, as in every `p ** beta` of genlm-control. Where the
    ratio is large, weights vary much: look at `SMCResult.ess_path`.

    Args:
        base, tuned, untuned: potentials over bytes, of any tokenizers.
        alpha: how far to steer; 0 is `base` itself.
    """
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise TypeError(f"alpha must be a finite number, got {alpha!r}")
    return base if alpha == 0 else base * tuned**alpha * untuned**-alpha


def next_rows(mean: Mean, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return log f (`mean`) of the weights of the next texts minus log f of those so far.

    Args:
        before: float64[k, N], members' prefix weights, nats.
        after: float64[k, N, 257], their weights with one symbol more.

    Returns:
        float64[N, 257]; a row of -inf where the text so far has weight zero.
    """
    now = mean(before)
    lost = torch.isneginf(now)
    rows = mean(after) - torch.where(lost, 0.0, now)[:, None]
    return rows.masked_fill(lost[:, None], -torch.inf)


async def _rows(member: Any, texts: list[list[bytes]], before: torch.Tensor) -> torch.Tensor:
    """Return next-symbol rows of a member, float64[N, 257]; -inf where it gives the text none."""
    alive = torch.nonzero(~torch.isneginf(before))[:, 0]
    if not len(alive):
        return torch.full((len(texts), len(BYTES) + 1), -torch.inf, dtype=torch.float64)
    lazy = await member.batch_logw_next([texts[i] for i in alive.tolist()])
    found = torch.as_tensor(lazy.weights).double()
    if member.vocab != BYTES:  # its columns in another order
        order = [member.lookup[token] for token in BYTES] + [len(BYTES)]
        found = found[:, order]
    if len(alive) == len(texts):
        return found
    rows = found.new_full((len(texts), found.shape[1]), -torch.inf)
    rows[alive.to(rows.device)] = found
    return rows


def _order(order: Any) -> float:
    """Return the order that a number or a name means."""
    if isinstance(order, str) and order in _ORDERS:
        return _ORDERS[order]
    number = isinstance(order, Real) and not isinstance(order, bool)
    if number and not math.isnan(order):
        return float(order)
    kind = ValueError if number or isinstance(order, str) else TypeError
    raise kind(f"order must be a number or one of {', '.join(_ORDERS)}, got {order!r}")


def _member(member: Any) -> Any:
    """Return a member of an ensemble as it is; see `PowerMean` for what is refused."""
    if not isinstance(member, Potential):
        raise TypeError(
            f"members must be genlm-control Potentials over bytes, got {type(member).__name__}"
        )
    if member.vocab is not BYTES and set(member.vocab) != set(BYTES):
        raise ValueError(
            f"members must be over the 256 single bytes, got {len(member.vocab)} tokens such as "
            f"{member.vocab[0]!r}; coerce it: potential.coerce(byte_llm, f=b''.join)"
        )
    return member


def _shares(weights: Any, n: int) -> FloatArray:
    """Return weights scaled to sum one, float64[n]; see `PowerMean` for what is refused."""
    if n == 0:
        raise ValueError("an ensemble needs at least one member, got none")
    given = np.ones(n) if weights is None else np.asarray(list(weights), dtype=np.float64)
    if given.shape != (n,) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise ValueError(
            f"weights must be {n} finite numbers of at least zero, not all zero, got {weights!r}"
        )
    return np.asarray(given / given.sum())
