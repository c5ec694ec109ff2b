"""Files that are written whole or not at all; states of a run as JSON, and records for a viewer."""

from __future__ import annotations

import json
import math
import os
import reprlib
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from genlm.control.constant import EOS
from genlm.control.util import escape

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES
from genlm_bytes_smc.smc.particles import NO_SYMBOL, Particles, SMCState, StepInfo
from genlm_bytes_smc.smc.resampling import FloatArray, IntArray

_FORMAT = "genlm_bytes_smc.SMCResult/1"
_ARRAYS = ("ancestors", "symbols", "log_weights")  # of a StepInfo
_COUNTED = ("step", "active", "ended", "dead", "lanes", "rows", "forwards", "moved")
_INT64 = 2**63 - 1
_SHOWN = {
    NO_SYMBOL: "",
    EOS_COLUMN: escape(EOS),
    **{b: escape(bytes([b])).replace("|", "\\x7c") for b in range(N_BYTES)},
}


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file whole or not at all; `str` as UTF-8.

    The content goes to a new file in the same folder, which then takes the place of the old
    one. A symbolic link is followed to the file it names; that file keeps its permissions, and
    a new one gets those that the umask leaves. A device or a pipe is written to directly.

    Raises:
        OSError: the file cannot be written; nothing is left in the folder.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        Path(path).write_bytes(data)
        return
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    access = 0o666 if mode is None else 0o600
    # "x": made here or not at all, so that a link of that name is not followed.
    file = open(part, "xb", opener=lambda name, flags: os.open(name, flags, access))  # noqa: SIM115
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(part, stat.S_IMODE(mode))
        os.replace(part, target)
    except BaseException:
        os.unlink(part)
        raise


def parse(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def read(path: str | os.PathLike[str]) -> Any:
    """Return the value in a JSON file.

    Raises:
        ValueError: it holds none.
    """
    try:
        return parse(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is no saved result: {error}") from None


@dataclass(slots=True)
class Field:
    """A JSON value that was read from a file, and its name there, for errors.

    Every method raises ValueError, with the name and the value, for another value than it is
    meant for.
    """

    name: str
    value: Any

    def refuse(self, due: str) -> ValueError:
        """Return the error for a value that is not as it should be."""
        return ValueError(f"{self.name} must be {due}, got {reprlib.repr(self.value)}")

    def __getitem__(self, key: str) -> Field:
        """Return a member of an object."""
        members = self.members()
        if key not in members:
            raise ValueError(f"{self.name} has no {key!r}")
        return members[key]

    def members(self) -> dict[str, Field]:
        """Return the members of an object, by their keys."""
        if not isinstance(self.value, dict):
            raise self.refuse("an object")
        return {key: Field(f"{self.name}.{key}", value) for key, value in self.value.items()}

    def items(self, n: int | None = None) -> list[Field]:
        """Return the items of an array, of which there must be `n` (None: any number)."""
        if not isinstance(self.value, list) or n not in (None, len(self.value)):
            raise self.refuse("an array" if n is None else f"an array of {n} values")
        return [Field(f"{self.name}[{i}]", value) for i, value in enumerate(self.value)]

    def text(self) -> str:
        """Return a string."""
        if not isinstance(self.value, str):
            raise self.refuse("a string")
        return self.value

    def flag(self) -> bool:
        """Return true or false."""
        if not isinstance(self.value, bool):
            raise self.refuse("true or false")
        return self.value

    def count(self, most: int = _INT64, least: int = 0) -> int:
        """Return an integer in [least, most]."""
        if type(self.value) is not int or not least <= self.value <= most:
            end = "or more" if most == _INT64 else f"to {most}"
            raise self.refuse(f"an integer of {least} {end}")
        return self.value

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """Return a finite number in [least, most]."""
        value = self._float()
        if value is None or not (math.isfinite(value) and least <= value <= most):
            ends = "" if least == -math.inf else f" in [{least:g}, {most:g}]"
            raise self.refuse(f"a finite number{ends}")
        return value

    def log_weight(self) -> float:
        """Return a finite number, or -inf for "-inf"."""
        value = -math.inf if self.value == "-inf" else self._float()
        if value is None or math.isnan(value) or value == math.inf:
            raise self.refuse('a finite number or "-inf"')
        return value

    def counts(self, n: int, most: int, least: int = 0) -> IntArray:
        """Return `n` integers in [least, most], int64[n]."""
        return np.array([item.count(most, least) for item in self.items(n)], dtype=np.int64)

    def numbers(self, n: int) -> FloatArray:
        """Return `n` finite numbers, float64[n]."""
        return np.array([item.number() for item in self.items(n)], dtype=np.float64)

    def log_weights(self, n: int) -> FloatArray:
        """Return `n` finite numbers or -inf, float64[n]."""
        return np.array([item.log_weight() for item in self.items(n)], dtype=np.float64)

    def _float(self) -> float | None:
        if type(self.value) not in (int, float):
            return None
        try:
            return float(self.value)
        except OverflowError:
            return None


def pack(state: SMCState, resumable: SMCState) -> dict[str, Any]:
    """Return a result as JSON values; floats keep every digit, -inf is written "-inf"."""
    return {
        "format": _FORMAT,
        "seed": state.seed,
        "beam_seed": state.beam_seed,
        "start": state.start,
        "step": state.step,
        "max_bytes": state.max_bytes,
        "particles": _pack_particles(state.particles),
        "history": [_pack_info(info) for info in state.history],
        "resumable": None
        if resumable is state
        else {
            "step": resumable.step,
            "particles": _pack_particles(resumable.particles),
            "history": len(resumable.history),
        },
    }


def unpack(data: Any) -> tuple[SMCState, SMCState]:
    """Return the two states that `pack` was given.

    Raises:
        ValueError: other data; it names the field that is not as it should be.
    """
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"a result saved as {_FORMAT!r} is due, got other data")
    run = Field("run", data)
    history = tuple(_unpack_info(info) for info in run["history"].items())
    beams, most = run["beam_seed"], run.members().get("max_bytes")
    state = SMCState(
        _unpack_particles(run["particles"]),
        run["step"].count(),
        run["seed"].count(),
        None if beams.value is None else beams.count(),
        run["start"].number(),
        history,
        None if most is None or most.value is None else most.count(),
    )
    before = run["resumable"]
    if before.value is None:
        return state, state
    return state, state._replace(
        particles=_unpack_particles(before["particles"]),
        step=before["step"].count(),
        history=history[: before["history"].count(len(history))],
    )


def _pack_particles(particles: Particles) -> dict[str, Any]:
    arrays = particles._asdict().items()
    out = {name: None if array is None else array.tolist() for name, array in arrays}
    out["text"] = [row.tobytes().hex() for row in particles.text]
    return out | {"log_weights": _floats(particles.log_weights.tolist())}


def _unpack_particles(data: Field) -> Particles:
    rows = [_unhex(row) for row in data["text"].items()]
    n = len(rows)
    if not n:
        raise data["text"].refuse("an array of one text a particle")
    t = len(rows[0])
    if any(len(row) != t for row in rows):
        raise ValueError(f"{data.name}.text must have rows of one length")
    return Particles(
        text=np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(n, t).copy(),
        length=data["length"].counts(n, most=t),
        ended=np.array([item.flag() for item in data["ended"].items(n)]),
        log_weights=data["log_weights"].log_weights(n),
        twist=data["twist"].numbers(n),
        eve=data["eve"].counts(n, most=n - 1),
        salt=_unpack_salt(data.members().get("salt"), n, t),
    )


def _unhex(row: Field) -> bytes:
    try:
        return bytes.fromhex(row.text())
    except ValueError:
        raise row.refuse("bytes as hexadecimal digits") from None


def _unpack_salt(salt: Field | None, n: int, t: int) -> Any:
    """uint64[n, t + 1], or uint64[n, t] where every particle died of the last byte."""
    if salt is None or salt.value is None:
        return None
    rows = salt.items(n)
    width = t if len(rows[0].items()) == t else t + 1
    values = [[item.count(2**64 - 1) for item in row.items(width)] for row in rows]
    return np.array(values, dtype=np.uint64).reshape(n, width)


def _pack_info(info: StepInfo) -> dict[str, Any]:
    out = info._asdict()
    for name in _ARRAYS:
        if out[name] is not None:
            out[name] = _floats(out[name].tolist())
    out["log_ml"] = _floats([info.log_ml])[0]
    return {k: v for k, v in out.items() if v is not None}


def _unpack_info(info: Field) -> StepInfo:
    """Read a step; inside a roll-out it has more values than there are particles."""
    n = sum(info[name].count(_INT64 // 4) for name in ("active", "ended", "dead"))
    values: dict[str, Any] = {}
    for name, field in info.members().items():
        if name not in _READERS:
            raise ValueError(f"{info.name} has an unknown member {name!r}")
        if field.value is not None:
            values[name] = _READERS[name](field, n)
    missing = [name for name in ("step", "ess", "log_ml", "lanes") if name not in values]
    if missing:
        raise ValueError(f"{info.name} has no {missing[0]!r}")
    return StepInfo(**values)


def _deaths(field: Field, _: int) -> tuple[tuple[str, int], ...]:
    pairs = [pair.items(2) for pair in field.items()]
    return tuple((factor.text(), count.count()) for factor, count in pairs)


def _ancestors(field: Field, _: int) -> IntArray:
    size = len(field.items())
    return field.counts(size, most=size - 1)


_READERS: dict[str, Callable[[Field, int], Any]] = {
    **dict.fromkeys(_COUNTED, lambda field, n: field.count()),
    **dict.fromkeys(("ess", "uncovered", "seconds"), lambda field, n: field.number(least=0)),
    "log_ml": lambda field, n: field.log_weight(),
    "forced": lambda field, n: field.flag(),
    "deaths": _deaths,
    "ancestors": _ancestors,
    "symbols": lambda field, n: field.counts(n, most=EOS_COLUMN, least=NO_SYMBOL).astype(np.int16),
    "log_weights": lambda field, n: field.log_weights(n),
}


def _floats(values: list[Any]) -> list[Any]:
    return [str(v) if v == -np.inf else v for v in values]


def viewer_record(state: SMCState) -> list[dict[str, Any]]:
    """Return a run as genlm-control's viewer reads it (`sampler/smc_record.py`, `html/smc.html`).

    One entry a step. A particle of an entry comes from the particle of the same number in the
    entry before, or, if that step was followed by a resampling ("mode": "resample"), from its
    ancestor; `contents_incr` is what it added to that one's text.

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
