"""Which candidates of each lane are kept, on torch tensors, all lanes at once, no sync."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Kept(NamedTuple):
    """What a pruning keeps, best first.

    Attributes:
        pick: int64[N, K], which candidates.
        logw: float64[N, K], their weights, nats; -inf for none.
        dropped: float64[N], log of the mass that is gone, nats.
    """

    pick: torch.Tensor
    logw: torch.Tensor
    dropped: torch.Tensor


def keep_largest(logw: torch.Tensor, most: int, log_threshold: float) -> Kept:
    """Keep the `most` largest weights float64[N, C] above the threshold's share of their lane; the
    largest in any case."""
    ranked, order = torch.sort(logw, dim=1, descending=True, stable=True)
    total = torch.logsumexp(ranked, dim=1, keepdim=True)
    share = ranked - total  # NaN in an empty lane, where nothing compares with it
    keep = share > log_threshold
    keep[:, :1] = True
    keep[:, most:] = False
    lost = torch.where(keep, 0.0, share.exp()).sum(dim=1)
    dropped = torch.where(lost > 0, total[:, 0] + lost.log(), -torch.inf)
    weight = torch.where(keep, ranked, -torch.inf)
    return Kept(order[:, :most], weight[:, :most], dropped)


def keep_unbiased(logw: torch.Tensor, most: int, u: torch.Tensor, device: torch.device) -> Kept:
    """`most` of weights float64[N, C] on `device`, by optimal resampling with uniforms `u` [N].

    (Fearnhead & Clifford 2003, section 3.)
    """
    width = logw.shape[1]
    nothing = torch.full((len(logw),), -torch.inf, dtype=torch.float64, device=device)
    ranked, order = torch.sort(logw, dim=1, descending=True, stable=True)
    if most == width:
        return Kept(order, ranked, nothing)
    count = (ranked > -torch.inf).sum(dim=1, keepdim=True)
    top = torch.where(count > 0, ranked[:, :1], 0.0)
    logp = ranked - top
    # With the `big` largest kept, c = (sum of the others) / (K - big); raise `big` until
    # the next one is below c. In logs, so that no sum of small weights comes out as zero.
    place = torch.arange(most, device=device)
    log_left = (most - place).double().log()
    rest = logp.flip(1).logcumsumexp(1).flip(1)[:, :most] - log_left
    above = logp[:, : most - 1] >= rest[:, : most - 1]
    big = above.long().cumprod(1).sum(dim=1, keepdim=True)
    log_c = rest.gather(1, big)
    # K - big survivors of the others: the ones in which the running sum of p / c passes
    # u, u + 1, u + 2 and so on.
    small = torch.arange(width, device=device) >= big
    run = torch.where(small, (logp - log_c).exp(), 0.0).cumsum(1)
    drawn = torch.searchsorted(run, u[:, None] + (place - big), right=True)
    drawn = torch.minimum(drawn, (count - 1).clamp(min=0))
    as_is = (count <= most) | (place < big)
    pick = torch.where(as_is, place, drawn)
    weight = torch.where(as_is, ranked[:, :most], top + log_c)
    return Kept(order.gather(1, pick), weight, nothing)
