"""How a byte beam prunes, ends and heals."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Literal

Pruning = Literal["topk", "unbiased", "deferred"]

_SEEDS = 1 << 64
_SHARES = ("deferred_share", "deferred_merge", "deferred_guess")


@dataclass
class BeamParams:
    """Parameters of a byte beam; a superset of genlm-bytes 0.2's, with the same meaning.

    Args:
        K: most candidates kept, or None to keep every one (exact, exponential cost).
        prune_threshold: share of the beam's weight, in [0, 1). With `prune="topk"`
            candidates and token-ending extensions at or below it are dropped, the heaviest
            part of a beam excepted; with
            `prune="unbiased"` extensions below it are thinned at random (`ByteLLM`
            spares its prompt that).
        verbose: write the beam to standard output after each byte.
        eos_byte_strings: spellings of the tokens that end a text. They merge into one
            end-of-sequence symbol; inside a prompt they are ordinary tokens.
        heal: when no candidate can read a byte, end tokens earlier and try again. Always off
            with `prune="unbiased"`, where it would bias, and with "deferred", which needs none.
        heal_max_backoff: most bytes of the token in flight that healing gives back.
        heal_max_splits: most further tokens that one healing may end.
        eos_tokens: old name of `eos_byte_strings`.
        prune: "topk" keeps the K likeliest candidates. "unbiased" keeps K by optimal
            resampling (Fearnhead & Clifford 2003), so that the expectation of exp(logZ) is
            the exact prefix probability for every K and threshold. "deferred" keeps what it
            does not extend and fetches its rows after a byte has shown that it matters (see
            `beam.deferred`); K and healing have no effect, and `prune_threshold` is the share
            from which on a context that ends with the text gets its row before the next byte.
        seed: of the random choices of `prune="unbiased"`, below 2**64.
        deferred_share: with `prune="deferred"`, estimated share of a beam's weight from which
            on the first row of a position is fetched, in [0, 1].
        deferred_merge: share from which on a further context of a position gets its own row,
            in [0, 1]; those below ride on the rows that are there.
        deferred_guess: probability of each byte that a context without a row is taken to give
            in these estimates, in (0, 1].
        deferred_rows: most rows of the model that a text asks for after one byte.
        deferred_limit: most contexts without a row that are kept for a text.
        deferred_readings: how often a known text is read, each time with the rows that were
            missing the last time; so many forwards. Short texts are read more often where a
            missing row weighs much.

    Raises:
        ValueError: K below 1, a threshold outside [0, 1), an unknown `prune`, a negative
            limit or seed.
        TypeError: a value of the wrong type, or both names of `eos_byte_strings`.
    """

    K: int | None
    prune_threshold: float = 0.0
    verbose: bool = False
    eos_byte_strings: Iterable[bytes] | None = None
    heal: bool = True
    heal_max_backoff: int | None = None
    heal_max_splits: int | None = None
    eos_tokens: Iterable[bytes] | None = None
    prune: Pruning = "topk"
    seed: int = 0
    deferred_share: float = 0.02
    deferred_merge: float = 0.003
    deferred_guess: float = 0.03
    deferred_rows: int = 24
    deferred_limit: int = 256
    deferred_readings: int = 4

    def __post_init__(self) -> None:
        if self.eos_tokens is not None:
            if self.eos_byte_strings is not None:
                raise TypeError("give eos_byte_strings or its old name eos_tokens, not both")
            warnings.warn(
                "'eos_tokens' is the old name of 'eos_byte_strings'",
                DeprecationWarning,
                stacklevel=3,
            )
            self.eos_byte_strings, self.eos_tokens = self.eos_tokens, None
        for name, least, none in (
            ("K", 1, "None (keep every candidate)"),
            ("heal_max_backoff", 0, "None (no limit)"),
            ("heal_max_splits", 0, "None (no limit)"),
        ):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name), least, none)
        for name in ("prune_threshold", *_SHARES):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        self.prune_threshold = float(self.prune_threshold)
        if not 0 <= self.prune_threshold < 1:
            raise ValueError(f"prune_threshold must be in [0, 1), got {self.prune_threshold!r}")
        if self.prune not in ("topk", "unbiased", "deferred"):
            raise ValueError(f'prune must be "topk", "unbiased" or "deferred", got {self.prune!r}')
        for name in _SHARES:
            value = getattr(self, name)
            if not 0 <= value <= 1 or (value == 0 and name == "deferred_guess"):
                raise ValueError(f"{name} must be a share of at most 1, got {value!r}")
        for name in ("deferred_rows", "deferred_limit", "deferred_readings"):
            _check_count(name, getattr(self, name), least=1)
        _check_count("seed", self.seed, least=0)
        if self.seed >= _SEEDS:
            raise ValueError(f"seed must be below 2**64, got {self.seed}")
        self.eos_byte_strings = _byte_strings(self.eos_byte_strings)
        if self.prune != "topk":
            self.heal = False

    @property
    def unbiased(self) -> bool:
        """Return whether pruning is random and unbiased."""
        return self.prune == "unbiased"

    @property
    def eos(self) -> frozenset[bytes]:
        """The end-of-sequence spellings."""
        return frozenset(self.eos_byte_strings or ())


def default_params() -> BeamParams:
    """Return how `ByteLLM` and what is made from one prune when nothing is said."""
    return BeamParams(K=None, prune="deferred", prune_threshold=0.1)


def _check_count(name: str, value: object, least: int, none: str = "") -> None:
    wanted = f"an integer of at least {least}" + (f" or {none}" if none else "")
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if value.__index__() < least:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _byte_strings(given: Iterable[bytes] | None) -> set[bytes]:
    if given is None:
        return set()
    if isinstance(given, bytes | str) or not isinstance(given, Iterable):
        raise TypeError(f"eos_byte_strings must be a list of bytes, got {given!r}")
    strings = list(given)
    for s in strings:
        if not isinstance(s, bytes):
            raise TypeError(f"eos_byte_strings must hold bytes, got {s!r}")
        if not s:
            raise ValueError("an end-of-sequence string must not be empty")
    return {bytes(s) for s in strings}
