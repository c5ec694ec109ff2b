"""Judge the contexts of deferred lanes after a byte, and fetch the rows that may matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.beam import deferred_numba as dn
from genlm_bytes_smc.beam.deferred_nodes import Nodes
from genlm_bytes_smc.beam.deferred_numba import ABOVE, CTX, NODE, NOT_NOW, POS, TEXT, TOKEN
from genlm_bytes_smc.beam.deferred_rows import RowSource, Wanted
from genlm_bytes_smc.beam.kernels_host import NumbaKernels
from genlm_bytes_smc.beam.model import ByteModel
from genlm_bytes_smc.beam.params import BeamParams
from genlm_bytes_smc.lm.contexts import IntArray

FloatArray = npt.NDArray[np.float64]

AT_ONCE = 4  # rows that a lane asks for in one request


@dataclass(frozen=True)
class Judge:
    """The limits by which lanes judge.

    Attributes:
        model: the byte model, on a CPU.
        params: shares, and how many rows.
        cut: trie positions of the tokens that are no text.
    """

    model: ByteModel
    params: BeamParams
    cut: IntArray

    @property
    def kernels(self) -> NumbaKernels:
        """The arithmetic."""
        kernels = self.model.kernels
        assert isinstance(kernels, NumbaKernels)  # the model is on a CPU
        return kernels

    async def read(
        self, nodes: Nodes, symbols: IntArray, rows: RowSource
    ) -> tuple[Nodes, FloatArray, FloatArray]:
        """Read a byte in every lane of `nodes`, and fetch the rows that may matter after it.

        Returns:
            The nodes, each lane's mass float64[N], and float64[N, 2] of what no row stands for.
        """
        lanes, places = np.nonzero(nodes.live)
        before = nodes.length.copy()
        nodes.text[np.arange(len(before)), before % TEXT] = symbols
        nodes.length += 1
        store = self.model.store
        await store.ensure(nodes.ints[lanes, places, CTX])
        self.follow(nodes, lanes, places, before[lanes])
        lanes, places = rows.adopt(nodes)
        if len(lanes):
            ints = nodes.ints
            above, token = ints[lanes, places, ABOVE], ints[lanes, places, TOKEN]
            ints[lanes, places, CTX] = self.model.engine.tree.children(above, token)
            self.follow(nodes, lanes, places, ints[lanes, places, POS])
        params = self.params
        return nodes, *await self.have_rows(
            nodes, params.deferred_share, params.deferred_merge, rows
        )

    async def have_rows(
        self,
        nodes: Nodes,
        share: float | FloatArray,
        merge: float | FloatArray,
        rows: RowSource,
        *,
        at_end: bool = False,
    ) -> tuple[FloatArray, FloatArray]:
        """Fetch rows until no deferred node's estimated share is above its limit.

        Args:
            nodes: judged by `deferred_numba.judge`; changed in place.
            share, merge, at_end: see there.
            rows: where they come from. What it cannot bring now is not asked for again.

        Returns:
            As `read`.
        """
        tree = self.model.engine.tree
        wanted = np.empty((len(nodes.count), AT_ONCE), dtype=np.int64)
        shares = np.empty(wanted.shape)
        rest = np.empty((len(nodes.count), 2))
        share, merge = (np.full(len(nodes.count), limit) for limit in (share, merge))
        requests = -(-self.params.deferred_rows // AT_ONCE)
        for turn in range(requests + 1):
            masses: FloatArray = dn.judge(
                nodes.ints, nodes.floats, nodes.count, nodes.length,
                share, merge, self.params.deferred_guess, at_end, wanted, shares, rest,
            )  # fmt: skip
            lanes, at = np.nonzero(wanted >= 0)
            if len(lanes) == 0 or turn == requests:
                break
            places = wanted[lanes, at]
            chosen = nodes.ints[lanes, places]
            ids = tree.children(chosen[:, ABOVE], chosen[:, TOKEN])
            there = await rows.bring(nodes, Wanted(ids, shares[lanes, at]))
            nodes.ints[lanes, places, NODE] = np.where(there, -1, NOT_NOW)
            lanes, places = lanes[there], places[there]
            nodes.ints[lanes, places, CTX] = ids[there]
            self.follow(nodes, lanes, places, chosen[there, POS])
        return masses, rest

    def follow(self, nodes: Nodes, lanes: IntArray, places: IntArray, first: IntArray) -> None:
        """Move live nodes along the text, and defer what ends on the way."""
        handles, probs = self.kernels.arrays()
        ends = np.empty((8 * len(lanes) + 64, 5))
        while True:
            found = dn.follow(
                handles, probs, self.cut, nodes.ints, nodes.floats, nodes.length, nodes.text,
                lanes, places, first, ends,
            )  # fmt: skip
            if found <= len(ends):
                break
            ends = np.empty((found, 5))
        ends = ends[:found]
        if found:
            nodes.make_room(int(np.bincount(ends[:, 0].astype(np.int64)).max()))
            dn.defer(nodes.ints, nodes.floats, nodes.count, ends)
