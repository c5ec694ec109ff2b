"""Objects that copies share: beams are values, and what they share is not for copying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Self

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
        model, in_prompt: shared by all lanes.
    """

    model: Any
    in_prompt: Any
    log_z: npt.NDArray[np.float64]
    ended: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of lanes, N."""
        return len(self.log_z)

    def check_like(self, lanes: Sequence[Any]) -> None:
        """Raise unless all of these lanes can stand beside these.

        Raises:
            ValueError: lanes of another model, or in another mode.
        """
        if any(x.model is not self.model or x.in_prompt != self.in_prompt for x in lanes):
            raise ValueError("only lanes of one model, in one mode, can be put side by side")

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Lanes that can read on, bool[N]."""
        return (self.log_z > -np.inf) & ~self.ended
