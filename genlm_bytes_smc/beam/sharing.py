"""Objects that copies share: beams are values, and what they share is not for copying."""

from __future__ import annotations

from typing import NoReturn, Self

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.lm.engine import not_pickled


class Shared:
    """An object that a copy of what holds it holds, too; it cannot be pickled."""

    def __deepcopy__(self, memo: object) -> Self:
        """Return the object itself."""
        return self

    def __copy__(self) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise not_pickled()


class SharedLanes(Shared):
    """N beams, a value.

    Attributes:
        log_z: float64[N], see `ByteLanes`.
        ended: bool[N].
    """

    log_z: npt.NDArray[np.float64]
    ended: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of lanes, N."""
        return len(self.log_z)

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Lanes that can read on, bool[N]."""
        return (self.log_z > -np.inf) & ~self.ended
