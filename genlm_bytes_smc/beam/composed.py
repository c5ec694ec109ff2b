"""Whole steps of beams from the parts of a kernel set: what `kernels_host` does in one call.

Which extensions are admitted is decided on the host, by a threshold or at random; compiled steps do
the same in `pruning_numba`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genlm_bytes_smc.beam import pruning_numba as pn
from genlm_bytes_smc.beam.kernels import (
    NOTHING,
    Kernels,
    Lanes,
    Limits,
    Look,
    Read,
    Run,
    Texts,
    children,
)
from genlm_bytes_smc.beam.rng import THIN, KeyArray, read_keys, uniforms
from genlm_bytes_smc.beam.rules import Rules
from genlm_bytes_smc.beam.state import EOS_COLUMN, BeamState, Extensions, FloatArray
from genlm_bytes_smc.beam.texts_numba import GUESS, lend
from genlm_bytes_smc.lm.contexts import IntArray


def keep_above(
    ext: Extensions, base: FloatArray, log_threshold: float, *, within: bool = False
) -> Extensions:
    """Extensions above the threshold of base + all extensions of their lane.

    A threshold never drops the heaviest part of a lane: where no extension is above it, the
    heaviest one is kept if it weighs more than what is left without extensions.

    Args:
        ext: all extensions.
        base: float64[N] log weight that counts beside the extensions, nats.
        log_threshold: nats.
        within: whether `base` holds the weight of the extensions, too.
    """
    keep, dropped = pn.keep_extensions(ext.lane, ext.logw, base, log_threshold, within)
    ext = ext if keep.all() else ext.take(keep)
    return ext._replace(dropped=np.logaddexp(ext.dropped, dropped))


def thin(ext: Extensions, log_z: FloatArray, log_threshold: float, keys: KeyArray) -> Extensions:
    """Extensions thinned at random below the threshold's share of `log_z`, unbiased."""
    if log_threshold == -np.inf or len(ext.lane) == 0:
        return ext
    none = np.zeros(len(ext.lane), dtype=bool)
    u = uniforms(keys, THIN)
    keep, logw = pn.thin_extensions(none, ext.lane, ext.logw, log_z, log_threshold, u)
    return ext._replace(logw=logw).take(keep)


class Composed(Kernels):
    """Whole steps of `Kernels`, from parts."""

    @abstractmethod
    def roots(self, state: BeamState) -> BeamState:
        """Return the first candidate's context of each lane, at the root, weight 0: [N, 1]."""

    @abstractmethod
    def reserve(
        self, row: torch.Tensor, proxy: torch.Tensor, rescue: npt.NDArray[np.bool_], share: float
    ) -> torch.Tensor:
        """Rows [N, 257] in which impossible bytes that `rescue` bool[N, 256] marks share
        `share` of the mass in proportion to exp(proxy) [N, 257]."""

    @abstractmethod
    def next_block(self, state: BeamState, cut: IntArray) -> torch.Tensor:
        """Log mass per next byte, and of ending last: float64[N, 257], unnormalised."""

    @abstractmethod
    def normalise(self, block: torch.Tensor, log_z: FloatArray | None) -> torch.Tensor:
        """Return a block less the log of each row's sum, or less `log_z` float64[N] if given."""

    @abstractmethod
    def resample(self, state: BeamState, k: int | None) -> BeamState:
        """Unbiased pruning to K candidates, best first."""

    @abstractmethod
    def open_read(
        self, state: BeamState, byte: IntArray, cut: IntArray, log_threshold: float
    ) -> Extensions:
        """Return the extensions that `keep_above` admits beside candidates that can read `byte`."""

    def look(self, lanes: Lanes, known: Look | None, *, row: bool) -> Look:
        """See `Kernels`."""
        if known is None or known.extended is None:
            state, roots = lanes.state, None if known is None else known.roots
            missing = self.store.missing(self.contexts(state))
            if len(missing):
                return Look(None, lanes.log_z, missing=missing, roots=roots)
            ext = _admitted(self, state, lanes.log_z, lanes.rules)
            extended = self.extend(state, ext, children(self, state, ext))
            known = Look(extended, ext.dropped, roots=roots)
        contexts = self.contexts(known.extended)
        if len(self.store.missing(contexts)):
            return known._replace(missing=contexts.ravel())  # all, so that none goes meanwhile
        known = known._replace(missing=NOTHING)
        return _with_row(self, lanes, known) if row else known

    def step(self, lanes: Lanes, look: Look, symbols: IntArray) -> Read:
        """See `Kernels`."""
        extended, rules = look.extended, lanes.rules
        assert extended is not None
        contexts = self.contexts(extended)
        if len(self.store.missing(contexts)):
            return Read(lanes.state, lanes.log_z, lanes.log_dropped, contexts.ravel())
        ends = symbols == EOS_COLUMN
        ending = self.next_block(extended, rules.cut)[:, EOS_COLUMN] if ends.any() else None
        after = self.advance(extended, np.where(ends, -1, symbols), rules.cut)
        if rules.random:
            after = after._replace(key=read_keys(lanes.state.key, symbols))
        after, pruned = _pruned(self, after, rules)
        log_z = self.log_z(after)
        if ending is not None:
            log_z = np.where(ends, ending.cpu().numpy(), log_z)
        log_dropped = np.logaddexp(np.logaddexp(lanes.log_dropped, look.dropped), pruned)
        return Read(after, log_z, log_dropped, look=Look(None, pruned, roots=look.roots))

    def read(self, lanes: Lanes, byte: IntArray, *, prune: bool = False) -> Read:
        """See `Kernels`."""
        state, rules, log_dropped = lanes.state, lanes.rules, lanes.log_dropped
        if prune:
            state, pruned = _pruned(self, state, rules)
            log_dropped = np.logaddexp(log_dropped, pruned)
        missing = self.store.missing(self.contexts(state))
        if len(missing):
            return Read(state, lanes.log_z, log_dropped, missing)
        ext = _admitted(self, state, lanes.log_z, rules, byte)
        new = children(self, state, ext)
        if len(self.store.missing(new)):
            return Read(state, lanes.log_z, log_dropped, new)
        after, log_z = _read_on(self, state, ext, new, byte, rules)
        return Read(after, log_z, np.logaddexp(log_dropped, ext.dropped))

    def prune(self, lanes: Lanes) -> Read:
        """See `Kernels`."""
        state, pruned = _pruned(self, lanes.state, lanes.rules)
        return Read(state, self.log_z(state), np.logaddexp(lanes.log_dropped, pruned))

    def run_texts(
        self, lanes: Lanes, texts: Texts, start: int, limits: Limits, *, by_steps: bool, sure: Any
    ) -> Run:
        """See `Kernels`; `sure` is not heeded."""
        state, log_z, log_dropped, rules = lanes.state, lanes.log_z, lanes.log_dropped, lanes.rules
        kept, read, (horizon, reach) = (state, log_z, log_dropped), start, limits
        guessed = np.full(len(texts.lengths), texts.lines.shape[1])  # byte of the first guess
        missed = [np.empty((2, 0), dtype=np.int64)]
        try:
            for at in range(start, texts.lines.shape[1]):
                too_far = at > read + horizon or (at > guessed + reach).all()
                if len(missed) > 1 and too_far:
                    break
                symbols = np.where(at < texts.lengths, texts.lines[:, at].astype(np.int64), -1)
                if not by_steps:
                    state, pruned = _pruned(self, state, rules)
                    log_dropped, log_z = np.logaddexp(log_dropped, pruned), self.log_z(state)
                known = None if by_steps else symbols
                ext = _admitted(self, state, log_z, rules, known, foreseen=True)
                log_dropped = np.logaddexp(log_dropped, ext.dropped)
                contexts, new = self.contexts(state), children(self, state, ext)
                self.store.cover()
                goes, lacked = lend(
                    self.store.slot_of, texts.known, at, np.ascontiguousarray(contexts), ext.lane,
                    ext.cand, new, ext.logw, log_z, reach, guessed,
                )  # fmt: skip
                if lacked.shape[1]:
                    missed.append(lacked)
                    ext, new = ext.take(goes), new[goes]
                if by_steps:
                    state = self.advance(self.extend(state, ext, new), symbols, rules.cut)
                    if rules.random:
                        state = state._replace(key=read_keys(state.key, symbols))
                    state, pruned = _pruned(self, state, rules)
                    log_dropped, log_z = np.logaddexp(log_dropped, pruned), self.log_z(state)
                else:
                    state, log_z = _read_on(self, state, ext, new, symbols, rules)
                if not (log_z > -np.inf).any():
                    break
                if len(missed) == 1:
                    kept, read = (state, log_z, log_dropped), at + 1
        finally:
            contexts, byte = np.concatenate(missed, axis=1)
            self.store.slot_of[contexts] = -1  # nothing stands in for it any more
        near = byte >= 0
        return Run(*kept, read, contexts[near], byte[near])

    def follow_likeliest(self, lanes: Lanes, steps: int) -> tuple[Run, bytes] | None:
        """See `Kernels`: not in one go."""
        return None


def _pruned(kernels: Composed, state: BeamState, rules: Rules) -> tuple[BeamState, FloatArray]:
    """Return the pruned state, and the log mass dropped, float64[N]."""
    k = None if rules.k < 0 else rules.k
    if rules.random:
        return kernels.resample(state, k), np.full(len(state.key), -np.inf)
    return kernels.select(state, k, rules.log_threshold)


def _admitted(
    kernels: Composed,
    state: BeamState,
    log_z: FloatArray,
    rules: Rules,
    byte: IntArray | None = None,
    *,
    foreseen: bool = False,
) -> Extensions:
    """Return the extensions to be read, whatever comes next or before a known `byte` int64[N].

    At random, with `foreseen`, they are thinned by their estimated share after the byte
    (`pruning_numba.mass_after`): unbiased for each byte.
    """
    if not rules.random and byte is not None:
        return kernels.open_read(state, byte, rules.cut, rules.log_threshold)
    ext = kernels.extensions(state, rules.cut)
    if not rules.random:
        return keep_above(ext, log_z, rules.log_threshold, within=True)
    if foreseen and byte is not None and rules.log_threshold > -np.inf and len(ext.lane):
        able = kernels.log_z(kernels.advance(state, byte, rules.cut))
        log_z = pn.mass_after(ext.lane, ext.logw, able, log_z, float(np.log(GUESS)))
    return thin(ext, log_z, rules.log_threshold, state.key)


def _read_on(
    kernels: Composed,
    state: BeamState,
    ext: Extensions,
    new: IntArray,
    byte: IntArray,
    rules: Rules,
) -> tuple[BeamState, FloatArray]:
    """Return the candidates and extensions after a byte, best first; and the lanes' log_z."""
    after = kernels.advance(kernels.extend(state, ext, new), byte, rules.cut)
    after, _ = kernels.select(after, None, -np.inf)
    if rules.random:
        after = after._replace(key=read_keys(state.key, byte))
    return after, kernels.log_z(after)


def _with_row(kernels: Composed, lanes: Lanes, look: Look) -> Look:
    """Return the look with its row; the lanes' best candidates often have the roots of before."""
    state, rules, roots = lanes.state, lanes.rules, look.roots
    assert look.extended is not None
    block = kernels.next_block(look.extended, rules.cut)
    row = kernels.normalise(block, lanes.log_z if rules.random else None)
    # Where nothing was ever dropped, what reads as impossible is impossible.
    lossy = np.maximum(lanes.log_dropped, look.dropped) > -np.inf
    if rules.heals and lossy.any():
        best = kernels.roots(state)
        contexts = kernels.contexts(best)
        if roots is None or not np.array_equal(roots[0], contexts):
            roots = contexts, kernels.next_block(best, rules.cut)
        rescue = rules.rescues.of(kernels.nodes(state)) & lossy[:, None]
        row = kernels.reserve(row, roots[1], rescue, rules.share)
    return look._replace(row=row, roots=roots)
