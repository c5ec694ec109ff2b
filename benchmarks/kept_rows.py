"""Rows of a model that are computed once, kept on disk, and counted whenever they are asked for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.lm.contexts import IntArray


class KeptRows:
    """Makes an engine on a CPU keep its rows, so that many settings can be compared quickly.

    Args:
        llm: an engine; its `evaluate` is replaced. Its counts stay what they would be.
        path: a file that outlives the process, for the same model; beside it is a list of its
            contexts. None: a temporary one.
    """

    def __init__(self, llm: Any, path: Path | None = None) -> None:
        self._llm, self._compute = llm, llm.evaluate
        self._file: Any
        self._place: dict[tuple[int, ...], int] = {}
        self._list: Any = None
        if path is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the engine
        else:
            path.touch()
            self._file = path.open("r+b")
            self._list = path.with_suffix(".contexts").open("a+")
            self._list.seek(0)
            for line in self._list:
                self._place[tuple(map(int, line.split()))] = len(self._place)
        llm.evaluate = self._evaluate

    def clear(self) -> None:
        """Forget all rows of a temporary file."""
        self._place.clear()
        self._file.truncate(0)

    def close(self) -> None:
        """Give the engine back its own `evaluate`."""
        self._file.close()
        self._llm.evaluate = self._compute

    def _evaluate(self, nodes: IntArray) -> torch.Tensor:
        contexts = [tuple(self._llm.tree.tokens(int(n))) for n in nodes]
        new = [i for i, context in enumerate(contexts) if context not in self._place]
        if new:
            rows = self._compute(nodes[new]).float().numpy()
            for i, row in zip(new, rows, strict=True):
                self._file.seek(len(self._place) * row.nbytes)
                self._file.write(row.tobytes())
                self._place[contexts[i]] = len(self._place)
                if self._list is not None:
                    self._file.flush()
                    self._list.write(" ".join(map(str, contexts[i])) + "\n")
        self._llm.counts.rows += len(contexts) - len(new)
        self._llm.counts.forwards += not new
        return torch.from_numpy(np.stack([self._read(c) for c in contexts]))

    def _read(self, context: tuple[int, ...]) -> np.ndarray[Any, Any]:
        self._file.seek(self._place[context] * self._llm.width * 4)
        return np.fromfile(self._file, dtype=np.float32, count=self._llm.width)
