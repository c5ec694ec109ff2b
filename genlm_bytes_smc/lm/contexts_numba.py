"""Compiled loops over the arrays of a `ContextTree`.

The children of a node are found through one hash table for the whole tree: open addressing with
linear probing (Knuth, The Art of Computer Programming, volume 3, section 6.4, algorithm L), whose
places hold node ids and whose keys are the pairs (parent, token) of those nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from genlm_bytes_smc.compiled import entry, full, inner

IntArray = npt.NDArray[np.int64]

NO_ROOM = -2
SIZE, FREE = 0, 1  # places in `TreeArrays.meta`


class TreeArrays(NamedTuple):
    """Arrays of a `ContextTree`, one entry a node; node 0 is the empty context.

    Attributes:
        parent: int64[n], id of the context without its last token (root: -1).
        token: int64[n], the last token (root: -1).
        depth: int64[n], number of tokens.
        alive: bool[n], ids in use.
        table: int64[2**k], a node id in each place that is taken, else -1; k so large that
            at least half of the places are free.
        free: int64[n], ids to use again: the first `meta[FREE]` of them.
        meta: int64[2], ids given out so far (SIZE) and ids to use again (FREE).
    """

    parent: IntArray
    token: IntArray
    depth: IntArray
    alive: npt.NDArray[np.bool_]
    table: IntArray
    free: IntArray
    meta: IntArray


@inner()
def _place(node, token, mask):
    x = np.uint64(node) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(token)
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.int64((x ^ (x >> np.uint64(29))) & np.uint64(mask))


@inner()
def known_child(tree, node, token):
    """Return the child of `node` along `token`, or -1."""
    mask = len(tree.table) - 1
    at = _place(node, token, mask)
    while tree.table[at] >= 0:
        found = tree.table[at]
        if tree.parent[found] == node and tree.token[found] == token:
            return found
        at = (at + 1) & mask
    return np.int64(-1)


@entry()
def child_of(tree, node, token):
    """Return the child of `node` along `token`, made if new; NO_ROOM if the arrays are full."""
    found = known_child(tree, node, token)
    if found >= 0:
        return found
    if tree.meta[FREE] > 0:
        tree.meta[FREE] -= 1
        new = tree.free[tree.meta[FREE]]
    elif tree.meta[SIZE] == len(tree.parent):
        return np.int64(NO_ROOM)
    else:
        new = tree.meta[SIZE]
        tree.meta[SIZE] += 1
    tree.parent[new] = node
    tree.token[new] = token
    tree.depth[new] = tree.depth[node] + 1
    tree.alive[new] = True
    mask = len(tree.table) - 1
    at = _place(node, token, mask)
    while tree.table[at] >= 0:
        at = (at + 1) & mask
    tree.table[at] = new
    return new


@entry()
def find_children(tree, nodes, tokens, out):
    """out[i] = child of nodes[i] along tokens[i]; how many were done before the room ended."""
    for i in range(len(nodes)):
        out[i] = child_of(tree, nodes[i], tokens[i])
        if out[i] < 0:
            return i
    return len(nodes)


@entry()
def find_path(tree, node, tokens, out):
    """out[i] = the context `node` followed by tokens[:i + 1]; how many were done."""
    for i in range(len(tokens)):
        node = child_of(tree, node, tokens[i])
        if node < 0:
            return i
        out[i] = node
    return len(tokens)


@entry()
def spelled(parent, of, node, out):
    """out[-1 - i] = of[the i-th node from `node` up]; `out` is as long as `node` is deep."""
    for i in range(len(out) - 1, -1, -1):
        out[i] = of[node]
        node = parent[node]


@entry()
def common_depth(parent, depth, nodes, seen):
    """Return how many first tokens the contexts above `nodes` have in common.

    `seen` bool[contexts] is all false, and is left so.
    """
    least = depth[nodes[0]] - 1
    above = parent[nodes[0]]
    while above > 0:
        seen[above] = True
        above = parent[above]
    for node in nodes[1:]:
        at = parent[node]
        while at > 0 and not seen[at]:
            at = parent[at]
        least = min(least, depth[at] if at > 0 else 0)
    above = parent[nodes[0]]
    while above > 0:
        seen[above] = False
        above = parent[above]
    return least


@entry()
def fill_paths(parent, depth, of, nodes, last, common, rest):
    """Write what `of` says of the contexts above `nodes`: those of all to `common`, in order.

    The others of each node, and `last + i` behind those of nodes[i], go to `rest`.
    """
    above = parent[nodes[0]]
    while depth[above] > len(common):
        above = parent[above]
    for i in range(len(common) - 1, -1, -1):
        common[i] = of[above]
        above = parent[above]
    start = 0
    for k in range(len(nodes)):
        count = depth[nodes[k]] - len(common)
        rest[start + count - 1] = last + k
        at = parent[nodes[k]]
        for i in range(count - 2, -1, -1):
            rest[start + i] = of[at]
            at = parent[at]
        start += count


@entry()
def fill_table(tree):
    """Enter every node in use into the table, which must be empty."""
    mask = len(tree.table) - 1
    for node in range(1, tree.meta[SIZE]):
        if tree.alive[node]:
            at = _place(tree.parent[node], tree.token[node], mask)
            while tree.table[at] >= 0:
                at = (at + 1) & mask
            tree.table[at] = node


@entry()
def mark(parent, roots, mask):
    """Mark `roots` (negative ids ignored) and all their ancestors."""
    for node in roots:
        while node >= 0 and not mask[node]:
            mask[node] = True
            node = parent[node]


@inner()
def place_of(keys, key):
    """Return the place of a number in sorted ones int64[m], or -1."""
    a, b = 0, len(keys)
    while a < b:
        mid = (a + b) >> 1
        if keys[mid] < key:
            a = mid + 1
        else:
            b = mid
    return a if a < len(keys) and keys[a] == key else -1


@entry()
def lacking(slot_of, contexts):
    """Ids of `contexts` without a slot, as often as they occur."""
    count = 0
    for c in contexts:
        count += slot_of[c] < 0
    out = full(count, 0)
    count = 0
    for c in contexts:
        if slot_of[c] < 0:
            out[count] = c
            count += 1
    return out
