"""Compiled functions that only compiled code calls, for tests to call."""

import numba


def called(function):
    """Return the function, callable from Python."""
    return numba.njit(lambda *args: function(*args))
