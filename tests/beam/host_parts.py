"""The compiled parts of a byte step on numpy states, which torch's are held against."""

import numba
import numpy as np
import torch

from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam.composed import keep_above
from genlm_bytes_smc.beam.kernels_host import NumbaKernels, _arrays
from genlm_bytes_smc.beam.masses_numba import next_block
from genlm_bytes_smc.beam.rng import PRUNE, uniforms
from genlm_bytes_smc.beam.state import BeamState, HostState


def called(function):
    """A function for Python to call that only compiled code calls otherwise."""
    return numba.njit(lambda *args: function(*args))


def back(state):
    """A state of the kernels as a `BeamState` of numpy arrays."""
    return BeamState(state.ctx, state.node, state.logu, state.logw, state.key)


def packed(state):
    """A `BeamState` of numpy arrays as the kernels take it."""
    return HostState.of(*state)


class HostParts:
    """The parts of `composed.Composed` on numpy arrays.

    Args:
        store: of the rows, on the host.
    """

    def __init__(self, store):
        self.whole = NumbaKernels(store)

    def __getattr__(self, name):
        """Parts that `NumbaKernels` has, too."""
        part = getattr(self.whole, name)

        def call(*args):
            found = part(*(packed(a) if isinstance(a, BeamState) else a for a in args))
            if isinstance(found, tuple) and not isinstance(found, HostState) and len(found) == 2:
                return back(found[0]), found[1]
            return back(found) if isinstance(found, HostState) else found

        return call

    def cat(self, states):
        return back(self.whole.cat([packed(s) for s in states]))

    def roots(self, state):
        logw = np.where(state.logw[:, :1] > -np.inf, 0.0, -np.inf)
        return BeamState(state.ctx[:, :1], np.zeros_like(state.node[:, :1]), logw, logw, state.key)

    def next_block(self, state, cut):
        arrays = _arrays(packed(state))
        return torch.from_numpy(next_block(self.whole._trie, self.whole.store.host, *arrays, cut))

    def normalise(self, block, log_z):
        values = block.numpy()
        total = pn.logsumexp_rows(values) if log_z is None else log_z
        with np.errstate(invalid="ignore"):
            out = np.where(total[:, None] > -np.inf, values - total[:, None], -np.inf)
        return torch.from_numpy(out)

    def reserve(self, row, proxy, rescue, share):
        row, out = row.numpy(), row.numpy().copy()
        for n, line in enumerate(row):
            gap = np.append(rescue[n], False) & (line == -np.inf)
            if gap.any():
                likely = np.exp(proxy[n].numpy()[gap]) + 1e-9
                out[n] = line + np.log1p(-share)
                out[n, gap] = np.log(share * likely / likely.sum())
        return torch.from_numpy(out)

    def resample(self, state, k):
        pick, weight = pn.select_unbiased(
            state.logw, -1 if k is None else k, uniforms(state.key, PRUNE)
        )
        return BeamState(
            *pn.take(*(np.ascontiguousarray(a) for a in state[:4]), pick, weight), state.key
        )

    def open_read(self, state, byte, cut, log_threshold):
        able = self.log_z(self.advance(state, byte, cut))
        return keep_above(self.extensions(state, cut), able, log_threshold)
