"""The alphabet that everything in this package speaks: 256 one-byte tokens and EOS.

Every byte-level potential of the package is built on the same list object, so that a
genlm-control product of two of them needs no coercion: it recognises the list by identity
and adds the two rows. Column `b` of a row of weights is byte `b`; column `EOS_COLUMN` is the
end of the text.
"""

from __future__ import annotations

from genlm.control.potential.base import Potential, VocabTables

N_BYTES = 256
EOS_COLUMN = N_BYTES
N_SYMBOLS = N_BYTES + 1

BYTES: list[bytes] = [bytes([i]) for i in range(N_BYTES)]
TABLES: VocabTables = Potential.build_tables(BYTES)
