"""From an option to a constraint."""

from __future__ import annotations

from genlm_bytes_smc.cli.output import UsageError
from genlm_bytes_smc.constraints import ByteRegex, ConstraintError


def regex_of(source: str) -> ByteRegex:
    """The constraint of a --regex.

    Raises:
        UsageError: it is no regular expression, or one that is not supported.
    """
    try:
        return ByteRegex(source)
    except ConstraintError as error:
        raise UsageError(f"--regex {source!r}: {error}") from None
