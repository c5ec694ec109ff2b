"""States of a run as JSON and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from genlm_bytes_smc.smc.particles import Particles
from genlm_bytes_smc.smc.state import SMCState, StepInfo

_FORMAT = "genlm_bytes_smc.SMCResult/1"
_ARRAYS = {"ancestors": np.int64, "symbols": np.int16, "log_weights": np.float64}


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole or not at all."""
    target = Path(path)
    part = target.with_name(target.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(target)


def read(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it holds none.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no saved result: {error}") from None


def pack(state: SMCState, resumable: SMCState) -> dict[str, Any]:
    """A result as JSON values; floats keep every digit, -inf is written "-inf"."""
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
    """What `pack` was given.

    Raises:
        ValueError: other data.
    """
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f"a result saved as {_FORMAT!r} is due, got other data")
    history = tuple(_unpack_info(info) for info in data["history"])
    state = SMCState(
        _unpack_particles(data["particles"]),
        data["step"],
        data["seed"],
        data["beam_seed"],
        float(data["start"]),
        history,
        data.get("max_bytes"),
    )
    before = data["resumable"]
    if before is None:
        return state, state
    particles = _unpack_particles(before["particles"])
    return state, state._replace(
        particles=particles, step=before["step"], history=history[: before["history"]]
    )


def _pack_particles(particles: Particles) -> dict[str, Any]:
    return {
        "text": [row.tobytes().hex() for row in particles.text],
        "length": particles.length.tolist(),
        "ended": particles.ended.tolist(),
        "log_weights": _floats(particles.log_weights.tolist()),
        "twist": particles.twist.tolist(),
        "eve": particles.eve.tolist(),
        "salt": None if particles.salt is None else particles.salt.tolist(),
    }


def _unpack_particles(data: dict[str, Any]) -> Particles:
    rows = [bytes.fromhex(row) for row in data["text"]]
    text = np.array([list(row) for row in rows], dtype=np.uint8)
    return Particles(
        text=text.reshape(len(rows), len(rows[0])),
        length=np.array(data["length"], dtype=np.int64),
        ended=np.array(data["ended"], dtype=bool),
        log_weights=np.array([float(w) for w in data["log_weights"]]),
        twist=np.array(data["twist"], dtype=np.float64),
        eve=np.array(data["eve"], dtype=np.int64),
        salt=None if data.get("salt") is None else np.array(data["salt"], dtype=np.uint64),
    )


def _pack_info(info: StepInfo) -> dict[str, Any]:
    out = info._asdict()
    for name in _ARRAYS:
        if out[name] is not None:
            out[name] = _floats(out[name].tolist())
    out["log_ml"] = _floats([info.log_ml])[0]
    return {k: v for k, v in out.items() if v is not None}


def _unpack_info(data: dict[str, Any]) -> StepInfo:
    values = dict(data)
    for name, kind in _ARRAYS.items():
        if name in values:
            values[name] = np.array([float(v) for v in values[name]]).astype(kind)
    values["log_ml"] = float(values["log_ml"])
    values["deaths"] = tuple((name, k) for name, k in values["deaths"])
    return StepInfo(**values)


def _floats(values: list[Any]) -> list[Any]:
    return [str(v) if v == -np.inf else v for v in values]
