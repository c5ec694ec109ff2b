"""Token contexts as nodes of a prefix tree, kept on the host.

A context (a string of token ids) is named by one integer, the id of its node. Forking a
lane, sharing a prompt between a thousand particles or asking whether two hypotheses have
the same context is then integer work, and no list of tokens is ever copied.

Nodes that nobody can reach any more are found by tracing (`collect`): the roots are the
objects given to `track` that are still alive, the pinned ids, and their ancestors. Freed ids
are used again; whoever keeps something per node hears of it through `on_free`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.lm.contexts_numba import (
    FREE,
    SIZE,
    TreeArrays,
    fill_table,
    find_children,
    find_path,
    mark,
    spelled,
)
from genlm_bytes_smc.lm.contexts_numba import IntArray as IntArray

_TOKEN_BITS = 32
# Document separators of models trained without a BOS token, likeliest first.
_SEPARATORS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "</s>")
_HOLDERS = 1024  # references to holders, alive or not, before the first look at them


class HoldsContexts(Protocol):
    """Anything alive that refers to contexts by id."""

    def context_ids(self) -> IntArray:
        """Return the ids that must stay valid, any shape, int64; negative ids are ignored."""
        ...


_BUSY = (
    "a model answers one thread at a time, and another is being answered: run all tasks in one "
    "event loop, or load the model once a thread"
)


class OneThread:
    """Refuses a second thread while one is at work: contexts and caches know no locks.

    Entered, as often as need be, by everything that changes contexts, rows, or keys and values,
    and left when they are whole again.

    Args:
        refusal: what the second thread is told.

    Raises:
        RuntimeError: on entering, while another thread is at work.
    """

    __slots__ = ("_depth", "_lock", "_refusal", "_thread")

    def __init__(self, refusal: str = _BUSY) -> None:
        self._refusal = refusal
        self._thread, self._depth = 0, 0  # who is at work, and in how many blocks
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._depth and self._thread != me:
                raise RuntimeError(self._refusal)
            self._thread = me
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1


class ContextTree:
    """All token contexts in use with one model.

    Attributes:
        one_thread: entered by whoever changes the tree, or what is kept by its ids.

    `child`, `children`, `along` and `insert` find or make nodes; `tokens` spells one out;
    `collect` frees what no tracked object refers to.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._meta = np.array([1, 0], dtype=np.int64)
        self._index(_columns(capacity))
        self._alive[0] = True
        self.one_thread = OneThread()
        self._holders: list[weakref.ref[HoldsContexts]] = []
        self._most_holders = _HOLDERS
        self._pins: dict[Pin, IntArray] = {}
        self._on_free: list[weakref.WeakMethod[Callable[[IntArray], None]]] = []
        self._after_last_collect = 0

    def __len__(self) -> int:
        """Return the number of contexts alive, the empty one included."""
        return int(self._meta[SIZE] - self._meta[FREE])

    @property
    def capacity(self) -> int:
        """Length of the per-node arrays; every id is below it."""
        return len(self.parent)

    # -- finding and making nodes ------------------------------------------------------

    def child(self, node: int, token: int) -> int:
        """Return the context `node` followed by `token`, made if it is new."""
        return int(self.along(node, [token])[0])

    def children(self, nodes: IntArray, tokens: IntArray) -> IntArray:
        """`child` for each pair of two int64 arrays of equal shape [m]."""
        out = np.empty(len(nodes), dtype=np.int64)
        _check_tokens(tokens)
        while find_children(self.arrays, nodes, tokens, out) < len(nodes):
            self.grow()
        return out

    def along(self, node: int, tokens: Iterable[int]) -> IntArray:
        """Return the contexts `node` followed by 1, 2, ... of the tokens, made if new: int64[m]."""
        given = np.array(list(tokens), dtype=np.int64)
        _check_tokens(given)
        out = np.empty(len(given), dtype=np.int64)
        while find_path(self.arrays, node, given, out) < len(given):
            self.grow()
        return out

    def insert(self, tokens: Iterable[int]) -> int:
        """Return the node of a whole token string, made with its ancestors if new."""
        path = self.along(0, tokens)
        return int(path[-1]) if len(path) else 0

    def tokens(self, node: int) -> list[int]:
        """Return the token ids that `node` stands for (a list of the caller's own)."""
        out = np.empty(int(self.depth[node]), dtype=np.int64)
        spelled(self.parent, self.token, node, out)
        return out.tolist()

    def grow(self) -> None:
        """Make room for as many nodes again."""
        more = _columns(self.capacity)
        self._index([np.concatenate(pair) for pair in zip(self._all, more, strict=True)])

    def _index(self, columns: Sequence[npt.NDArray[Any]]) -> None:
        """Take the columns of `TreeArrays`, and hash every node anew."""
        self._all = columns
        self.parent, self.token, self.depth, self._alive, self._free = columns
        table = np.full(1 << (2 * self.capacity - 1).bit_length(), -1, dtype=np.int64)
        self.arrays = TreeArrays(
            self.parent, self.token, self.depth, self._alive, table, self._free, self._meta
        )
        fill_table(self.arrays)

    # -- who needs what ----------------------------------------------------------------

    def track(self, holder: HoldsContexts) -> None:
        """Keep what `holder.context_ids()` names for as long as `holder` is alive."""
        with self.one_thread:
            if len(self._holders) >= self._most_holders:
                self._holders = [ref for ref in self._holders if ref() is not None]
                self._most_holders = 2 * len(self._holders) + _HOLDERS
            self._holders.append(weakref.ref(holder))

    def on_free(self, listener: Callable[[IntArray], None]) -> None:
        """Call the bound method `listener(ids)` whenever `collect` frees ids."""
        self._on_free.append(weakref.WeakMethod(listener))

    def pinned(self, nodes: IntArray) -> Pin:
        """Return a context manager that keeps `nodes` (any shape) alive inside its block."""
        return Pin(self._pins, nodes)

    def live(self) -> npt.NDArray[np.bool_]:
        """Compute a mask over ids, bool[capacity]: reachable from tracked objects and pins."""
        mask = np.zeros(self.capacity, dtype=bool)
        holders = [holder for ref in self._holders if (holder := ref()) is not None]
        roots = [np.asarray(h.context_ids(), dtype=np.int64).ravel() for h in holders]
        roots += [np.asarray(nodes, dtype=np.int64).ravel() for nodes in self._pins.values()]
        roots.append(np.zeros(1, dtype=np.int64))
        mark(self.parent, np.concatenate(roots), mask)
        return mask

    def due(self, slack: int = 8192) -> bool:
        """Return whether enough nodes have come since the last `collect` for another to pay."""
        given, free = self._meta.tolist()
        return bool(given - free > 2 * self._after_last_collect + slack)

    def collect(self) -> IntArray:
        """Free every node that is not `live` and return the freed ids, int64[m]."""
        with self.one_thread:
            freed = np.flatnonzero(self._alive & ~self.live())
            self._alive[freed] = False
            first = int(self._meta[FREE])
            self._free[first : first + len(freed)] = freed
            self._meta[FREE] += len(freed)
            self._index(self._all)
            self._after_last_collect = len(self)
            if len(freed):
                self._on_free = [ref for ref in self._on_free if ref() is not None]
                for listener in [ref() for ref in self._on_free]:
                    if listener is not None:
                        listener(freed)
            return freed


class Pin:
    """Contexts that stay alive inside a with block (around an await, say)."""

    __slots__ = ("_all", "_nodes")

    def __init__(self, pins: dict[Pin, IntArray], nodes: IntArray) -> None:
        self._all, self._nodes = pins, nodes

    def __enter__(self) -> None:
        self._all[self] = self._nodes

    def __exit__(self, *_: object) -> None:
        del self._all[self]


def _columns(n: int) -> list[npt.NDArray[Any]]:
    """Make the columns of `n` nodes: parents, tokens, depths, ids in use and ids to use again."""
    none = np.full((2, n), -1, dtype=np.int64)
    return [
        *none,
        np.zeros(n, dtype=np.int64),
        np.zeros(n, dtype=bool),
        np.empty(n, dtype=np.int64),
    ]


def _check_tokens(tokens: IntArray) -> None:
    beyond = tokens >> _TOKEN_BITS  # -1 for negative numbers
    if np.count_nonzero(beyond):
        first = int(tokens[beyond != 0][0])
        raise ValueError(f"token ids must be integers in [0, 2**{_TOKEN_BITS}), got {first!r}")


# -- how contexts begin ---------------------------------------------------------------------


def start_tokens(
    tokenizer: Any, start: int | Sequence[int] | None = None, size: int | None = None
) -> tuple[int, ...]:
    """Token ids to put before a text, so that its first token has a context.

    What the user gives comes first. Else the tokenizer's BOS token. A tokenizer without one
    (the Qwen families) belongs to a model that has seen texts follow one another, so the
    next choice is the token that stood between them: `<|endoftext|>` or another well-known
    separator among the tokenizer's special tokens, then its EOS token, then its padding
    token.

    Args:
        tokenizer: a Hugging Face tokenizer, or anything with `bos_token_id`.
        start: an id or a sequence of ids; None to choose.
        size: token ids that the model takes are below it; None if that is not known.

    Returns:
        At least one token id.

    Raises:
        ValueError: `start` is empty, or has an id that is negative or too large; or nothing is
            given and nothing can be chosen.
        TypeError: `start` is neither an integer nor a sequence of integers.
    """
    if start is not None:
        ids = _given(start)
        if size is not None and max(ids) >= size:
            raise ValueError(f"start must be token ids below {size}, got {start!r}")
        return ids
    for choice in (
        getattr(tokenizer, "bos_token_id", None),
        _separator(tokenizer),
        getattr(tokenizer, "eos_token_id", None),
        getattr(tokenizer, "pad_token_id", None),
    ):
        if isinstance(choice, Integral):
            return (int(choice),)
    raise ValueError(
        "the tokenizer has no BOS, EOS or padding token to begin a text with; say which token "
        "ids to begin with: start=..."
    )


def _given(start: int | Sequence[int]) -> tuple[int, ...]:
    ids: Any = (start,) if isinstance(start, Integral) else start
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"start must be a token id or a sequence of token ids, got {start!r}")
    ids = tuple(ids)
    if not all(isinstance(i, Integral) for i in ids):
        raise TypeError(f"start must be a token id or a sequence of token ids, got {start!r}")
    out = tuple(int(i) for i in ids)
    if not out or min(out) < 0:
        raise ValueError(f"start must be one or more token ids of at least 0, got {start!r}")
    return out


def _separator(tokenizer: Any) -> int | None:
    """Id of a document separator among the special tokens, if there is one."""
    special = getattr(tokenizer, "added_tokens_decoder", None)
    if not isinstance(special, dict):
        return None
    ids = {str(token): i for i, token in special.items()}
    return next((ids[name] for name in _SEPARATORS if name in ids), None)
