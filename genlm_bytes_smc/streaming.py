"""The bytes of a completion, one by one as the model writes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import torch

from genlm_bytes_smc.beam.single import ByteBeamState, draw
from genlm_bytes_smc.beam.state import EOS_COLUMN


class NoCandidateError(ValueError):
    """A beam has no candidate left; random pruning together with a threshold can do that."""


class Completion:
    """Bytes after the text of a beam, drawn or the likeliest; to be iterated over once.

    completion = Completion(beam, steps=100, seed=1)
    async for byte in completion:
        ...

    Args:
        beam: what has read the text.
        steps: most bytes.
        seed: of the draws; None takes the likeliest byte each time.

    Attributes:
        ended: whether the model has ended the text.
        log_z: log of the prefix probability of all that was read so far, nats.
    """

    def __init__(self, beam: ByteBeamState, steps: int, seed: int | None = None) -> None:
        self._lanes = beam.lanes
        self._steps = steps
        self._rng = None if seed is None else np.random.default_rng(seed)
        self.ended = False
        self.log_z = beam.logZ

    async def __aiter__(self) -> AsyncIterator[int]:
        """Yield bytes until the model ends the text or `steps` have come.

        Raises:
            NoCandidateError: no candidate is left.
        """
        lanes = self._lanes.prune()
        self.log_z = float(lanes.log_z[0])
        for _ in range(self._steps):
            row = (await lanes.rows())[0]
            if not bool(torch.isfinite(row).any()):
                raise NoCandidateError(
                    "no candidate is left; try a wider beam or a lower threshold"
                )
            [symbol] = draw(row[None], self._rng)
            lanes = await lanes.step([symbol])
            self.log_z = float(lanes.log_z[0])
            if symbol == EOS_COLUMN:
                self.ended = True
                return
            yield symbol
            await asyncio.sleep(0)  # an interrupt is heard here
