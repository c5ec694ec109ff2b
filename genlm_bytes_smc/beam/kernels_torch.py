"""The beam's verbs on torch tensors, written for a GPU: the host plans, the device sums.

A transfer from the device to the host (a sync) drains the GPU's queue, so each one is worth
avoiding; `syncs` counts them. Most of what a verb must know to size its arrays, the host knows
already: every context id was made there, and which nodes a beam holds comes back with each
pruning. So states' contexts, nodes and total weights are kept on the host beside the tensors
(`HostSide`), and a verb

1. plans on the host, vectorised: which candidates take part, the slots of their rows, how
   many probabilities each of them reads;
2. sends the plan over in one small asynchronous copy (there is no second table of slots on the
   device that could go stale);
3. sums on the device (`torch_parts`).

`step` of `ByteLanes` then takes two syncs, the weights of `extensions` and what `select` or
`resample` kept; a byte of a prompt takes three. `next_block` sums each distinct row of candidates
at the root once, and keeps the masses of all children for the `advance` that mostly follows.

`kernels_fused` does the same sums in fewer launches where Triton is at hand; this is its oracle.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam.composed import Composed, keep_above
from genlm_bytes_smc.beam.rng import PRUNE, uniforms
from genlm_bytes_smc.beam.state import N_BYTES, Array, BeamState, Extensions, FloatArray
from genlm_bytes_smc.beam.torch_parts import (
    FLAT_LIMIT,
    ChildMasses,
    HostSide,
    Kept,
    RangeSums,
    chunks,
    keep_largest,
    keep_unbiased,
    most_of,
)
from genlm_bytes_smc.lm.contexts import IntArray
from genlm_bytes_smc.lm.devices import send
from genlm_bytes_smc.lm.rows import RowStore


class TorchKernels(Composed):
    """`Kernels` on torch tensors, on the device of the store's engine, where its rows live.

    Host arrays that verbs return may be shared with the states: read them only. `flat_limit` says
    how many probabilities are gathered at once.
    """

    def __init__(self, store: RowStore, flat_limit: int = FLAT_LIMIT) -> None:
        self.store = store
        self.device = store.engine.device
        self.sums = RangeSums(store, flat_limit)
        self.syncs = 0  # transfers from the device to the host so far
        self._known = HostSide()
        self._summed: deque[ChildMasses] = deque(maxlen=2)

    def _fetch(self, tensor: torch.Tensor) -> npt.NDArray[Any]:
        """To the host; the only place where anything waits for the device."""
        self.syncs += 1
        return tensor.cpu().numpy()

    def _send(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """To the device, without waiting for it."""
        return send(array, self.device)

    def _slots(self, state: BeamState, at: IntArray) -> IntArray:
        """Slots in the store of the candidates at flat places `at`."""
        slots: IntArray = self.store.slot_of[self.contexts(state).ravel()[at]]
        return slots

    def _remember(
        self, state: BeamState, contexts: IntArray, nodes: IntArray, log_z: FloatArray | None = None
    ) -> BeamState:
        self._known.contexts[state.ctx] = contexts
        self._known.nodes[state.logw] = nodes
        if log_z is not None:
            self._known.log_z[state.logw] = log_z
        return state

    def single(self, context: int, logw: float, key: npt.NDArray[np.uint64]) -> BeamState:
        """See `Kernels`. No sync."""
        shape = (len(key), 1)
        weight = torch.full(shape, logw, dtype=torch.float64, device=self.device)
        ctx = torch.full(shape, context, dtype=torch.int64, device=self.device)
        node = torch.zeros_like(ctx)
        nodes = np.full(shape, 0 if logw > -torch.inf else -1, dtype=np.int64)
        contexts, log_z = np.full(shape, context, dtype=np.int64), np.full(len(key), logw)
        return self._remember(BeamState(ctx, node, weight, weight, key), contexts, nodes, log_z)

    def contexts(self, state: BeamState) -> IntArray:
        """See `Kernels`. No sync, or one for a state made elsewhere."""
        known = self._known.contexts
        if state.ctx not in known:
            known[state.ctx] = self._fetch(state.ctx)
        contexts: IntArray = known[state.ctx]
        return contexts

    def nodes(self, state: BeamState) -> IntArray:
        """See `Kernels`. No sync, or one after `advance`, `reweigh` or made elsewhere."""
        known = self._known.nodes
        if state.logw not in known:
            known[state.logw] = self._fetch(torch.where(state.logw > -torch.inf, state.node, -1))
        nodes: IntArray = known[state.logw]
        return nodes

    def log_z(self, state: BeamState) -> FloatArray:
        """See `Kernels`. No sync after `select`, `resample` and `initial`, else one."""
        known = self._known.log_z
        if state.logw not in known:
            known[state.logw] = self._fetch(torch.logsumexp(state.logw, dim=1))
        log_z: FloatArray = known[state.logw]
        return log_z

    def roots(self, state: BeamState) -> BeamState:
        """See `Kernels`. As many syncs as `nodes`."""
        contexts, nodes = self.contexts(state)[:, :1], self.nodes(state)[:, :1]
        logw = torch.where(state.logw[:, :1] > -torch.inf, 0.0, -torch.inf).double()
        node = torch.zeros_like(state.node[:, :1])
        out = BeamState(state.ctx[:, :1], node, logw, logw, state.key)
        return self._remember(out, contexts, np.minimum(nodes, 0))

    def reserve(
        self, row: torch.Tensor, proxy: torch.Tensor, rescue: npt.NDArray[np.bool_], share: float
    ) -> torch.Tensor:
        """See `Kernels`. No sync."""
        gap = torch.zeros_like(row, dtype=torch.bool)
        gap[:, :N_BYTES] = self._send(rescue) & torch.isneginf(row[:, :N_BYTES])
        likely = torch.where(gap, proxy.exp() + 1e-9, 0.0)  # none of them reads as impossible
        total = likely.sum(dim=1, keepdim=True)
        shared = torch.where(gap, torch.log(share * likely / total), row + np.log1p(-share))
        return torch.where(total > 0, shared, row)

    def extensions(self, state: BeamState, cut: IntArray) -> Extensions:
        """See `Kernels`. One sync, for the weights (none if no token ends); and `nodes`'s."""
        ext, weight = self._endings(state, cut)
        return ext.weighed(self._fetch(weight)) if len(ext.lane) else ext

    def _endings(self, state: BeamState, cut: IntArray) -> tuple[Extensions, torch.Tensor]:
        """Return the tokens that end at candidates, impossible ones included, without weights.

        Which tokens end where is the host's knowledge: only the weights, float64[E], are on
        the device.
        """
        nodes, sums = self.nodes(state), self.sums
        at = np.flatnonzero(nodes >= 0)
        at = at[sums.ends[nodes.ravel()[at]] > 0]
        x = nodes.ravel()[at]
        count = sums.ends[x]
        flat = np.repeat(at, count)
        position = np.arange(len(flat)) + np.repeat(sums.lo[x] - (count.cumsum() - count), count)
        slot = np.repeat(self._slots(state, at), count)
        masked = self.sums.mask(cut)
        if masked is not None:
            text = masked.on_host[position]
            flat, position, slot = flat[text], position[text], slot[text]
        index, where = self._send(np.stack([flat, slot * len(self.sums.order) + position]))
        weight = self._ending_weights(state, index, where)
        lane, cand = np.divmod(flat, max(1, nodes.shape[1]))
        none = np.full(len(nodes), -np.inf)
        return Extensions(lane, cand, self.sums.order[position], np.empty(0), dropped=none), weight

    def _ending_weights(
        self, state: BeamState, index: torch.Tensor, where: torch.Tensor
    ) -> torch.Tensor:
        """logu of candidates at flat places `index`, and log of the probabilities at `where`."""
        above: torch.Tensor = state.logu.reshape(-1)[index]
        return above + self.store.probs.view(-1)[where].log()

    def open_read(
        self, state: BeamState, byte: IntArray, cut: IntArray, log_threshold: float
    ) -> Extensions:
        """See `Composed`. One sync, the weights with what can read `byte`."""
        ext, weight = self._endings(state, cut)
        if len(ext.lane) == 0:
            return ext
        able = torch.logsumexp(self.advance(state, byte, cut).logw, dim=1)
        fetched = self._fetch(torch.cat([able, weight]))
        base, logw = np.split(fetched, [len(able)])
        return keep_above(ext.weighed(logw), base, log_threshold)

    def extend(self, state: BeamState, ext: Extensions, contexts: IntArray) -> BeamState:
        """See `Kernels`. No sync."""
        if len(ext.lane) == 0:
            return state
        in_order = np.argsort(ext.lane, kind="stable")
        lane = ext.lane[in_order]
        place = np.arange(len(lane)) - np.searchsorted(lane, lane)  # among its lane's own
        shape = (len(state.key), int(place.max()) + 1)
        new_ctx = np.full(shape, -1, dtype=np.int64)
        new_logw = np.full(shape, -np.inf)
        new_ctx[lane, place] = contexts[in_order]
        new_logw[lane, place] = ext.logw[in_order]
        new = self._send(np.stack([new_ctx, new_logw.view(np.int64)]))
        out = self._appended(state, new)
        known = self._known
        if state.ctx in known.contexts:
            known.contexts[out.ctx] = np.hstack([known.contexts[state.ctx], new_ctx])
        if state.logw in known.nodes:
            new_nodes = np.where(new_logw > -np.inf, 0, -1)
            known.nodes[out.logw] = np.hstack([known.nodes[state.logw], new_nodes])
        return out

    def _appended(self, state: BeamState, new: torch.Tensor) -> BeamState:
        """More candidates at the root: int64[2, N, E], contexts and the bits of their weights."""
        ctx, weight = new[0], new[1].view(torch.float64)
        return BeamState(
            torch.cat([state.ctx, ctx], dim=1),
            torch.cat([state.node, torch.zeros_like(ctx)], dim=1),
            torch.cat([state.logu, weight], dim=1),
            torch.cat([state.logw, weight], dim=1),
            state.key,
        )

    def advance(self, state: BeamState, byte: IntArray, cut: IntArray) -> BeamState:
        """See `Kernels`. No sync after `next_block` of the state, else as many as `nodes`."""
        summed = self._masses_of(state, cut)
        if summed is None:
            return self._advance_anew(state, byte, cut)
        symbol = self._send(byte)[:, None]
        child = self.sums.children(state.node, symbol)
        place = (summed.skip + child).clamp(0, max(0, len(summed.masses) - 1))
        mass = summed.masses[place] if len(summed.masses) else torch.zeros_like(state.logw)
        moves = (child > 0) & (symbol >= 0) & (state.logw > -torch.inf) & (mass > 0)
        node = torch.where(moves, child, 0)
        logw = torch.where(moves, state.logu + mass.log(), -torch.inf)
        return BeamState(state.ctx, node, state.logu, logw, state.key)

    def _masses_of(self, state: BeamState, cut: IntArray) -> ChildMasses | None:
        """Return the masses of all children of the candidates, if `next_block` summed them."""
        named = cut.tobytes()
        for summed in self._summed:
            if summed.logw() is state.logw and summed.cut == named:
                return summed
        return None

    def _advance_anew(self, state: BeamState, byte: IntArray, cut: IntArray) -> BeamState:
        """`advance` by summing the range of each candidate's child.

        The host does not look children up; it sizes each range by the node's longest child
        (by the child itself at the root, where the difference would be large).
        """
        nodes = self.nodes(state)
        symbol = np.repeat(byte, nodes.shape[1])
        at = np.flatnonzero((nodes.ravel() >= 0) & (symbol >= 0))
        x, symbol = nodes.ravel()[at], symbol[at]
        bound = np.where(x == 0, self.sums.root_length[symbol], self.sums.longest[x])
        some = bound > 0
        at, x, symbol, bound = at[some], x[some], symbol[some], bound[some]
        node = torch.zeros_like(state.node, memory_format=torch.contiguous_format)
        logw = torch.full(state.logw.shape, -torch.inf, dtype=torch.float64, device=self.device)
        if len(at):
            plan = self._send(np.stack([at, x, symbol, self._slots(state, at), bound]))
            where, above, d_symbol, slot, d_bound = plan
            child = self.sums.children(above, d_symbol)
            length = torch.where(child > 0, self.sums.d_length[child], 0)
            begin, masked = self.sums.d_lo[child], self.sums.mask(cut)
            mass = self.sums.range_sums(slot, begin, length, d_bound, bound, masked)
            node.view(-1)[where] = torch.where(mass > 0, child, 0)
            logw.view(-1)[where] = self._weigh(state, where, mass)
        return BeamState(state.ctx, node, state.logu, logw, state.key)

    def _weigh(self, state: BeamState, where: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """Weights of the candidates at flat places `where` from the masses of their nodes."""
        return torch.where(mass > 0, state.logu.reshape(-1)[where] + mass.log(), -torch.inf)

    def reweigh(self, state: BeamState, cut: IntArray) -> BeamState:
        """See `Kernels`. As many syncs as `nodes`."""
        nodes = self.nodes(state)
        at = np.flatnonzero(nodes > 0)
        x = nodes.ravel()[at]
        at_root = (state.node == 0) & (state.logw > -torch.inf)
        logw = torch.where(at_root, state.logu, -torch.inf).contiguous()
        if len(at):
            bound = self.sums.length[x]
            plan = self._send(np.stack([at, x, self._slots(state, at), bound]))
            where, node, slot, length = plan
            begin, masked = self.sums.d_lo[node], self.sums.mask(cut)
            mass = self.sums.range_sums(slot, begin, length, length, bound, masked)
            logw.view(-1)[where] = self._weigh(state, where, mass)
        return BeamState(state.ctx, state.node, state.logu, logw, state.key)

    def next_block(self, state: BeamState, cut: IntArray) -> torch.Tensor:
        """See `Kernels`. As many syncs as `nodes`."""
        nodes = self.nodes(state)
        n, width = nodes.shape
        out = torch.zeros((n, N_BYTES + 1), dtype=torch.float64, device=self.device)
        if n == 0 or width == 0:
            return out.log_()
        top = state.logw.amax(dim=1, keepdim=True)
        scale = (state.logu - top).exp()
        masked = self.sums.mask(cut)
        plan = self.sums.plan(nodes, self._slots(state, np.arange(nodes.size)))
        places = np.stack([np.full(nodes.shape, len(plan.rows)), plan.skip])
        places[0].reshape(-1)[plan.at_root] = plan.row_of
        row, skip = self._send(places)
        root, masses = self.sums.root_masses(self._send(plan.rows), masked)
        if len(plan.rows):
            weight = torch.where(row < len(plan.rows), scale, 0.0)[:, None]
            for i in chunks(np.full(n, width * (N_BYTES + 1)), self.sums.flat_limit):
                out[i] = torch.bmm(weight[i], root[row[i]])[:, 0]
        below, fan = self.sums.below[plan.node], self.sums.fan[plan.node]
        inner = np.stack([plan.inner, plan.node, self._slots(state, plan.inner), below, fan])
        masses += self.sums.add_inner(out, self._send(inner), below, fan, scale, masked)
        every = torch.cat(masses) if masses else out.new_empty(0)
        self._summed.append(ChildMasses(weakref.ref(state.logw), cut.tobytes(), every, skip))
        return torch.where(out > 0, top + out.log(), -torch.inf)

    def normalise(self, block: torch.Tensor, log_z: FloatArray | None) -> torch.Tensor:
        """See `Kernels`. No sync."""
        if log_z is None:
            total = torch.logsumexp(block, dim=1, keepdim=True)
        else:
            total = self._send(log_z)[:, None]
        return torch.where(total > -torch.inf, block - total, -torch.inf)

    def select(
        self, state: BeamState, k: int | None, log_threshold: float
    ) -> tuple[BeamState, FloatArray]:
        """See `Kernels`. One sync: contexts, nodes and total of what is kept, and dropped."""
        return self._take(state, keep_largest(state.logw, most_of(state, k), log_threshold))

    def resample(self, state: BeamState, k: int | None) -> BeamState:
        """See `Kernels`. One sync: contexts, nodes and total of what is kept."""
        u = self._send(uniforms(state.key, PRUNE))
        return self._take(state, keep_unbiased(state.logw, most_of(state, k), u, self.device))[0]

    def _take(self, state: BeamState, kept: Kept) -> tuple[BeamState, FloatArray]:
        """Return the candidates kept; and the log mass dropped, which comes along to the host."""
        pick, logw, dropped = kept
        old = state.logw.gather(1, pick)
        some = logw > -torch.inf
        ctx = torch.where(some, state.ctx.gather(1, pick), -1)
        node = torch.where(some, state.node.gather(1, pick), 0)
        logu = torch.where(some, state.logu.gather(1, pick) + (logw - old), -torch.inf)
        totals = torch.stack([torch.logsumexp(logw, dim=1), dropped], dim=1)
        packed = torch.cat([ctx, torch.where(some, node, -1), totals.view(torch.int64)], dim=1)
        return self._received(BeamState(ctx, node, logu, logw, state.key), packed)

    def _received(self, state: BeamState, packed: torch.Tensor) -> tuple[BeamState, FloatArray]:
        """Return a pruned state without columns that are empty in every lane, and what was dropped.

        `packed` int64[N, 2K + 2]: contexts, nodes (-1 for none), bits of totals and of what was
        dropped.
        """
        fetched = self._fetch(packed)
        k = state.ctx.shape[1]
        log_z, lost = np.ascontiguousarray(fetched[:, 2 * k :].T).view(np.float64)
        width = int((fetched[:, k : 2 * k] >= 0).sum(axis=1).max(initial=0))
        contexts, nodes = fetched[:, :width].copy(), fetched[:, k : k + width].copy()
        ctx, node, logu, logw = (a[:, :width] for a in state[:4])
        out = BeamState(ctx, node, logu, logw, state.key)
        return self._remember(out, contexts, nodes, log_z), lost

    def gather(self, state: BeamState, lanes: IntArray) -> BeamState:
        """See `Kernels`. No sync."""
        index = self._send(lanes)
        out = self._lanes(state, index, state.key[lanes])
        for known, old, new in self._known.pairs(state, out):
            if old in known:
                known[new] = known[old][lanes]
        return out

    def _lanes(self, state: BeamState, index: torch.Tensor, key: Array) -> BeamState:
        ctx, node, logu, logw = (a[index] for a in state[:4])
        return BeamState(ctx, node, logu, logw, key)

    def cat(self, states: list[BeamState]) -> BeamState:
        """See `Kernels`. No sync."""
        if len(states) == 1:
            return states[0]
        width = max(s.logw.shape[1] for s in states)

        def stack(field: int, fill: float) -> torch.Tensor:
            parts = [s[field] for s in states]
            pad = torch.nn.functional.pad
            return torch.cat([pad(p, (0, width - p.shape[1]), value=fill) for p in parts])

        ctx, node, logu, logw = (
            stack(i, fill) for i, fill in enumerate((-1, 0, -torch.inf, -torch.inf))
        )
        out = BeamState(ctx, node, logu, logw, np.concatenate([s.key for s in states]))
        for same in zip(*(self._known.pairs(s, out) for s in states), strict=True):
            known, _, new = same[0]
            if all(old in known for _, old, _ in same):
                parts = [known[old] for _, old, _ in same]
                if parts[0].ndim > 1:  # totals have no empty places
                    pads = [((0, 0), (0, width - p.shape[1])) for p in parts]
                    pairs = zip(parts, pads, strict=True)
                    parts = [np.pad(p, w, constant_values=-1) for p, w in pairs]
                known[new] = np.concatenate(parts)
        return out
