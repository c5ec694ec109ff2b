"""Host bookkeeping of the tree cache, against naive recomputation; no model is run."""

import numpy as np
import pytest

from genlm_bytes_smc.lm.contexts import ContextTree
from genlm_bytes_smc.lm.tree_cache import TreeCache, attend


class Holder:
    def __init__(self, tree, nodes):
        self.nodes = np.array(nodes)
        tree.track(self)

    def context_ids(self):
        return self.nodes


@pytest.fixture
def cache():
    return TreeCache(ContextTree(capacity=4))


def insert(cache, *contexts):
    return np.array([cache.tree.insert(c) for c in contexts], dtype=np.int64)


def compute(cache, nodes):
    """As a forward would: everything missing gets an entry."""
    work = cache.work(nodes)
    cache.append(np.array(work.nodes[: work.fresh], dtype=np.int64))
    cache.touch(nodes)
    return work


def slots_of(cache, nodes):
    """The slot of each context, or -1."""
    cache._fit_tree()
    return cache._slot[nodes]


def path_of(tree, node):
    """The ids from the first token's node to `node` itself."""
    return [*path_of(tree, int(tree.parent[node])), node] if node > 0 else []


def check_laws(cache):
    nodes = cache._node[: cache.used]
    assert (nodes < 0).sum() == cache.dead
    for slot in np.flatnonzero(nodes >= 0):
        node = nodes[slot]
        assert cache._slot[node] == slot
        above = int(cache.tree.parent[node])
        assert above == 0 or 0 <= cache._slot[above] < slot


def test_work_lists_missing_ancestors_first_and_once(cache):
    nodes = insert(cache, [1, 2, 3], [1, 2, 4], [5])
    work = cache.work(nodes)
    assert work.fresh == len(work.nodes) == len(set(work.nodes)) == 5
    for i, node in enumerate(work.nodes):
        above = int(cache.tree.parent[node])
        assert above == 0 or above in work.nodes[:i]
    compute(cache, nodes)
    again = cache.work(insert(cache, [1, 2, 3], [1, 2, 4, 6]))
    assert [cache.tree.tokens(n) for n in again.nodes] == [[1, 2, 4, 6], [1, 2, 3]]
    assert again.fresh == 1


def test_freed_contexts_are_dead_and_their_ids_start_anew(cache):
    holder = Holder(cache.tree, insert(cache, [1, 2]))
    compute(cache, insert(cache, [1, 2], [1, 3, 4]))
    cache.tree.collect()
    assert (len(cache), cache.dead) == (2, 2)
    check_laws(cache)
    fresh = cache.work(insert(cache, [8], [9]))
    assert fresh.fresh == 2
    assert (slots_of(cache, holder.nodes) >= 0).all()


def test_dead_entries_are_compacted_away_in_the_end(cache):
    holder = Holder(cache.tree, [])
    rng = np.random.default_rng(0)
    trunk = insert(cache, list(range(50)))
    compactions = 0
    for _ in range(60):
        tokens = rng.choice(9999, size=40, replace=False)  # contexts of a call are distinct
        lanes = cache.tree.children(np.repeat(trunk, 40), tokens)
        holder.nodes = np.append(trunk, lanes)
        keep = cache.room(lanes, 90, 1 << 30)
        if keep is not None:
            assert cache.compact(keep) == 0  # nobody alive was dropped
            compactions += 1
        compute(cache, lanes)
        cache.tree.collect()
        check_laws(cache)
        assert cache.used < 2 * 512 + 200
    assert compactions > 0


def test_room_keeps_what_the_call_needs_then_the_reachable_then_the_recent(cache):
    wanted = insert(cache, [1, 2, 3])
    reachable = insert(cache, [4, 5, 6])
    holder = Holder(cache.tree, reachable)
    old, recent = insert(cache, list(range(20, 28))), insert(cache, [9, 10])
    for nodes in (wanted, reachable, old, recent):
        compute(cache, nodes)
    assert cache.room(wanted, 3, 19) is None
    keep = cache.room(wanted, 3, 18)
    assert cache.compact(keep) == 5  # the far end of the old one
    assert (slots_of(cache, np.concatenate([wanted, reachable, recent])) >= 0).all()
    assert slots_of(cache, old)[0] == -1
    keep = cache.room(wanted, 5, 12)
    cache.compact(keep)
    assert (slots_of(cache, np.concatenate([wanted, holder.nodes])) >= 0).all()
    assert len(cache) == 6
    cache.compact(cache.room(wanted, 8, 12))
    assert (slots_of(cache, wanted) >= 0).all()
    check_laws(cache)
    with pytest.raises(MemoryError):
        cache.room(wanted, 10, 12)


def test_a_use_counts_for_the_ancestors(cache):
    trunk = list(range(1, 6))
    compute(cache, insert(cache, trunk))
    compute(cache, insert(cache, [50, 51, 52, 53]))
    leaf = insert(cache, [*trunk, 9])
    compute(cache, leaf)
    asked = insert(cache, [60])
    keep = cache.room(asked, 1, 10)
    cache.compact(keep)
    assert (slots_of(cache, np.array(path_of(cache.tree, int(leaf[0])))) >= 0).all()
    assert slots_of(cache, insert(cache, [50, 51]))[0] == -1


def test_laws_hold_over_a_long_random_walk(cache):
    rng = np.random.default_rng(1)
    holder = Holder(cache.tree, [])
    known = [[1]]
    for step in range(150):
        contexts = []
        for _ in range(3):
            base = known[int(rng.integers(len(known)))]
            tail = rng.integers(0, 5, size=int(rng.integers(0, 4))).tolist()
            contexts.append([*base, *tail][:12])
        known = (known + contexts)[-12:]
        nodes = np.unique(insert(cache, *contexts))
        holder.nodes = nodes
        more = len(cache.work(nodes).nodes)
        keep = cache.room(nodes, more, 60)
        if keep is not None:
            cache.compact(keep)
        compute(cache, nodes)
        assert cache.used <= 60
        if step % 17 == 0:
            holder.nodes = insert(cache, *known)
            cache.tree.collect()
        check_laws(cache)


def test_cleared_cache_knows_nothing(cache):
    nodes = insert(cache, [1, 2], [1, 3])
    compute(cache, nodes)
    cache.clear()
    assert len(cache) == cache.used == 0
    assert cache.work(nodes).fresh == 3
    compute(cache, nodes)
    check_laws(cache)


# -- attention -------------------------------------------------------------------------


def sees(cache, attention, work, sliding):
    """Slots that each position attends to, from the plan."""
    mask = attention.sliding if sliding and attention.sliding is not None else attention.full
    if attention.layout == "range":
        slots = np.arange(attention.low, attention.high)
    else:
        slots = attention.index
    out = []
    for i in range(len(work.nodes)):
        row = slots[i] if attention.layout == "rows" else slots
        if mask is None:
            last = len(row) - len(work.nodes) + i + 1
            out.append(set(row[:last].tolist()))
        else:
            out.append(set(row[mask[i] == 0].tolist()))
    return out


def ought_to_see(cache, work, window):
    place = {n: cache.used + i for i, n in enumerate(work.nodes[: work.fresh])}
    out = []
    for i, node in enumerate(work.nodes):
        above = path_of(cache.tree, node)[:-1]
        known = {place.get(n, int(cache._slot[n])) for n in above[len(above) - window + 1 :]}
        out.append(known | {cache.used + i})
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("layout", [None, "range", "listed", "rows"])
def test_positions_see_their_ancestors_and_themselves(cache, layout, window):
    rng = np.random.default_rng(2)
    known = [[1]]
    for _ in range(40):
        contexts = []
        for _ in range(int(rng.integers(1, 4))):
            base = known[int(rng.integers(len(known)))]
            size = 1 if layout == "rows" else int(rng.integers(0, 4))
            contexts.append([*base, *rng.integers(0, 4, size=size).tolist()][:15])
        if layout == "rows":  # batch rows must not be one another's ancestors
            contexts = [c for c in contexts if not any(c == d[:-1] for d in contexts)]
        known = (known + contexts)[-10:]
        nodes = np.unique(insert(cache, *contexts))
        if layout == "rows":
            compute(cache, np.unique(cache.tree.parent[nodes][cache.tree.parent[nodes] > 0]))
        work = cache.work(nodes)
        attention = attend(cache, np.array(work.nodes), work.fresh, window=window, layout=layout)
        assert layout in (None, attention.layout)
        got = sees(cache, attention, work, sliding=window is not None)
        assert got == ought_to_see(cache, work, window or 99)
        compute(cache, nodes)


def plan(cache, nodes, **options):
    work = cache.work(nodes)
    return attend(cache, np.array(work.nodes), work.fresh, **options)


def test_the_cheapest_layout_is_taken(cache):
    trunk = list(range(40))
    compute(cache, insert(cache, trunk))
    shared = insert(cache, *([*trunk, t] for t in range(100, 200)))
    assert plan(cache, shared).layout == "range"
    compute(cache, shared)
    disjoint = [[1000 + i, *range(60)] for i in range(100)]
    compute(cache, insert(cache, *disjoint))
    steps = insert(cache, *([*c, 7] for c in disjoint))
    assert plan(cache, steps).layout == "rows"
    assert plan(cache, steps[:2]).layout == "listed"
    assert plan(cache, insert(cache, [*trunk, 5])).layout == "listed"
    assert plan(cache, steps, most_copied=50).layout == "range"


def test_masks_are_spelled_out_only_where_they_say_something(cache):
    chain = insert(cache, [1, 2, 3, 4])
    assert plan(cache, chain).full is None
    assert plan(cache, chain, always_mask=True).full is not None
    assert plan(cache, chain, window=4).sliding is None
    assert plan(cache, chain, window=3).sliding is not None
    compute(cache, chain)
    assert plan(cache, insert(cache, [1, 2, 3, 4, 5])).full is None
    assert plan(cache, insert(cache, [1, 2, 9])).full is not None
