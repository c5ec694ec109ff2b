"""The characters that a class of a regular expression matches, by running it over all of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import regex
from regex import _regex, _regex_core

from genlm_bytes_smc.constraints.automata.expressions import Chars
from genlm_bytes_smc.constraints.automata.utf8 import N_CODEPOINTS


def program(node: Any) -> tuple[int, ...]:
    """Return the engine's instructions for one or more characters of a class."""
    many = _regex_core.GreedyRepeat(node, 1, None)
    code = _regex_core._flatten_code(many.compile())
    return (*code, int(_regex_core.OP.SUCCESS))


@lru_cache(maxsize=4096)
def characters(program: tuple[int, ...], encoding: int) -> Chars:
    """Find the characters that a class matches by running it over all of them.

    The encoding (`regex.ASCII` or `regex.UNICODE`) is a property of the whole pattern, and the
    engine asks it what a letter is and which letters differ in case only.
    """
    flags = encoding | regex.VERSION0
    no_groups_no_lists: tuple[Any, ...] = ({}, {}, {}, [])
    nothing_required = (0, (), 0)
    engine = _regex.compile("", flags, list(program), *no_groups_no_lists, *nothing_required, 0)
    runs = [match.span() for match in engine.finditer(_every_character())]
    return Chars(np.array(runs, dtype=np.int64).reshape(-1, 2))


@lru_cache(maxsize=1)
def _every_character() -> str:
    return "".join(map(chr, range(N_CODEPOINTS)))
