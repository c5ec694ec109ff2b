"""Texts that the studies read."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Any

from genlm_bytes_smc.experiments.experiment import Config, ExperimentError
from genlm_bytes_smc.experiments.models import TINY, is_bundled


def held_out() -> dict[str, list[bytes]]:
    """Return the held-out texts of the bundled model by kind: UTF-8, not in its training data."""
    return _by_kind("genlm_bytes_smc.lm.tiny", "heldout.jsonl")


def real_texts() -> dict[str, list[bytes]]:
    """Return short texts, written for this package, for other models, by kind: UTF-8 prose, code,
    French, German, Chinese, JSON."""
    return _by_kind(f"{__package__}.data", "texts.jsonl")


@lru_cache(maxsize=2)
def _by_kind(package: str, name: str) -> dict[str, list[bytes]]:
    source = resources.files(package).joinpath(name)
    found: dict[str, list[bytes]] = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = json.loads(line)
        found.setdefault(entry["kind"], []).append(entry["text"].encode())
    return found


def one_of_each(
    kinds: int, most: int, least: int = 40, skip: int = 0, model: Config = TINY
) -> list[bytes]:
    """Take a text of each of the first `kinds` kinds, cut to `most` bytes.

    Args:
        kinds: how many; all kinds if there are fewer.
        most: bytes of a text; a character is not cut.
        least: shorter texts are passed over.
        skip: how many of each kind are passed over.
        model: the bundled one has held-out texts of its own (`held_out`), others share
            `real_texts`.

    Raises:
        ExperimentError: a kind has no such text.
    """
    out = []
    source = held_out() if is_bundled(model) else real_texts()
    for kind, texts in list(source.items())[:kinds]:
        long = [t for t in texts if len(t) >= least][skip:]
        if not long:
            raise ExperimentError(f"no text of kind {kind!r} has {least} bytes")
        out.append(long[0][:most].decode("utf-8", "ignore").encode())
    return out
