"""The benchmark of SMC on minuscule sizes: both sides run, and count the same bytes."""

import math

import pytest
import torch

from benchmarks import smc as bench

SIZES = bench.Sizes(peer_seconds=0.01, repeats=1)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")  # genlm-bytes' sparse tensors, and the tasks it leaves
async def test_both_sides_read_as_many_bytes(monkeypatch):
    monkeypatch.setitem(bench.REGEXES, "date", ("Date: ", "(19|20)[0-9]"))
    both = bench.Bench()
    pair = bench.ByteRegex("(19|20)[0-9]"), bench.BoolFSA.from_regex("(19|20)[0-9]")
    cut = await both.versus(("a", "cut"), "Date: ", pair, 2, SIZES)
    assert cut.work["ours_steps"] == cut.work["peer_steps"] < 4
    whole = await both.versus(("e", "whole"), "Date: ", pair, 2, SIZES, whole=True)
    assert whole.work["ours_steps"] == whole.work["peer_steps"] == 4  # three bytes and the end
    assert math.isfinite(whole.work["ours_log_ml"])
    assert math.isfinite(whole.work["peer_log_ml"])
    assert whole.ratio > 0
    about = dict.fromkeys(["genlm-control", "genlm-bytes-smc"], "1")
    assert [len(bench.cells(r)) for r in (cut, whole)] == [len(bench.HEADS)] * 2
    assert about
