"""Results as plain data: records, a data frame, metrics; and genlm-control's samples as ours."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np
from genlm.control.constant import EOS

from genlm_bytes_smc.smc.particles import BoolArray
from genlm_bytes_smc.smc.resampling import FloatArray


def records(samples: Any) -> list[dict[str, Any]]:
    """Return a dictionary a sample, of plain Python values."""
    columns = zip(
        samples.texts,
        samples.ended.tolist(),
        samples.log_weights.tolist(),
        samples.normalized_weights.tolist(),
        strict=True,
    )
    return [
        {
            "text": _readable(text),
            "bytes": len(text),
            "ended": ended,
            "log_weight": log_weight,
            "probability": p,
        }
        for text, ended, log_weight, p in columns
    ]


def _readable(text: bytes) -> str | bytes:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text


def frame(rows: list[dict[str, Any]]) -> Any:
    """Return records as a pandas `DataFrame`.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        pandas = import_module("pandas")  # no dependency: only who asks for a frame needs it
    except ImportError:
        raise ImportError(
            "a data frame needs pandas, which is not installed; to_records() needs nothing"
        ) from None
    return pandas.DataFrame.from_records(rows)


def metrics(result: Any) -> dict[str, float]:
    """Return what a run found and cost, in numbers."""
    particles = result.state.particles
    return {
        "log_ml": result.log_ml,
        "log_ml_error": result.log_ml_error,
        "ess": result.ess,
        "particles": result.size,
        "dead": int(particles.dead.sum()),
        "ended": int(np.asarray(result.ended).sum()),
        "unfinished": result.unfinished,
        "undecodable": result.undecodable,
        "distinct_texts": len(result.grouped()),
        "steps": len(result.history),
        "resamplings": len(result.ancestry),
        "uncovered": result.uncovered,
        "rows": result.rows,
        "forwards": result.forwards,
        "seconds": result.seconds,
        "bytes": sum(info.active for info in result.history),
    }


def of_sequences(sequences: Any) -> tuple[list[bytes], BoolArray, FloatArray]:
    """Return texts, whether each has ended, and log weights, of genlm-control's samples.

    Raises:
        TypeError: no such samples, or a token that spells no bytes.
    """
    if not hasattr(sequences, "contexts") or not hasattr(sequences, "log_weights"):
        told = type(sequences).__name__
        raise TypeError(f"samples with contexts and log_weights are due, got {told}")
    contexts = [list(context) for context in sequences.contexts]
    ended = np.array([bool(c) and c[-1] is EOS for c in contexts], dtype=bool)
    texts = [_spelled(c[:-1] if e else c) for c, e in zip(contexts, ended.tolist(), strict=True)]
    return texts, ended, np.array(sequences.log_weights, dtype=np.float64)


def _spelled(tokens: Iterable[Any]) -> bytes:
    out = bytearray()
    for token in tokens:
        if isinstance(token, int) and not isinstance(token, bool):
            out.append(token)
        elif isinstance(token, bytes | bytearray):
            out += token
        elif hasattr(token, "byte_string"):  # genlm-backend's `Token`
            out += token.byte_string
        else:
            raise TypeError(f"a token is bytes, or a byte as an integer, got {token!r}")
    return bytes(out)
