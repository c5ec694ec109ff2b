"""The rows of an experiment in a file of JSON lines, whole ones only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from genlm_bytes_smc.experiments.job import OWN, Config, ExperimentError, Row, key_of, versions
from genlm_bytes_smc.smc.files import Field, parse, write


class RowFile:
    """Rows as they come in, one JSON object a line; what is there already is kept.

    A line is written in one piece and flushed, so that an interrupt or a crash costs at most
    the line in the making. Such a torn last line is cut off when the file is opened again.

    Use `RowFile.alone`: what one process adds, another would lose when it puts rows in order.

    Raises:
        ValueError: the file holds something else than rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            self._read()

    @classmethod
    @contextmanager
    def alone(cls, path: Path) -> Iterator[RowFile]:
        """Open the file, which nobody else opens by this method until the context ends.

        A lock file beside it is held meanwhile; it stays there, and the system frees it if
        this process dies.

        Args:
            path: the file; made with its folder if it is not there.

        Raises:
            ExperimentError: another run has the file.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(f"{path}.lock").acquire(blocking=False)
        except Timeout:
            raise ExperimentError(
                f"another run is writing to {path}; wait for its end, or choose another folder"
            ) from None
        with held:
            yield cls(path)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = parse(line)
                _check(Field("row", row))
            except ValueError as error:
                raise ValueError(
                    f"{self.path}, line {number}, is no row of an experiment ({error}); "
                    "remove the line or choose another folder"
                ) from None
            self.rows.append(row)
        if whole < len(data):
            with self.path.open("rb+") as file:
                file.truncate(whole)

    def append(self, row: Row) -> None:
        """Add a row, to the file at once."""
        with self.path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
        self.rows.append(row)

    def done(self, experiment: str) -> dict[str, Row]:
        """Return rows of this version of the package, by the key of their configuration."""
        mine = versions()[OWN]
        return {
            key_of(row["config"]): row
            for row in self.rows
            if row["experiment"] == experiment and row["versions"].get(OWN) == mine
        }

    def settle(self, experiment: str, configs: list[Config]) -> list[Row]:
        """Put the rows of `configs` in their order, each once, with all others after them."""
        done = self.done(experiment)
        first = [done[key_of(config)] for config in configs]
        chosen = {id(row) for row in first}
        replaced = {key_of(config) for config in configs}
        rest = [
            row
            for row in self.rows
            if id(row) not in chosen
            and not (row["experiment"] == experiment and key_of(row["config"]) in replaced)
        ]
        self.rows = [*first, *rest]
        write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        return first


def _check(row: Field) -> None:
    """Raise ValueError for a value that is no row."""
    row["experiment"].text()
    for version in row["versions"].members().values():
        version.text()
    for name in ("config", "result", "run"):
        row[name].members()
