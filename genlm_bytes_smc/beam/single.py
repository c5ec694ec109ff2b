"""`ByteBeamState`: one text's beam, with the names and meaning of genlm-bytes 0.2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from genlm_bytes_smc.beam import display
from genlm_bytes_smc.beam.deferred import DeferredLanes
from genlm_bytes_smc.beam.display import EOS, Candidate, LazyByteProbs
from genlm_bytes_smc.beam.known_text import follow_likeliest, read_text
from genlm_bytes_smc.beam.lanes import ByteLanes
from genlm_bytes_smc.beam.model import byte_model
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt, Spelled
from genlm_bytes_smc.beam.state import EOS_COLUMN, N_BYTES, check_byte
from genlm_bytes_smc.lm.contexts import start_tokens
from genlm_bytes_smc.lm.engine import LMCounts
from genlm_bytes_smc.lm.rows import RowTransform

_TRIE_OPTIONS = {"max_batch_size", "device", "eot_sentinel", "eos_byte_strings"}

Draw = Callable[[Mapping[int | None, float]], int | None]


def sample_dict(probabilities: Mapping[int | None, float]) -> int | None:
    """Draw a key by NumPy's global generator, as genlm-bytes does by default: the same for the
    same `np.random.seed`."""
    keys, sums = list(probabilities), np.cumsum(list(probabilities.values()))
    return keys[int(sums.searchsorted(np.random.uniform() * sums[-1]))]


def lanes_for(params: BeamParams) -> type[ByteLanes] | type[DeferredLanes]:
    """Return the class of beams that prunes as `params` say."""
    return DeferredLanes if params.prune == "deferred" else ByteLanes


class ByteBeamState:
    """The beam of one text: candidates, their weights, and the next byte's distribution.

    A value: `prefill`, `prune` and `<<` return new beams. Make one with `initial`.
    """

    def __init__(self, lanes: ByteLanes | DeferredLanes, ends: Sequence[Candidate] = ()) -> None:
        if len(lanes) != 1:
            raise ValueError(f"a ByteBeamState shows one lane, got {len(lanes)}")
        self._lanes, self._to_prune = lanes, False
        self._ends = tuple(ends)  # what the text's end was read from, to be shown

    @classmethod
    async def initial(
        cls,
        llm: Any,
        params: BeamParams,
        trie_opts: Mapping[str, Any] | None = None,
        *,
        transform: RowTransform | None = None,
        start: Sequence[int] | None = None,
    ) -> ByteBeamState:
        """Return a beam that has read nothing.

        Args:
            llm: a genlm-backend AsyncLM, or an engine from `load_model`.
            params: beam width, pruning, end of sequence, healing.
            trie_opts: options of genlm-bytes' trie. "max_batch_size", "device" and
                "eot_sentinel" are taken and have no effect (nothing is batched by the trie,
                which follows the model).
            transform: temperature, top-k and top-p of the token-level rows.
            start: token ids the text begins after, instead of the model's own start.

        Raises:
            TypeError: `params` is no BeamParams, `transform` no RowTransform, or `start` no
                token ids.
            ValueError: an unknown trie option, an end-of-sequence spelling that no token
                has, or a start that is empty or has an id that the model lacks.
        """
        if not isinstance(params, BeamParams):
            raise TypeError(f"params must be a BeamParams, got {type(params).__name__}")
        unknown = set(trie_opts or ()) - _TRIE_OPTIONS
        if unknown:
            raise ValueError(f"unknown trie options: {sorted(unknown)}")
        model = byte_model(llm, transform)
        context = None if start is None else start_tokens(None, start, model.engine.input_size)
        return cls(await lanes_for(params).start(model, params, context=context))

    @property
    def lanes(self) -> Any:
        """The beam as one lane of `ByteLanes`."""
        if self._to_prune:
            self._lanes, self._to_prune = self._lanes.prune(), False
        return self._lanes

    # -- genlm-bytes' verbs ------------------------------------------------------------

    async def prefill(self, prompt: Prompt | bytes | Sequence[int]) -> ByteBeamState:
        """Read a prompt, in which end-of-sequence tokens are ordinary tokens.

        Args:
            prompt: bytes, integers 0..255, or a `Prompt` (text, token ids, chat messages).

        Raises:
            TypeError: text, where bytes or a `Prompt` are due.
            ValueError: the text has ended.
            ContextTooLongError: the prompt does not fit the model's window.
        """
        self._check_not_ended()
        lanes = self.lanes
        for segment in Prompt.of(prompt).segments:
            if isinstance(segment, Spelled):
                lanes = await lanes.as_prompt(literal=segment.literal)
                if not self.params.verbose:
                    lanes = await read_text(lanes, segment.spelling)
                    continue
                for byte in segment.spelling:  # one by one, to show each
                    lanes = self._after(await lanes.prune().read(byte)).lanes
            else:
                lanes = await (await lanes.as_prompt()).feed(segment.ids)
        return ByteBeamState(await (await lanes.as_prompt()).as_text())

    async def logp_next(self) -> LazyByteProbs:
        """Log probabilities of the next byte and of the end of the sequence.

        Raises:
            ValueError: the beam is empty or has ended.
        """
        self._check_alive()
        return LazyByteProbs.from_row((await self.lanes.rows())[0])

    def prune(self) -> ByteBeamState:
        """Keep at most K candidates, as the parameters say.

        Pruned when something of it is asked for; `<<` does both in one go.
        """
        beam = ByteBeamState(self.lanes, self._ends)
        beam._to_prune = True
        return beam

    async def __lshift__(self, byte: int) -> ByteBeamState:
        """Read one more byte without pruning; 257 ends the text.

        A byte that nothing can read leaves an empty beam with logZ = -inf.

        Raises:
            TypeError, ValueError: not a byte; or the text has ended.
        """
        self._check_not_ended()
        if not isinstance(byte, bool) and byte == EOS:
            return self._after(await self.lanes.step([EOS_COLUMN]), await self._endings())
        if self._to_prune:
            return self._after(await self._lanes.prune_and_read(check_byte(byte)))
        return self._after(await self.lanes.read(check_byte(byte)))

    async def greedy(self, context: Prompt | bytes | Sequence[int], steps: int) -> bytes:
        """`context` and the likeliest next byte, `steps` times or to the end of the text."""
        return await self._generate(context, steps, None)

    async def sample(
        self,
        context: Prompt | bytes | Sequence[int],
        steps: int,
        draw: Draw = sample_dict,
        *,
        seed: int | None = None,
    ) -> bytes:
        """`context` and `steps` bytes drawn from the model, fewer if the text ends.

        Args:
            context: what the text begins with.
            steps: how many bytes to draw.
            draw: takes a dictionary from byte (257: the end) to probability, returns a key.
            seed: of a generator used instead of `draw`.
        """
        if seed is not None:
            return await self._generate(context, steps, _seeded(np.random.default_rng(seed)))
        return await self._generate(context, steps, partial(_drawn, draw))

    async def cleanup(self) -> None:
        """Nothing is left to clean: a beam holds arrays, and no task or thread."""

    # -- what it knows -----------------------------------------------------------------

    @property
    def params(self) -> BeamParams:
        """The parameters it was made with."""
        return self._lanes.params

    @property
    def logZ(self) -> float:  # noqa: N802 - genlm-bytes' name
        """Log of the total weight, nats: the estimated prefix probability of what was read."""
        return float(self.lanes.log_z[0])

    @property
    def dropped(self) -> float:
        """Log of all the mass that pruning dropped so far, nats (-inf: none).

        A bound on what was lost: exp(logZ) <= Z <= exp(logZ) + exp(dropped), healing aside.
        """
        return float(self.lanes.log_dropped[0])

    @property
    def heals(self) -> int:
        """Return how often this beam was healed."""
        return int(self.lanes.heals[0])

    @property
    def counts(self) -> LMCounts:
        """Return what the model was asked to do so far, by all who use it."""
        counts: LMCounts = self.lanes.model.engine.counts
        return counts

    @property
    def ended(self) -> bool:
        """Return whether the end of the sequence has been read."""
        return bool(self._lanes.ended[0])

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The candidates, best first; of a text that has ended, those it ended after."""
        if self.ended:
            return list(self._ends)
        state = self.lanes.state
        nodes, contexts = state.nodes[0], state.ctx[0]
        weights = state.logw[0].tolist()
        best = max(weights, default=-np.inf)  # pruning keeps it in any case
        out = [
            self._candidate(int(context), int(node), logw, self.logZ, logw == best, False)
            for node, context, logw in zip(nodes, contexts, weights, strict=True)
            if node >= 0
        ]
        return sorted(out, key=lambda c: -c.logw)

    @property
    def states(self) -> list[Candidate]:
        """`candidates`, by genlm-bytes' name."""
        return self.candidates

    def __iter__(self) -> Iterator[Candidate]:
        """Return the candidates, best first."""
        return iter(self.candidates)

    def __len__(self) -> int:
        """Return the number of candidates."""
        if self.ended:
            return len(self._ends)
        return int((self.lanes.state.nodes >= 0).sum())

    def __repr__(self) -> str:
        return display.as_text(self.logZ, self.candidates, colour=sys.stdout.isatty())

    def _repr_html_(self) -> str:
        return display.as_html(self.logZ, self.candidates)

    # -- parts -------------------------------------------------------------------------

    def _candidate(
        self, context: int, node: int, logw: float, log_z: float, best: bool, ended: bool
    ) -> Candidate:
        model = self.lanes.model
        ids = tuple(model.engine.tree.tokens(context))
        share = float(np.exp(logw - log_z))
        kept = best or share > self.params.prune_threshold
        partial = model.trie.spell(node)
        return Candidate(logw, share, model.spellings(ids), partial, kept, ended, ids)

    async def _endings(self) -> list[Candidate]:
        """Return what the text may have ended after, best first."""
        lanes = self.lanes
        ids = lanes.model.eos_ids(self.params.eos)
        found = []
        with lanes.model.engine.tree.one_thread:
            state = await lanes.extended()
            nodes, contexts = state.nodes[0], state.ctx[0]
            for c in np.flatnonzero(nodes == 0).tolist():
                p = sum(lanes.model.store.prob(int(contexts[c]), token) for token in ids)
                if p > 0:
                    found.append((float(state.logu[0, c]) + float(np.log(p)), int(contexts[c])))
        total = float(np.logaddexp.reduce([logw for logw, _ in found])) if found else -np.inf
        ordered = sorted(found, reverse=True)
        return [self._candidate(at, 0, logw, total, False, True) for logw, at in ordered]

    def _after(self, lanes: Any, ends: Sequence[Candidate] = ()) -> ByteBeamState:
        beam = ByteBeamState(lanes, ends)
        if self.params.verbose:
            sys.stdout.write(f"\n{beam!r}\n")  # `verbose` asks for just this
        return beam

    def _check_not_ended(self) -> None:
        if self.ended:
            raise ValueError("the text has ended; nothing can be read after the end")

    def _check_alive(self) -> None:
        if self.ended:
            raise ValueError("the text has ended; there is no next byte")
        if self.logZ == -np.inf:
            raise ValueError("the beam is empty: no candidate could read the last byte")

    async def _generate(
        self,
        context: Prompt | bytes | Sequence[int],
        steps: int,
        choose: Callable[[torch.Tensor], int] | None,
    ) -> bytes:
        if isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 0:
            raise ValueError(f"steps must be an integer of at least 0, got {steps!r}")
        prompt = Prompt.of(context)
        beam = await self.prefill(prompt)
        out = bytearray(prompt.spell(self.lanes.model.vocab))
        given = len(out)
        quick = choose is None and isinstance(beam.lanes, ByteLanes)
        quick = quick and not self.params.verbose
        while len(out) - given < steps:
            if quick:
                left = steps - (len(out) - given)
                lanes, read, ends = await follow_likeliest(beam.lanes, left)
                beam = ByteBeamState(lanes)
                out += read
                if ends or len(read) == left:
                    break
            beam._check_alive()
            beam = beam.prune()  # first, so that no row is computed for what it drops
            row = (await beam.lanes.rows())[0]
            symbol = int(row.argmax()) if choose is None else choose(row)
            if symbol == EOS_COLUMN:
                break
            beam = await (beam << symbol)
            out.append(symbol)
        return bytes(out)


def draw(rows: torch.Tensor, rng: np.random.Generator | None) -> list[int]:
    """Return a symbol of each row of log weights, [N, symbols]; the likeliest without `rng`."""
    if rng is None:
        return [int(symbol) for symbol in rows.argmax(dim=1).tolist()]
    p = torch.softmax(rows, dim=1).cpu().numpy()
    below = p.cumsum(axis=1) / p.sum(axis=1, keepdims=True) <= rng.random((len(p), 1))
    return [int(symbol) for symbol in below.sum(axis=1)]


def _seeded(rng: np.random.Generator) -> Callable[[torch.Tensor], int]:
    return lambda row: draw(row[None], rng)[0]


def _drawn(draw: Draw, row: torch.Tensor) -> int:
    """Draw a column by a user's `draw`, which wants a dictionary of probabilities."""
    drawn = draw(LazyByteProbs.from_row(row).materialize().map_values(np.exp))
    if drawn == EOS:
        return EOS_COLUMN
    if drawn is None or not 0 <= drawn < N_BYTES:
        raise ValueError(f"draw must return a byte 0..255 or {EOS}, got {drawn!r}")
    return int(drawn)
