"""The slow reading of the accuracy benchmark against beams that keep every candidate."""

import pytest

from benchmarks.accuracy import WIDEST, by_lattice
from benchmarks.lattice import Rows
from genlm_bytes_smc import BeamParams, ByteBeamState
from genlm_bytes_smc.beam.model import byte_model


@pytest.mark.parametrize("text", [b"xyl", b"An ap", b"Ma\xc3", "Lé".encode()])
async def test_without_thresholds_it_is_exact(tiny, text):
    beam = await (await ByteBeamState.initial(tiny, BeamParams(K=None))).prefill(text)
    rows = Rows(tiny, byte_model(tiny).trie)
    exact = by_lattice(rows, tuple(tiny.start), text, share=0.0, merge=0.0, at_once=10**6)
    assert exact.log_z == pytest.approx(beam.logZ, abs=2e-5)  # rows of the beam are float32


async def test_what_it_defers_it_takes_up_again(tiny):
    text = b"An xylophone, quite unlike the usual"
    wide = await (await ByteBeamState.initial(tiny, BeamParams(K=64))).prefill(text)
    rows = Rows(tiny, byte_model(tiny).trie)
    found = by_lattice(rows, tuple(tiny.start), text)
    again = by_lattice(rows, tuple(tiny.start), text, **WIDEST)
    assert abs(found.log_z - wide.logZ) < 0.1
    assert abs(again.log_z - wide.logZ) < 0.02
    assert found.rows < again.rows
