"""Counter-based random numbers: a key per byte string, numbers as functions of the key.

The randomness of an unbiased beam must be fresh at each (string, step) and come back the
same when the beam is computed again. So each lane carries a 64-bit key, a hash of the seed
and of the bytes read, and draws by hashing the key with the number of the draw. The mixer
is the finaliser of SplitMix64 (Steele, Lea & Flood 2014, OOPSLA).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

KeyArray = npt.NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
M1 = np.uint64(0xBF58476D1CE4E5B9)
M2 = np.uint64(0x94D049BB133111EB)
_R30, _R27, _R31 = (np.uint64(n) for n in (30, 27, 31))

PRUNE, THIN = 0, 1  # the draws of one step


def mix(x: KeyArray) -> KeyArray:
    """SplitMix64's bijective mixer, elementwise over uint64; `pruning_numba` compiles it, too."""
    x = (x ^ (x >> _R30)) * M1
    x = (x ^ (x >> _R27)) * M2
    return x ^ (x >> _R31)


def start_keys(seeds: KeyArray) -> KeyArray:
    """Keys uint64[N] of lanes that have read nothing, from their seeds."""
    return mix(seeds + GOLDEN)


def lane_keys(seed: int, n: int, lane_seeds: Sequence[int] | None) -> KeyArray:
    """Return the keys uint64[n] of lanes that have read nothing.

    Args:
        seed: of all lanes.
        n: their number.
        lane_seeds: one further seed a lane, for independent beams; or None.

    Raises:
        ValueError: not n `lane_seeds`.
    """
    seeds = np.full(n, seed, dtype=np.uint64)
    if lane_seeds is not None:
        if len(lane_seeds) != n:
            raise ValueError(f"lane_seeds must hold {n} numbers, got {len(lane_seeds)}")
        seeds = start_keys(seeds) ^ np.asarray(lane_seeds, dtype=np.uint64)
    return start_keys(seeds)


def read_keys(keys: KeyArray, symbols: npt.NDArray[np.int64]) -> KeyArray:
    """Keys after one more symbol (0..256) a lane."""
    return mix(keys + GOLDEN * (symbols + 2).astype(np.uint64))


def salt(draw: int) -> np.uint64:
    """Return the number that a key is combined with for a draw."""
    return np.uint64(mix(np.full(1, draw + 1, dtype=np.uint64) * GOLDEN)[0])
