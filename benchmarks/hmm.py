"""A hidden Markov model as look-ahead: `python -m benchmarks.hmm [--rows 300] [--seeds 3]`.

Ctrl-G (Zhang et al. 2024, arXiv:2406.13892) and GeLaTo (Zhang et al. 2023, arXiv:2304.07438) distil
a hidden Markov model from free samples of a language model, and multiply it with an automaton: the
expected mass of what may follow is then solved by dynamic programming, for every automaton state
and hidden state. Here it is an HMM over bytes, trained by expectation maximisation on texts that
the model writes after the prompt until a share of the rows is spent, and it is used as
`Lookahead` is, as proposal and twist.

On the constraints of `benchmarks.auto`, each way has the same rows, training counted, from empty
caches; runs of 32 particles follow, pooled by evidence, until the rows are spent:

- `hmm`: the HMM, trained with half of the rows;
- `pilot`: `Lookahead.from_pilot(target, 8, rounds=2)`;
- `auto`: `smc(lookahead="auto", budget=rows)`;
- `smc`: no look-ahead.

Printed is the mean total variation from the enumerated law. `--docs` writes it to
docs/lookahead.md.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import reduce
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from benchmarks import auto, report
from benchmarks.kept_rows import KeptRows
from genlm_bytes_smc import load_model
from genlm_bytes_smc.alphabet import EOS_COLUMN, N_BYTES, N_SYMBOLS
from genlm_bytes_smc.constraints.base import DEAD
from genlm_bytes_smc.constraints.dfa import ByteDFA
from genlm_bytes_smc.lookahead import Lookahead
from genlm_bytes_smc.lookahead.lookahead import automata_of, language_models_of
from genlm_bytes_smc.lookahead.ngram import draw_texts
from genlm_bytes_smc.smc.factors import engines_of
from genlm_bytes_smc.smc.weighers import Ahead, AheadLanes

Float = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
AT_ONCE, MOST_BATCHES = 4, 200  # texts drawn before rows are counted again; batches of them


class ByteHMM:
    """A hidden Markov model that emits bytes, and then the end.

    Args:
        start: float64[H], the law of the first hidden state.
        step: float64[H, H], step[g, h] of going from g to h.
        emit: float64[H, 257], of each byte and of the end, all above zero.
    """

    def __init__(self, start: Float, step: Float, emit: Float) -> None:
        self.start, self.step, self.emit = start, step, emit

    @classmethod
    def random(cls, n_states: int, seed: int) -> ByteHMM:
        """Return one with rows drawn from a flat Dirichlet law."""
        rng = np.random.default_rng(seed)
        flat = np.ones(n_states)
        emit = rng.dirichlet(np.ones(N_SYMBOLS), n_states)
        return cls(rng.dirichlet(flat), rng.dirichlet(flat, n_states), emit)

    @classmethod
    def fitted(
        cls, texts: Sequence[IntArray], n_states: int = 32, sweeps: int = 40, seed: int = 0
    ) -> ByteHMM:
        """Fit to sequences of symbols 0..256 by expectation maximisation.

        Args:
            texts: the sequences; one that was cut has no end (256) last.
            n_states: hidden states, H.
            sweeps: of the algorithm.
            seed: of where it begins.
        """
        model = cls.random(n_states, seed)
        x = np.full((len(texts), max(map(len, texts))), -1)
        for row, text in zip(x, texts, strict=True):
            row[: len(text)] = text
        for _ in range(sweeps):
            model = model.improved(x)[0]
        return model

    def improved(self, x: IntArray, prior: float = 0.1) -> tuple[ByteHMM, float]:
        """Make one sweep of expectation maximisation.

        Args:
            x: int64[N, T], symbols; -1 after the end of a sequence.
            prior: counts that each row of the new model has beforehand, spread evenly.

        Returns:
            The new model, and the log likelihood of x under this one, nats.
        """
        there, (n, length) = x >= 0, x.shape
        seen = np.where(there[:, :, None], self.emit.T[x], 1.0)
        ahead, scale = np.empty_like(seen), np.empty((n, length))
        now = np.broadcast_to(self.start, (n, len(self.start)))
        for t in range(length):
            ahead[:, t] = (now if t == 0 else ahead[:, t - 1] @ self.step) * seen[:, t]
            scale[:, t] = ahead[:, t].sum(1)
            ahead[:, t] /= scale[:, t, None]
        back = np.ones_like(seen)
        moves = np.zeros_like(self.step)
        for t in range(length - 1, 0, -1):
            later = seen[:, t] * back[:, t] / scale[:, t, None]
            back[:, t - 1] = later @ self.step.T
            moves += self.step * (ahead[:, t - 1].T @ (later * there[:, t, None]))
        share = ahead * back
        emitted = np.zeros((N_SYMBOLS, len(self.start)))
        np.add.at(emitted, x[there], share[there])
        rows = (share[:, 0].sum(0), moves, emitted.T)
        new = [r + prior / r.shape[-1] for r in rows]
        new = [r / r.sum(-1, keepdims=True) for r in new]
        return ByteHMM(*new), float(np.log(scale).sum())

    def logp(self, symbols: Sequence[int]) -> float:
        """Return the log probability that a sequence begins with these symbols, nats."""
        belief, total = self.start, 0.0
        for symbol in symbols:
            belief = belief * self.emit[:, symbol]
            total += float(np.log(belief.sum()))
            belief = belief / belief.sum() @ self.step
        return total

    def future(self, following: IntArray, accept: npt.NDArray[np.bool_], most: int) -> Float:
        """Return the mass of completions for each automaton state and hidden state: float64[S, H].

        Args:
            following: int64[S, 256], the state after a byte; negative: none.
            accept: bool[S], where a text may end.
            most: most bytes of a completion.
        """
        source, byte = np.nonzero(following >= 0)
        target, weight = following[source, byte], self.emit.T[byte]
        end = np.where(accept[:, None], self.emit[:, EOS_COLUMN], 0.0)
        out = end
        for _ in range(most):
            before, out = out, end.copy()
            np.add.at(out, source, weight * (before @ self.step.T)[target])
            if np.array_equal(out, before):
                break
        return out


class HmmLanes(AheadLanes):
    """psi of D texts: the law of the next hidden state over what was read, times the future.

    Args:
        model, dfa: see `HmmLookahead`.
        future: float64[S + 1, H] by `ByteHMM.future`; the last row, of a dead state, is 0.
        state: int64[D], automaton states.
        belief: float64[D, H], of the next hidden state.
    """

    def __init__(
        self, model: ByteHMM, dfa: ByteDFA, future: Float, state: torch.Tensor, belief: Float
    ) -> None:
        self.model, self.dfa, self.future = model, dfa, future
        self.state, self.belief = state, belief
        with np.errstate(divide="ignore"):
            value = np.log((belief * future[state.numpy()]).sum(1))
        self.value = torch.from_numpy(value)

    async def rows(self) -> torch.Tensor:
        """See `AheadLanes`."""
        byte = torch.arange(N_BYTES).expand(len(self.state), N_BYTES)
        after = self.dfa.step(self.state[:, None].expand_as(byte), byte).numpy()
        emitted = self.belief[:, :, None] * self.model.emit[:, :N_BYTES]  # [D, H, 256]
        later = (self.future @ self.model.step.T)[after]  # [D, 256, H]
        with np.errstate(divide="ignore"):
            psi = np.log(np.einsum("dhb,dbh->db", emitted, later) / emitted.sum(1))
        psi = np.concatenate([psi, np.zeros((len(psi), N_SYMBOLS - N_BYTES))], axis=1)
        lost = torch.isneginf(self.value)[:, None]
        return torch.from_numpy(psi) - torch.where(lost, 0.0, self.value[:, None])

    async def step(self, symbols: IntArray) -> tuple[HmmLanes, None]:
        """See `Lanes`."""
        belief = self.belief * self.model.emit[:, symbols].T
        belief = belief / belief.sum(1, keepdims=True) @ self.model.step
        state = self.dfa.step(self.state, torch.from_numpy(symbols))
        return HmmLanes(self.model, self.dfa, self.future, state, belief), None

    def gather(self, lanes: IntArray) -> HmmLanes:
        """See `Lanes`."""
        state, belief = self.state[torch.from_numpy(lanes)], self.belief[lanes]
        return HmmLanes(self.model, self.dfa, self.future, state, belief)


class HmmLookahead(Ahead):
    """A look-ahead by an HMM that is trained when a run first asks for it.

    Args:
        rows: of the language model, which training spends; the last texts may go over.
        n_states: hidden states.
        longest: most bytes of a text that is drawn.
        seed: of the texts and of training.
        model: use this one instead.
    """

    strength, defensive = 1.0, 1e-3

    def __init__(
        self, rows: int, n_states: int, longest: int, seed: int, model: ByteHMM | None = None
    ) -> None:
        self.rows, self.n_states, self.longest, self.seed = rows, n_states, longest, seed
        self.model = model

    async def start(
        self, target: Any, leaves: Sequence[Any], max_bytes: int, *, terminated: bool = False
    ) -> HmmLanes:
        """See `Ahead`."""
        if self.model is None:
            self.model = await self._train(target)
        dfa = automata_of(target).dfa
        assert dfa is not None
        assert DEAD == -1  # so that a dead state finds the last row of the future
        table = dfa.host_table()
        future = self.model.future(table.next.astype(np.int64), table.accept, max_bytes)
        future = np.concatenate([future, np.zeros((1, future.shape[1]))])
        return HmmLanes(self.model, dfa, future, torch.zeros(1, dtype=torch.int64),
                        self.model.start[None])  # fmt: skip

    async def _train(self, target: Any) -> ByteHMM:
        llm = reduce(mul, language_models_of(target))
        (engine,) = engines_of([target])
        before, texts = engine.counts.rows, list[IntArray]()
        for batch in range(MOST_BATCHES):
            seed = 1000 * self.seed + batch
            for text in await draw_texts(llm, AT_ONCE, self.longest, seed):
                ended = [EOS_COLUMN] * (len(text) < self.longest)
                texts.append(np.array([*text, *ended], dtype=np.int64))
            if engine.counts.rows - before >= self.rows:
                break
        return ByteHMM.fitted(texts, self.n_states, seed=self.seed)


class PilotLookahead(Ahead):
    """`Lookahead.from_pilot`, made when a run first asks for it, so that its rows are counted."""

    strength, defensive = 1.0, 1e-3

    def __init__(self, seed: int) -> None:
        self.seed, self.ahead = seed, None

    async def start(
        self, target: Any, leaves: Sequence[Any], max_bytes: int, *, terminated: bool = False
    ) -> AheadLanes:
        """See `Ahead`."""
        if self.ahead is None:
            seed = 1_000_003 + self.seed
            self.ahead = await Lookahead.from_pilot(target, 8, max_bytes, rounds=2, seed=seed)
        return await self.ahead.start(target, leaves, max_bytes, terminated=terminated)


Way = Callable[[auto.World, int, int], Awaitable[auto.Weights]]


def ways(n_states: int) -> dict[str, Way]:
    """Return the ways by name, as `auto.WAYS`."""

    def hmm(world: auto.World, rows: int, seed: int) -> Awaitable[auto.Weights]:
        longest = max(len(t.encode()) for t in world.texts)
        ahead = HmmLookahead(rows // 2, n_states, longest + 1, seed)
        return auto._repeated(world, rows, seed, weighed=True, lookahead=ahead)

    def pilot(world: auto.World, rows: int, seed: int) -> Awaitable[auto.Weights]:
        return auto._repeated(world, rows, seed, weighed=True, lookahead=PilotLookahead(seed))

    return {"hmm": hmm, "pilot": pilot, "auto": auto.WAYS["auto"], "smc": auto.WAYS["smc"]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, nargs="*", default=[300])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--states", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=list(auto.CONSTRAINTS), help="constraints")
    parser.add_argument("--ways", nargs="*", default=["hmm", "pilot", "auto", "smc"])
    parser.add_argument("--kept", type=Path, help="keep rows of the model in this file")
    parser.add_argument("--docs", action="store_true", help="update docs/lookahead.md")
    arguments = parser.parse_args()
    auto.WAYS |= ways(arguments.states)
    llm = load_model(arguments.model)
    KeptRows(llm, arguments.kept)
    console, text = Console(width=160), []
    for rows in arguments.rows:
        lines, found = [], []
        for name in arguments.only:
            world = auto.World(llm, *auto.CONSTRAINTS[name])
            measured = auto.measure(world, rows, arguments.seeds, arguments.ways)
            found.append(asyncio.run(measured))
            lines.append(auto.cells(name, found[-1]))
            console.print(rows, *lines[-1], sep=" | ")
        lines.append(auto.means(found))
        console.print(rows, *lines[-1], sep=" | ")
        heads = [f"{rows} rows", *arguments.ways]
        table = (heads, ["---"] * len(heads), *lines)
        text.append("\n".join("| " + " | ".join(row) + " |" for row in table))
    told = f"{arguments.model}, {arguments.seeds} seeds, {arguments.states} hidden states."
    if arguments.docs:
        report.put(report.DOCS / "lookahead.md", "\n\n".join([*text, told]), "hmm")


if __name__ == "__main__":
    main()
