"""Which token-ending extensions of a state are admitted, on the host: by a threshold, at random.

Compiled steps do the same in `pruning_numba`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam.rng import THIN, KeyArray, uniforms
from genlm_bytes_smc.beam.state import Extensions

FloatArray = npt.NDArray[np.float64]

GUESS = 0.03  # probability of a byte that an extension is taken to give, at least


def keep_above(
    ext: Extensions, base: FloatArray, log_threshold: float, *, within: bool = False
) -> Extensions:
    """Extensions above the threshold of base + all extensions of their lane.

    A threshold never drops the heaviest part of a lane: where no extension is above it, the
    heaviest one is kept if it weighs more than what is left without extensions.

    Args:
        ext: all extensions.
        base: float64[N] log weight that counts beside the extensions, nats.
        log_threshold: nats.
        within: whether `base` holds the weight of the extensions, too.
    """
    keep, dropped = pn.keep_extensions(ext.lane, ext.logw, base, log_threshold, within)
    ext = ext if keep.all() else ext.take(keep)
    return ext._replace(dropped=np.logaddexp(ext.dropped, dropped))


def thin(ext: Extensions, log_z: FloatArray, log_threshold: float, keys: KeyArray) -> Extensions:
    """Extensions thinned at random below the threshold's share of `log_z`, unbiased."""
    if log_threshold == -np.inf or len(ext.lane) == 0:
        return ext
    none = np.zeros(len(ext.lane), dtype=bool)
    u = uniforms(keys, THIN)
    keep, logw = pn.thin_extensions(none, ext.lane, ext.logw, log_z, log_threshold, u)
    return ext._replace(logw=logw).take(keep)
