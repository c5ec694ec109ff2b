"""A run as genlm-control's viewer reads it (`sampler/smc_record.py`, `html/smc.html`).

One entry a step. A particle of an entry comes from the particle of the same number in the
entry before, or, if that step was followed by a resampling ("mode": "resample"), from its
ancestor; `contents_incr` is what it added to that one's text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from genlm.control.constant import EOS
from genlm.control.util import escape

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES
from genlm_bytes_smc.smc.state import NO_SYMBOL, SMCState

_SHOWN = {
    NO_SYMBOL: "",
    EOS_COLUMN: escape(EOS),
    **{b: escape(bytes([b])).replace("|", "\\x7c") for b in range(N_BYTES)},
}


def viewer_record(state: SMCState) -> list[dict[str, Any]]:
    """The entries of the record.

    Raises:
        ValueError: a step without symbols.
    """
    before = np.full(len(state.particles.length), state.start)
    out: list[dict[str, Any]] = []
    ancestors = None
    for number, info in enumerate(state.history, start=1):
        if info.symbols is None or info.log_weights is None:
            raise ValueError(
                "only a run with record=True from its first step can be written for the viewer"
            )
        entry: dict[str, Any] = {"step": number, "mode": "smc_step" if out else "init"}
        if ancestors is not None:
            entry |= {"mode": "resample", "ancestors": ancestors.tolist()}
            # as genlm-control has it: the increment is against the ancestor's own weight
            before = before[ancestors]
        rows = zip(info.symbols.tolist(), info.log_weights.tolist(), before.tolist(), strict=True)
        entry["particles"] = [
            {
                "contents_incr": _SHOWN[symbol],
                "logweight": _number(weight),
                "weight_incr": _number(weight - last if weight > -np.inf else -np.inf),
            }
            for symbol, weight, last in rows
        ]
        out.append(entry)
        before, ancestors = info.log_weights, info.ancestors
    return out


def _number(x: float) -> str:
    return "-Infinity" if x == -np.inf else str(x)
