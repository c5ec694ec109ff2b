"""The alphabet that everything in this package speaks: 256 one-byte tokens and EOS.

Every byte-level potential of the package is built on the same list object, so that a
genlm-control product of two of them needs no coercion: it recognises the list by identity
and adds the two rows. Column `b` of a row of weights is byte `b`; column `EOS_COLUMN` is the
end of the text.
"""

from __future__ import annotations

from collections.abc import Sequence

from genlm_bytes_smc.late_import import imported_late

# The first is what jsonschema takes, the others what arsenal's stop watch does.
with (
    imported_late("rfc3987_syntax", "is_valid_syntax"),
    imported_late("matplotlib.pyplot"),
    imported_late("pandas"),
):
    from genlm.control.potential.base import Potential, VocabTables

N_BYTES = 256
EOS_COLUMN = N_BYTES
N_SYMBOLS = N_BYTES + 1

BYTES: list[bytes] = [bytes([i]) for i in range(N_BYTES)]
TABLES: VocabTables = Potential.build_tables(BYTES)

Context = Sequence[bytes] | bytes


def as_bytes(context: Context) -> bytes:
    """Return the bytes of a context, checked.

    Raises:
        TypeError: a token is not `bytes`.
        ValueError: a token is not exactly one byte.
    """
    if isinstance(context, bytes):
        return context
    try:
        text = b"".join(context)
    except TypeError:
        odd = next(t for t in context if not isinstance(t, bytes))
        raise TypeError(
            f"a context is bytes or a sequence of one-byte `bytes` tokens, got the token {odd!r} "
            f"of type {type(odd).__name__}"
        ) from None
    if len(text) != len(context):
        odd = next(t for t in context if len(t) != 1)
        raise ValueError(f"a token of a context is exactly one byte, got {odd!r}")
    return text
