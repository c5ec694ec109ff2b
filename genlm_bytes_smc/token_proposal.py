"""A token sampler for genlm-control in which a byte potential proposes.

Token and byte models share no tokens, but a token is drawn byte by byte all the same: walk
down the trie of the target's tokens, choosing each byte with the help of the proposal's row,
and end where the target's own row says that a token may. The walk is a distribution q over
the target's tokens and EOS that can be computed while it is drawn, so the importance weight
is exact whatever proposes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from genlm.control.potential.autobatch import autobatched
from genlm.control.potential.base import Potential
from genlm.control.sampler.token import TokenSampler

from genlm_bytes_smc.alphabet import BYTES, EOS_COLUMN
from genlm_bytes_smc.beam.state import FloatArray
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.proposal import check_bytes
from genlm_bytes_smc.trie import Vocabulary, shared_trie


class ByteTokenSampler(TokenSampler):  # type: ignore[misc]
    """Draws tokens of a target with bytes from a proposal, properly weighted for the target.

    Let p be the target's normalised row and, at a node u of the trie of its tokens, P(u) the
    mass of the tokens that begin with u and p(u) that of the tokens that spell u. From the
    root on, the walk

    - ends at u with probability p(u) / P(u), in one of the tokens that spell u, by their mass;
    - else reads a byte b from the mixture `(1 - defensive) B(b) + defensive P(ub) / (P(u) -
      p(u))`, where B is the proposal's row after the context's bytes and u, normalised over
      the bytes under which the target has mass. At the root EOS is one of the choices.

    With q(t) the product of what was chosen, `target.logw_next[t] - log q(t)` is the weight:
    a draw is properly weighted for `target.logw_next`. The factors of ending are the target's
    own, so only the choices of bytes add variance, and a proposal that agrees with the target
    in them adds none. With `defensive` above 0 every token of the target can be drawn. At 0
    only those can whose bytes the proposal admits: weights are then proper for the target
    restricted to such tokens, which is what is wanted where a constraint is a factor of the
    proposal and excludes the other texts anyway.

    Args:
        target: a potential over tokens that spell bytes: `bytes`, genlm-backend's `Token`, or
            integers 0..255 (`PromptedLLM`, a product of it with a coerced potential).
        proposal: a potential over one-byte `bytes` tokens: a `ByteLLM` of any model, a product
            of it with a constraint.
        defensive: share of the target in the choice of bytes, in [0, 1).
        rng: where draws come from (None: numpy's global generator, which genlm-control's own
            resampling uses).
        autobatch: whether concurrent particles' calls are joined into one.

    Raises:
        TypeError: no potential, or tokens of the target that spell no bytes.
        ValueError: a proposal over other tokens, or `defensive` out of range.
    """

    def __init__(
        self,
        target: Potential,
        proposal: Potential,
        *,
        defensive: float = 0.05,
        rng: np.random.Generator | None = None,
        autobatch: bool = True,
    ) -> None:
        if not isinstance(target, Potential):
            raise TypeError(f"the target must be a Potential, got {type(target).__name__}")
        check_bytes("proposal", proposal)
        if not 0 <= defensive < 1:
            raise ValueError(f"defensive must be in [0, 1), got {defensive!r}")
        spellings = [_spelling(token) for token in target.vocab]
        super().__init__(autobatched(target) if autobatch else target)
        self.proposal = autobatched(proposal) if autobatch else proposal
        self.defensive = defensive
        self.rng = rng
        self._trie = shared_trie(Vocabulary.from_tokens(spellings))
        self._silent: IntArray = np.array([i for i, s in enumerate(spellings) if not s], np.int64)

    async def sample(
        self, context: list[Any], draw: Callable[[Any], Any] | None = None
    ) -> tuple[Any, float, float]:
        """Draw a token or EOS; return it, its log weight and its log probability (nats).

        Where target or proposal leave nothing to draw, EOS with weight -inf.

        Raises:
            TypeError: a `draw` is given; the walk makes several draws of its own.
        """
        if draw is not None:
            raise TypeError("ByteTokenSampler draws byte by byte and takes no draw function")
        row = _row(await self.target.logw_next(context))
        top = row.max()
        p = np.exp(row - top) if top > -np.inf else np.zeros(len(row))
        ordered = p[:-1][self._trie.order]
        text = [BYTES[b] for b in b"".join(map(_spelling, context))]
        node, logq = 0, 0.0
        while True:
            here, symbols, below = self._split(p, ordered, node)
            if here + below.sum() <= 0:
                break
            stop = here / (here + below.sum())
            if self._uniform() < stop:
                columns = np.array(self._trie.tokens_at(node)) if node else self._silent
                at = _draw(p[columns], self._uniform())
                column = int(columns[at])
                logq += math.log(stop) + math.log(float(p[column] / p[columns].sum()))
                return self.target.vocab[column], float(row[column]) - logq, logq
            logq += math.log1p(-stop)
            chosen = await self._choose(text, symbols, below)
            if chosen is None:
                break
            logq += chosen[1]
            symbol = int(symbols[chosen[0]])
            if symbol == EOS_COLUMN:
                return self.target.eos, float(row[-1]) - logq, logq
            text.append(BYTES[symbol])
            node = int(self._trie.first_child[node]) + chosen[0]
        return self.target.eos, -math.inf, 0.0

    async def _choose(
        self, text: list[bytes], symbols: IntArray, below: FloatArray
    ) -> tuple[int, float] | None:
        """Draw one of the choices; return it and its log probability, None if none is admitted."""
        if self.defensive > 0 and np.count_nonzero(below) == 1:
            return int(below.argmax()), 0.0  # no need to ask
        proposed = _row(await self.proposal.logw_next(text))[symbols]
        proposed[below <= 0] = -np.inf
        top = proposed.max()
        if top > -np.inf:
            q = np.exp(proposed - top)
            q *= (1 - self.defensive) / q.sum()
            q += self.defensive / below.sum() * below
        elif self.defensive > 0:
            q = below / below.sum()
        else:
            return None
        at = _draw(q, self._uniform())
        return at, float(np.log(q[at] / q.sum()))

    def _split(
        self, p: FloatArray, ordered: FloatArray, node: int
    ) -> tuple[float, IntArray, FloatArray]:
        """Return the mass of the tokens that end at a node, and the choices that lead on.

        These are the bytes below the node, at the root EOS too, and the mass of each. Tokens that
        spell nothing are in no range of the trie; they end at the root.

        Args:
            p: float64[V + 1], the target's row, unnormalised, with EOS last.
            ordered: float64[T], those of the tokens of the trie, in its order.
            node: of the trie.
        """
        trie = self._trie
        first, last = int(trie.first_child[node]), int(trie.first_child[node + 1])
        starts = trie.lo[first:last]
        whole = ordered[: int(trie.hi[node])]
        below = np.add.reduceat(whole, starts) if len(starts) else np.zeros(0)
        choices = trie.byte[first:last].astype(np.int64)
        if node > 0:
            at = int(trie.lo[node])
            return float(ordered[at : at + int(trie.ends[node])].sum()), choices, below
        here = float(p[self._silent].sum())
        return here, np.append(choices, EOS_COLUMN), np.append(below, p[-1])

    def _uniform(self) -> float:
        return float((np.random if self.rng is None else self.rng).random())


def _draw(p: FloatArray, uniform: float) -> int:
    """Draw an index by unnormalised probabilities, never one of probability zero."""
    run = np.cumsum(p)
    at = int(np.searchsorted(run, uniform * run[-1], side="right"))
    return min(at, int(np.flatnonzero(p)[-1]))


def _row(lazy: Any) -> FloatArray:
    weights = torch.as_tensor(lazy.weights).detach().cpu().double().numpy()
    return np.array(weights)


def _spelling(token: Any) -> bytes:
    """Return the bytes of a token; `TypeError` if it spells none."""
    if isinstance(token, bytes):
        return bytes(token)
    if isinstance(token, int | np.integer) and not isinstance(token, bool) and 0 <= token < 256:
        return bytes([token])
    raise TypeError(f"tokens of the target must spell bytes, got {token!r}")
