"""A draft model: a small model proposes blocks of bytes, the target's models read them whole.

For a target LM(x) c(x) with cheap other factors c, and a draft D, particles draw bytes from the
rows of D c and are weighed by c over what they were drawn by. Where a block ends, the weight is
multiplied by LM.prefix(x) as a twist, which the next block takes back, and a text that has ended
keeps LM.complete(x). The weights telescope to LM(x) c(x) / q(x), whatever D is, so D is nothing
but a proposal; and as nothing is resampled inside a block, nobody needs the rows of LM there.

Speculative decoding (Leviathan, Kalman & Matias 2023, arXiv:2211.17192) accepts or rejects what a
draft proposes; here it is weighed.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from genlm_bytes_smc.checks import check_count
from genlm_bytes_smc.constraints.base import times
from genlm_bytes_smc.smc.critics import Critic
from genlm_bytes_smc.smc.factors import (
    check_alphabet,
    factors_of,
    has_language_model,
    name_of,
    random_beams,
)
from genlm_bytes_smc.smc.particles import BoolArray, Particles


class Judge(Critic):
    """The target's language models, which weigh a text where a block of it ends.

    Unlike what another critic says of it, a text that `terminate_when` has ended keeps its weight
    as a prefix: nothing said that it is over but the caller.
    """

    def _whole(self, particles: Particles) -> BoolArray:
        """See `Critic`: the texts whose end was drawn."""
        out: BoolArray = particles.symbols_read(self.stops) > particles.length
        return out


def split(target: Any, draft: Any) -> tuple[Any, Any, Any]:
    """Return what weighs bytes, what proposes them, and what weighs blocks.

    Args:
        target: the target.
        draft: stands for its factors that hold language models.

    Returns:
        The target's other factors over the support of the draft, the same times the draft, and
        the product of the factors that hold language models.
    """
    factors = list(factors_of(target))
    models = [f for f in factors if has_language_model(f)]
    others = [f for f in factors if not has_language_model(f)]
    return reduce(times, others, draft**0.0), reduce(times, others, draft), reduce(times, models)


def check_draft(
    target: Any, draft: Any, block: Any, proposal: Any, twist: Any, tempering: Any
) -> None:
    """Check the arguments of `smc` that go with a draft.

    Raises:
        TypeError, ValueError: no potential over bytes, no number of bytes, another proposal or
            twist beside it, or random beams in the target.
    """
    check_alphabet(draft)
    check_count("block", block, 1)
    for name, value in (("proposal", proposal), ("twist", twist), ("tempering", tempering)):
        if value is not None:
            raise ValueError(f"draft= proposes and weighs block by block, so {name}= has no place")
    if random_beams([target]):
        raise ValueError(
            "a target that reads whole texts has one beam a text in all runs, so with draft= none "
            f'may be random (prune="unbiased"), got {name_of(target)}'
        )
