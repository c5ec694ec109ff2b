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
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.alphabet import EOS_COLUMN, N_SYMBOLS
from genlm_bytes_smc.beam.deferred_text import read_texts
from genlm_bytes_smc.beam.known_text import fetch_ahead
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.beam.prompt import Prompt
from genlm_bytes_smc.beam.single import ByteBeamState, lanes_for
from genlm_bytes_smc.beam.state import NOTHING, FloatArray
from genlm_bytes_smc.calls import Coalesced
from genlm_bytes_smc.lm.contexts import IntArray

_Question = tuple[bytes, bool]  # a text whose beam is asked for, and whether its row is, too

NEAR = 32
"""A text this many bytes or fewer beyond what is known is stepped with all its prefixes kept;
of the way to a longer one, every 32nd prefix and the last 32 are."""

_FORESEEN = 6  # bytes to read from which on it pays to fetch rows ahead


@dataclass(eq=False)
class Block:
    """Beams made in one step.

    Attributes:
        lanes: n of them.
        weight: float64[n] on the host: log weight of each lane's text, nats.
        entries: how many texts the cache finds here; at none the block is forgotten.
        rows: float64[n, 257] on the host, next-symbol rows of the lanes.
        has_row: bool[n], lanes whose row was asked for; the other rows are not filled in.
    """

    lanes: Any
    weight: FloatArray
    entries: int = 0
    nbytes: int = field(init=False)
    rows: torch.Tensor = field(init=False)
    has_row: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.weight)
        self.rows = torch.empty((n, N_SYMBOLS), dtype=torch.float64)
        self.has_row = np.zeros(n, dtype=bool)
        self.nbytes = self.lanes.nbytes + self.weight.nbytes + self.rows.nbytes

    async def fill(self) -> None:
        """Compute the rows of all lanes."""
        self.rows = await self.lanes.rows()
        self.has_row[:] = True


class Entry(NamedTuple):
    """The beam of one text: lane `lane` of `block`."""

    block: Block
    lane: int


@dataclass(eq=False)
class _Walk:
    """How far a text has come: `entry` is the beam of its first `at` bytes (None: it is
    impossible)."""

    text: bytes
    entry: Entry | None
    at: int


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
        self, model: ByteModel, params: BeamParams, prompt: Prompt, max_entries: int, max_bytes: int
    ) -> None:
        self.model, self.params, self.prompt = model, params, prompt
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.evicted = self.nbytes = 0
        self._known: OrderedDict[bytes, Entry] = OrderedDict()
        self._root: Entry | None = None
        self.requests = Coalesced[_Question, Entry | None]()

    def __len__(self) -> int:
        """Return the number of texts remembered."""
        return len(self._known)

    # -- questions ---------------------------------------------------------------------

    async def entries(self, texts: Sequence[bytes], *, rows: bool = False) -> list[Entry | None]:
        """Return the beam of each text, with its row if `rows`; None for one of weight zero."""
        found = [self._find(text) for text in texts]
        if all(e is not None and (not rows or e.block.has_row[e.lane]) for e in found):
            return found
        return await self.requests.ask([(text, rows) for text in texts], self._serve)

    async def rows(self, texts: Sequence[bytes]) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Next-symbol rows, float64[N, 257] on the host, -inf for impossible texts; which are
        possible."""
        entries = await self.entries(texts, rows=True)
        possible = np.array([entry is not None for entry in entries])
        out = torch.full((len(texts), N_SYMBOLS), -torch.inf, dtype=torch.float64)
        for block, where, lanes in by_block(entries):
            out[torch.from_numpy(where)] = block.rows[torch.from_numpy(lanes)]
        return out, possible

    async def weights(self, texts: Sequence[bytes], *, complete: bool = False) -> FloatArray:
        """Log weights float64[N], nats: of the texts as prefixes or as whole texts."""
        if self.deferred:
            entries = await self.entries(texts)
            return await self._ended(entries) if complete else _weights_of(entries, -np.inf)
        if complete:
            return extended(await self.entries(texts, rows=True), [EOS_COLUMN] * len(texts))
        found = [self._find(text) for text in texts]
        out = _weights_of(found, 0.0)
        unknown = [n for n, text in enumerate(texts) if text and found[n] is None]
        if unknown:
            last = [texts[n][-1] for n in unknown]
            before = await self.entries([texts[n][:-1] for n in unknown], rows=True)
            out[unknown] = extended(before, last)
        return out

    async def _ended(self, entries: Sequence[Entry | None]) -> FloatArray:
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

    async def _serve(self, questions: list[_Question]) -> dict[_Question, Entry | None]:
        with self.model.engine.tree.one_thread:
            entries = await self._step_to(list(dict.fromkeys(text for text, _ in questions)))
            await fill_rows([entries[text] for text, row in questions if row])
            return {(text, row): entries[text] for text, row in questions}

    async def _step_to(self, texts: list[bytes]) -> dict[bytes, Entry | None]:
        if (root := self._root) is None:
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
        lanes, _ = await read_texts(lanes, [w.text[w.at :] for w in walks])
        block = Block(lanes, self._weigh(lanes))
        for lane, w in enumerate(walks):
            self._arrive(w, len(w.text), Entry(block, lane))

    def _weigh(self, lanes: Any) -> FloatArray:
        """Return the log weights of deferred lanes' texts, float64[n], nats."""
        assert self._root is not None
        return np.asarray(lanes.log_z - self._root.block.lanes.log_z[0])

    async def _read_prompt(self) -> Entry:
        lanes = await read_prompt(self.model, self.params, self.prompt)
        if lanes.log_z[0] == -np.inf:
            raise ValueError(
                "the model gives the prompt probability zero with these beam parameters; a "
                f"larger K, a lower threshold or healing may help: {self.params}"
            )
        block = Block(lanes, np.zeros(1))
        if not self.deferred:
            await block.fill()
        return Entry(block, 0)

    def _walk(self, text: bytes, root: Entry) -> _Walk:
        """From the longest prefix of `text` that is known."""
        known = ((at, self._find(text[:at])) for at in range(len(text), 0, -1))
        at, entry = next((x for x in known if x[1] is not None), (0, root))
        return _Walk(text, entry, at)

    async def _advance(self, walks: list[_Walk]) -> list[_Walk]:
        """One byte on for every walk, equal ones once; those that are not at their end."""
        symbols = [w.text[w.at] for w in walks]
        weight = np.zeros(len(walks))
        if not self.deferred:
            weight = extended([w.entry for w in walks], symbols)
        steps: dict[tuple[Entry, int], float] = {}
        alive = []
        for w, symbol, logw in zip(walks, symbols, weight.tolist(), strict=True):
            if w.entry is None or logw == -np.inf:
                w.entry = None
            else:
                steps[w.entry, symbol] = logw
                alive.append((w, (w.entry, symbol)))
        if not alive:
            return []
        every = list(steps)
        lanes, order = side_by_side([entry for entry, _ in every])
        every = [every[i] for i in order]
        lanes = await lanes.step(np.array([symbol for _, symbol in every], dtype=np.int64))
        served = self._weigh(lanes) if self.deferred else np.array([steps[s] for s in every])
        block = Block(lanes, served)
        if not self.deferred:
            await block.fill()
        lane_of = {step: lane for lane, step in enumerate(every)}
        for w, step in alive:
            self._arrive(w, w.at + 1, Entry(block, lane_of[step]))
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

    def _arrive(self, walk: _Walk, at: int, entry: Entry) -> None:
        """Note the beam of a walk's first `at` bytes, and remember it where texts may meet."""
        block, key = entry.block, walk.text[:at]
        possible = block.weight[entry.lane] > -np.inf
        walk.at, walk.entry = at, entry if possible else None
        passing = len(walk.text) - at > NEAR and at % NEAR
        if possible and not passing and key not in self._known:
            self._known[key] = entry
            self.nbytes += block.nbytes if block.entries == 0 else 0
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
    begins to act after the prompt; the beam is K wide in it as elsewhere. A `lane_seed` gives it a
    random beam of its own.
    """
    wide = dataclasses.replace(params, prune_threshold=0.0) if params.unbiased else params
    seeds = None if lane_seed is None else [lane_seed]
    start = await lanes_for(wide).start(model, wide, lane_seeds=seeds)
    return (await ByteBeamState(start).prefill(prompt)).lanes.with_params(params)


async def fill_rows(entries: Sequence[Entry | None]) -> None:
    """Compute the next-symbol rows that beams still lack."""
    lacking = list(dict.fromkeys(e for e in entries if e and not e.block.has_row[e.lane]))
    if not lacking:
        return
    first = lacking[0].block
    if len(lacking) == len(first.weight) and all(e.block is first for e in lacking):
        await first.fill()
        return
    lanes, order = side_by_side(lacking)
    rows = await lanes.rows()
    for block, where, at in by_block([lacking[i] for i in order]):
        block.rows[torch.from_numpy(at)] = rows[torch.from_numpy(where)]
        block.has_row[at] = True


def side_by_side(entries: list[Entry]) -> tuple[Any, IntArray]:
    """Put the lanes of `entries` side by side, lane j being that of `entries[order[j]]`."""
    blocks = by_block(entries)
    lanes = [block.lanes.gather(lane) for block, _, lane in blocks]
    order = np.concatenate([where for _, where, _ in blocks])
    return lanes[0] if len(lanes) == 1 else type(lanes[0]).cat(lanes), order


def by_block(entries: Sequence[Entry | None]) -> list[tuple[Block, IntArray, IntArray]]:
    """(block, places in `entries`, lanes) of each block among the entries."""
    places: defaultdict[Block, list[tuple[int, int]]] = defaultdict(list)
    for n, entry in enumerate(entries):
        if entry is not None:
            places[entry.block].append((n, entry.lane))
    pairs = [(block, np.array(p, dtype=np.int64)) for block, p in places.items()]
    return [(block, p[:, 0], p[:, 1]) for block, p in pairs]


def extended(entries: Sequence[Entry | None], columns: Sequence[int]) -> FloatArray:
    """Log weight of each text with one more symbol, float64[N], nats."""
    out = np.full(len(entries), -np.inf)
    column = np.asarray(columns, dtype=np.int64)
    for block, where, lanes in by_block(entries):
        out[where] = block.weight[lanes] + block.rows.numpy()[lanes, column[where]]
    return out


def _weights_of(entries: Sequence[Entry | None], none: float) -> FloatArray:
    """Return the log weight of each text, float64[N], nats; `none` for one without a beam."""
    return np.array([none if e is None else e.block.weight[e.lane] for e in entries], dtype=float)
