"""Rows of a model that are computed once, kept on disk, and counted whenever they are asked for."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.lm.contexts import IntArray


class KeptRows:
    """Makes an engine on a CPU keep its rows, so that many settings can be compared quickly.

    Args:
        llm: an engine; its `evaluate` is replaced. Its counts stay what they would be.
    """

    def __init__(self, llm: Any) -> None:
        self._llm, self._compute = llm, llm.evaluate
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the engine
        self._place: dict[tuple[int, ...], int] = {}
        llm.evaluate = self._evaluate

    def _evaluate(self, nodes: IntArray) -> torch.Tensor:
        contexts = [tuple(self._llm.tree.tokens(int(n))) for n in nodes]
        new = [i for i, context in enumerate(contexts) if context not in self._place]
        if new:
            rows = self._compute(nodes[new]).float().numpy()
            for i, row in zip(new, rows, strict=True):
                self._file.seek(len(self._place) * row.nbytes)
                self._file.write(row.tobytes())
                self._place[contexts[i]] = len(self._place)
        self._llm.counts.rows += len(contexts) - len(new)
        self._llm.counts.forwards += not new
        return torch.from_numpy(np.stack([self._read(c) for c in contexts]))

    def _read(self, context: tuple[int, ...]) -> np.ndarray[Any, Any]:
        self._file.seek(self._place[context] * self._llm.width * 4)
        return np.fromfile(self._file, dtype=np.float32, count=self._llm.width)
