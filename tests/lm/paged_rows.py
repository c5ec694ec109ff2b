"""Rows by paged attention on a machine without a GPU, by Triton's interpreter: for `test_paged`.

    TRITON_INTERPRET=1 python -m tests.lm.paged_rows FAMILY...

In a process of its own, because Triton reads the variable when a kernel is defined.
"""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np

from genlm_bytes_smc.lm import paged, tree_forward
from genlm_bytes_smc.lm.transformer import TreeTransformer
from tests.lm.families import distance, make_model, make_tokenizer, random_contexts, whole_rows


def apart(family: str) -> dict[str, float]:
    """Largest distance from whole forwards over a growing tree, and how keys were read."""
    model = make_model(family)
    engine = TreeTransformer(model, make_tokenizer())
    forward = engine._forward
    forward.paging = True
    assert engine._probe(next(model.parameters()).dtype, paged=True) is None
    engine.clear_cache()
    rng = np.random.default_rng(0)
    pool, worst, positions = [[5, 6, 7, 8, 9]], 0.0, 0
    for step in range(4):
        contexts = random_contexts(rng, pool, 3)
        if step == 2:  # another beginning, and one whose entry is there already
            contexts += [[11, 12], pool[-1]]
        pool += contexts
        nodes = np.array([engine.tree.insert(c) for c in contexts])
        rows = engine.rows_sync(nodes)
        worst = max(worst, distance(rows, whole_rows(model, contexts)))
        positions += int(forward._paged._host[1])
    tree_forward.MOST_POSITIONS, before = 2, engine.counts.forwards  # more in two forwards
    contexts = [[*pool[-1], t] for t in (21, 22, 23)]
    nodes = np.array([engine.tree.insert(c) for c in contexts])
    worst = max(worst, distance(engine.rows_sync(nodes), whole_rows(model, contexts)))
    assert engine.counts.forwards == before + 2
    tree_forward.MOST_POSITIONS = 1024
    return {"worst": worst, "positions": positions, "computed": engine.counts.positions}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    paged._PROGRAMS = 8  # few parts: the interpreter takes them one by one
    paged._KEY_BYTES = 64
    print(json.dumps({family: apart(family) for family in sys.argv[1:]}))
