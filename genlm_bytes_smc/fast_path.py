"""Which of several ways some work is done, and the one warning where the fast way is lost.

The rule: what is slower than it should be says so. Something that should be there and is not (a
function of another package that was renamed, a kernel that does not compile) is one warning for
each model, with the cause. Something that was never there (a family of models that cannot share
keys and values) is no warning; `RowEngine.forward` and the command `info` tell it.
"""

from __future__ import annotations

import warnings


class FastPathWarning(RuntimeWarning):
    """A model runs more slowly, or in more memory, than it should; the message names the cause."""


class Way(str):
    """The way that was taken, as a string, and why.

    Args:
        name: what it is called.
        reason: why this one.
        lost: whether a faster one should have been there.
    """

    __slots__ = ("lost", "reason")

    reason: str
    lost: bool

    def __new__(cls, name: str, reason: str, lost: bool = False) -> Way:
        """Make one; see the class."""
        way = super().__new__(cls, name)
        way.reason, way.lost = reason, lost
        return way

    def __getnewargs__(self) -> tuple[str, str, bool]:  # type: ignore[override]
        return str(self), self.reason, self.lost


def warn_lost(message: str, stacklevel: int = 3) -> None:
    """Warn that a fast path is lost. Nothing else gives a `FastPathWarning`."""
    warnings.warn(message, FastPathWarning, stacklevel=stacklevel)
