"""What a layout is chosen by: fixed figures for each kind of device."""

import numpy as np
import pytest
import torch

from benchmarks.attention_costs import KeyShape, measure
from genlm_bytes_smc.lm.contexts import ContextTree
from genlm_bytes_smc.lm.devices import ON_CPU, ON_GPU, AttentionCosts, costs_on
from genlm_bytes_smc.lm.tree_cache import TreeCache
from tests.lm.test_tree_cache import compute, insert, plan

SHAPES = [
    KeyShape(torch.device("cpu"), torch.float32, 4, 4, 16),
    KeyShape(torch.device("cpu"), torch.bfloat16, 4, 2, 16),  # grouped
]


@pytest.mark.parametrize("shape", SHAPES, ids=["float32", "grouped bfloat16"])
def test_measured_costs_are_costs(shape):
    costs = measure(shape)
    for cost in vars(costs).values():
        assert 0 < cost < 1e6


def test_figures_are_those_of_the_device():
    """No device is measured while a model runs, so equal runs choose equal layouts."""
    assert costs_on(torch.device("cpu")) is ON_CPU
    assert costs_on(torch.device("cuda")) is costs_on(torch.device("mps")) is ON_GPU


@pytest.mark.parametrize(
    ("costs", "layout"),
    [
        (AttentionCosts(pair=1e-3, lone_key=1e-3, copy=100.0, row_key=100.0), "range"),
        (AttentionCosts(pair=10.0, lone_key=10.0, copy=1e-3, row_key=1e6), "listed"),
        (AttentionCosts(pair=10.0, lone_key=10.0, copy=100.0, row_key=1.0), "rows"),
    ],
)
def test_the_layout_follows_the_costs(costs, layout):
    cache = TreeCache(ContextTree())
    compute(cache, insert(cache, *([1000 + i, *range(60)] for i in range(40))))
    compute(cache, insert(cache, *([2000 + i, *range(60)] for i in range(5))))
    steps = insert(cache, *([1000 + i, *range(60), 7] for i in range(0, 40, 13)))
    assert plan(cache, steps, costs=costs).layout == layout


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_can_be_measured():
    """What `benchmarks.forward --device cuda` prints is finite."""
    costs = measure(KeyShape(torch.device("cuda"), torch.bfloat16, 32, 8, 64))
    assert np.isfinite([*vars(costs).values()]).all()
