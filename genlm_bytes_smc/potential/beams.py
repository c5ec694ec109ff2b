"""The beams of many texts after one prompt: found by their bytes, made together.

What a text's entry holds is a place in a block: beams that were made in one step stay side
by side in one `ByteLanes`, and an entry is (block, lane). A text's log weight is the sum of
the rows served along it,

    weight("") = 0        weight(x b) = weight(x) + row(x)[b]

so it needs no more than the beam of the text without its last byte, and the law

    prefix(x b) - prefix(x) = logw_next(x)[b]

holds to the last digit however the beam prunes. With `prune="deferred"` a text's weight is what
its beam says once it has read the last byte, so no row is needed on the way to it: a text that
is far from what is known is read as a whole (`beam.deferred_text`).
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.beam.deferred_text import read_texts
from genlm_bytes_smc.beam.kernels import NOTHING
from genlm_bytes_smc.beam.known_text import fetch_ahead
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.single import ByteBeamState, lanes_for
from genlm_bytes_smc.coalesce import Coalesced
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.potential.blocks import (
    Block,
    Entry,
    by_block,
    extended,
    fill_rows,
    pick,
    side_by_side,
    weight_of,
)

FloatArray = npt.NDArray[np.float64]

NEAR = 32
"""A text this many bytes or fewer beyond what is known is stepped with all its prefixes kept;
of the way to a longer one, every 32nd prefix and the last 32 are."""

_FORESEEN = 6  # bytes to read from which on it pays to fetch rows ahead


@dataclass(eq=False)
class _Walk:
    """How far a text has come: `entry` is the beam of its first `at` bytes (None: it is
    impossible)."""

    text: bytes
    entry: Entry | None
    at: int


class Question(NamedTuple):
    """A text whose beam is asked for, and whether its next-symbol row is needed, too."""

    text: bytes
    row: bool


class Beams:
    """The beams of texts after a prompt, remembered by their bytes.

    Args:
        model: the byte model.
        params: how to prune.
        prompt: what every text comes after.
        max_entries: most texts remembered, the least recently used forgotten first.
        max_bytes: most memory their beams take.

    What one batch needs is always held. A forgotten beam is made again when asked for, and
    comes out the same but for rounding.
    """

    def __init__(
        self,
        model: ByteModel,
        params: BeamParams,
        prompt: Prompt,
        max_entries: int,
        max_bytes: int,
    ) -> None:
        self.model, self.params, self.prompt = model, params, prompt
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.evicted = 0
        self.nbytes = 0
        self._known: OrderedDict[bytes, Entry] = OrderedDict()
        self._root: Entry | None = None
        self._requests = Coalesced[Question, Entry | None]()

    def __len__(self) -> int:
        """Return the number of texts remembered."""
        return len(self._known)

    @property
    def batches(self) -> int:
        """Return the number of batches of questions served."""
        return self._requests.batches

    # -- questions ---------------------------------------------------------------------

    async def entries(self, texts: Sequence[bytes], *, rows: bool = False) -> list[Entry | None]:
        """Return the beam of each text, with its row if `rows`; None for one of weight zero."""
        found = [self._find(text) for text in texts]
        if all(e is not None and (not rows or e.block.has_row[e.lane]) for e in found):
            return found
        return await self._requests.ask([Question(text, rows) for text in texts], self._serve)

    async def rows(self, texts: Sequence[bytes]) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Next-symbol rows, float64[N, 257], -inf for impossible texts; which are possible."""
        entries = await self.entries(texts, rows=True)
        possible = np.array([entry is not None for entry in entries])
        blocks = by_block(entries)
        if len(blocks) == 1 and possible.all():
            ((block, _, lanes),) = blocks
            return pick(block.rows, lanes), possible
        device = self.model.engine.device
        out = torch.full((len(texts), N_SYMBOLS), -torch.inf, dtype=torch.float64, device=device)
        for block, where, lanes in blocks:
            out[torch.from_numpy(where).to(device)] = pick(block.rows, lanes)
        return out, possible

    async def weights(self, texts: Sequence[bytes], *, complete: bool = False) -> FloatArray:
        """Log weights float64[N], nats: of the texts as prefixes or as whole texts."""
        if complete and self.deferred:
            return await self._whole(await self.entries(texts))
        if complete:
            return extended(await self.entries(texts, rows=True), [EOS_COLUMN] * len(texts))
        if self.deferred:
            return weight_of(await self.entries(texts))
        out = np.zeros(len(texts))
        unknown = []
        for n, text in enumerate(texts):
            entry = self._find(text) if text else None
            if entry is not None:
                out[n] = entry.block.weight[entry.lane]
            elif text:
                unknown.append(n)
        if unknown:
            last = [texts[n][-1] for n in unknown]
            before = await self.entries([texts[n][:-1] for n in unknown], rows=True)
            out[unknown] = extended(before, last)
        return out

    async def _whole(self, entries: Sequence[Entry | None]) -> FloatArray:
        """Return log weights of deferred lanes' texts as whole ones, float64[N], nats."""
        out = np.full(len(entries), -np.inf)
        known = np.flatnonzero([entry is not None for entry in entries])
        if len(known):
            lanes, order = side_by_side([entry for entry in entries if entry])
            ended = await lanes.step([EOS_COLUMN] * len(order))
            out[known[order]] = self._weigh(ended)
        return out

    async def root(self) -> Any:
        """Return the lane after the prompt."""
        (entry,) = await self.entries([b""])
        assert entry is not None
        return entry.block.lanes

    @property
    def deferred(self) -> bool:
        """Return whether a text's weight is known only once its last byte is read."""
        return self.params.prune == "deferred"

    def clear(self) -> None:
        """Forget every beam, the prompt's too.

        Raises:
            RuntimeError: the model is answering another thread.
        """
        with self.model.engine.tree.one_thread:
            for entry in self._known.values():
                entry.block.entries = 0
            self._known.clear()
            self._root = None
            self.nbytes = 0

    # -- making beams ------------------------------------------------------------------

    async def _serve(self, questions: list[Question]) -> dict[Question, Entry | None]:
        with self.model.engine.tree.one_thread:
            entries = await self._step_to(list(dict.fromkeys(q.text for q in questions)))
            await fill_rows([entries[q.text] for q in questions if q.row])
            return {q: entries[q.text] for q in questions}

    async def _step_to(self, texts: list[bytes]) -> dict[bytes, Entry | None]:
        root = self._root
        if root is None:
            root = self._root = await self._read_prompt()
        walks = [self._walk(text, root) for text in texts]
        going = [w for w in walks if w.at < len(w.text)]
        if self.deferred:
            far = [w for w in going if len(w.text) - w.at >= _FORESEEN]
            going = [w for w in going if len(w.text) - w.at < _FORESEEN]
            if far:
                await self._read_whole(far)
                self._shrink(len(texts))
        while going:
            ahead, bytes_ahead = await self._look_ahead(going)
            with self.model.engine.tree.pinned(ahead):
                while going and bytes_ahead:
                    going, bytes_ahead = await self._advance(going), bytes_ahead - 1
                    self._shrink(len(texts))
        return {w.text: w.entry for w in walks}

    async def _read_whole(self, walks: list[_Walk]) -> None:
        """Read all that is left of each text."""
        lanes, order = side_by_side([w.entry for w in walks if w.entry])
        walks = [walks[i] for i in order]
        lanes = await read_texts(lanes, [w.text[w.at :] for w in walks])
        block = Block(lanes, self._weigh(lanes))
        for lane, w in enumerate(walks):
            w.at = len(w.text)
            w.entry = Entry(block, lane) if block.weight[lane] > -np.inf else None
            if w.entry is not None:
                self._remember(w)

    def _weigh(self, lanes: Any) -> FloatArray:
        """Return the log weights of deferred lanes' texts, float64[n], nats."""
        assert self._root is not None
        weights: FloatArray = lanes.log_z - self._root.block.lanes.log_z[0]
        return weights

    async def _read_prompt(self) -> Entry:
        lanes = await read_prompt(self.model, self.params, self.prompt)
        if lanes.log_z[0] == -np.inf:
            raise ValueError(
                "the model gives the prompt probability zero with these beam parameters; a "
                f"larger K, a lower threshold or healing may help: {self.params}"
            )
        block = Block(lanes, np.zeros(1))
        return Entry(block if self.deferred else await block.fill(), 0)

    def _walk(self, text: bytes, root: Entry) -> _Walk:
        """From the longest prefix of `text` that is known."""
        for at in range(len(text), 0, -1):
            entry = self._find(text[:at])
            if entry is not None:
                return _Walk(text, entry, at)
        return _Walk(text, root, 0)

    async def _advance(self, walks: list[_Walk]) -> list[_Walk]:
        """One byte on for every walk, equal ones once; those that are not at their end."""
        columns = [w.text[w.at] for w in walks]
        entries = [w.entry for w in walks]
        weight = np.zeros(len(walks)) if self.deferred else extended(entries, columns)
        alive = []
        for w, logw in zip(walks, weight, strict=True):
            if logw == -np.inf:
                w.entry = None
            else:
                alive.append((w, logw))
        if not alive:
            return []
        lane_of: dict[tuple[int, int, int], int] = {}
        parents, symbols, weights, places = list[Entry](), list[int](), list[float](), list[int]()
        for w, logw in alive:
            assert w.entry is not None
            step = (id(w.entry.block), w.entry.lane, w.text[w.at])
            if step not in lane_of:
                lane_of[step] = len(parents)
                parents.append(w.entry)
                symbols.append(step[2])
                weights.append(logw)
            places.append(lane_of[step])
        lanes, order = side_by_side(parents)
        lanes = await lanes.step(np.array(symbols, dtype=np.int64)[order])
        served = self._weigh(lanes) if self.deferred else np.array(weights)[order]
        block = Block(lanes, served)
        if not self.deferred:
            await block.fill()
        lane_at = np.argsort(order)
        for (w, _), place in zip(alive, places, strict=True):
            lane = int(lane_at[place])
            w.entry = Entry(block, lane) if served[lane] > -np.inf else None
            w.at += 1
            if w.entry is not None:
                self._remember(w)
        return [w for w, _ in alive if w.entry is not None and w.at < len(w.text)]

    async def _look_ahead(self, walks: list[_Walk]) -> tuple[IntArray, int]:
        """Rows for the bytes to come, if they are many; how many bytes to step then."""
        far = [w for w in walks if len(w.text) - w.at >= _FORESEEN]
        if not far or self.deferred:
            return NOTHING, 1
        store = self.model.store
        limit = store.limit_bytes // (32 * store.trie.n_tokens * len(far))  # a quarter of its rows
        span = min(max(limit, NEAR), 2048)
        lanes, order = side_by_side([w.entry for w in far if w.entry])
        texts = [w.text[w.at : w.at + span] for w in far]
        return await fetch_ahead(lanes, [texts[i] for i in order]), span

    # -- remembering -------------------------------------------------------------------

    def _find(self, text: bytes) -> Entry | None:
        if not text:
            return self._root
        entry = self._known.get(text)
        if entry is not None:
            self._known.move_to_end(text)
        return entry

    def _remember(self, walk: _Walk) -> None:
        ahead, key = len(walk.text) - walk.at, walk.text[: walk.at]
        if (ahead > NEAR and walk.at % NEAR) or key in self._known:
            return
        assert walk.entry is not None
        block = walk.entry.block
        self._known[key] = walk.entry
        if block.entries == 0:
            self.nbytes += block.nbytes
        block.entries += 1

    def _shrink(self, least: int) -> None:
        """Forget the least recently used, but not what the last `least` questions need."""
        most = max(self.max_entries, least)
        while len(self) > most or (self.nbytes > self.max_bytes and len(self) > least):
            _, entry = self._known.popitem(last=False)
            self.evicted += 1
            entry.block.entries -= 1
            if entry.block.entries == 0:
                self.nbytes -= entry.block.nbytes


async def read_prompt(
    model: ByteModel, params: BeamParams, prompt: Prompt, lane_seed: int | None = None
) -> Any:
    """Return the lane after a prompt, in which no extension is thinned.

    Each text of a run hangs on its prompt's beam, and a threshold that is harmless on average
    can kill it at one unlikely token boundary. With `prune="unbiased"` the threshold therefore
    begins to act after the prompt; the beam is K wide in it as elsewhere.

    Args:
        model, params: of the lane.
        prompt: what it reads.
        lane_seed: a further seed, for a random beam of its own.
    """
    wide = dataclasses.replace(params, prune_threshold=0.0) if params.unbiased else params
    seeds = None if lane_seed is None else [lane_seed]
    start = await lanes_for(wide).start(model, wide, lane_seeds=seeds)
    return (await ByteBeamState(start).prefill(prompt)).lanes.with_params(params)
