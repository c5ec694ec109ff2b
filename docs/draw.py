"""Draws docs/images/*.svg from the very objects they show: `python docs/draw.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from genlm_bytes_smc import TokenTrie, Vocabulary
from genlm_bytes_smc.lm.contexts import ContextTree
from genlm_bytes_smc.lm.tree_cache import TreeCache, attend

IMAGES = Path(__file__).parent / "images"
INK, FAINT, PURPLE, GREEN, ORANGE, WHITE = (
    "#24292f", "#8c959f", "#8250df", "#1a7f37", "#bc4c00", "#ffffff",
)  # fmt: skip
STYLE = {
    "svg.hashsalt": "genlm-bytes-smc",  # the same drawing is the same file
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans Mono",
    "font.size": 10,
    "text.color": INK,
}


def box(
    ax: Axes, x: float, y: float, w: float, text: str, color: str, *, fill: float = 0.12
) -> None:
    """A labelled rectangle of height 0.8 with its left lower corner at (x, y)."""
    face = mpl.colors.to_rgba(color, fill)
    ax.add_patch(Rectangle((x + 0.03, y), w - 0.06, 0.8, facecolor=face, edgecolor=color, lw=1.1))
    ax.text(x + w / 2, y + 0.4, text, ha="center", va="center", fontsize=9)


def row(ax: Axes, y: float, name: str, values: list[str], color: str, unit: float = 1.0) -> None:
    """A named array as a row of boxes."""
    ax.text(-0.25, y + 0.4, name, ha="right", va="center", color=INK)
    for i, value in enumerate(values):
        box(ax, i * unit, y, unit, value, color)


def canvas(width: float, height: float, inches: float = 8.6) -> tuple[Figure, Axes]:
    """An empty drawing in units of boxes."""
    fig, ax = plt.subplots(figsize=(inches, inches * height / width))
    fig.subplots_adjust(0, 0, 1, 1)
    fig.patch.set_facecolor(WHITE)
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    ax.axis("off")
    return fig, ax


def draw_trie() -> Figure:
    """The trie of a small vocabulary as ranges over its sorted tokens."""
    tokens = [b"the", b" day", b" d", b"doc", b" the", b"do", b"d", b" ", b"t", b" do"]
    trie = TokenTrie.build(Vocabulary.from_tokens(tokens))
    n = trie.n_tokens
    deepest = int(trie.depth.max())
    fig, ax = canvas(n + 3.4, deepest + 6.6)
    ax.set_xlim(-3.0, n + 0.4)

    def told(node: int) -> str:
        return f'{node}\n"{trie.spell(node).decode().replace(" ", "␣")}"' if node else "0\nroot"

    top = deepest + 4.9
    ax.text(-0.25, top + 1.1, "trie nodes", ha="right", color=GREEN)
    ax.text(0.05, top + 1.1, "a node is a range [lo, hi) of the sorted tokens", color=FAINT)
    for node in range(len(trie)):
        lo, hi, ends = int(trie.lo[node]), int(trie.hi[node]), int(trie.ends[node])
        y = top - int(trie.depth[node])
        box(ax, lo, y, hi - lo, told(node), GREEN, fill=0.1)
        for i in range(lo, lo + ends):  # tokens that end at the node come first in its range
            ax.plot([i + 0.08, i + 0.92], [y, y], color=ORANGE, lw=3, solid_capstyle="butt")
    for depth in range(deepest + 1):
        ax.text(-0.25, top - depth + 0.4, f"depth {depth}", ha="right", va="center", color=FAINT)
    ax.plot([-2.7, -2.2], [4.5, 4.5], color=ORANGE, lw=3)
    ax.text(-2.1, 4.5, "a token ends here", va="center", color=ORANGE, fontsize=9)
    spelled = [trie.vocab[int(t)].decode().replace(" ", "␣") for t in trie.order]
    row(ax, 3.3, "tokens, sorted", spelled, PURPLE)
    row(ax, 2.3, "order (token id)", [str(int(t)) for t in trie.order], PURPLE)
    p = np.array([0.05, 0.3, 0.02, 0.1, 0.03, 0.2, 0.1, 0.05, 0.1, 0.05])
    row(ax, 1.3, "a row, permuted", [f"{x:.2f}" for x in p], INK)
    node = trie.find(b" d")
    lo, hi = int(trie.lo[node]), int(trie.hi[node])
    ax.plot([lo + 0.05, hi - 0.05], [1.12, 1.12], color=GREEN, lw=2)
    ax.text(
        (lo + hi) / 2, 0.55, f'mass of "␣d" = the sum over [{lo}, {hi}) = {p[lo:hi].sum():.2f}',
        ha="center", color=GREEN,
    )  # fmt: skip
    return fig


def draw_cache() -> Figure:
    """Contexts as a tree, their slots, and the mask of one forward."""
    tree = ContextTree()
    cache = TreeCache(tree)
    words = ["<s>", "An", "␣apple", "␣app", "le", "␣a", "␣day"]
    ids = {w: i for i, w in enumerate(words)}

    def node(*spelled: str) -> int:
        return tree.insert(ids[w] for w in spelled)

    old = [
        node("<s>"),
        node("<s>", "An"),
        node("<s>", "An", "␣apple"),
        node("<s>", "An", "␣app"),
    ]
    cache.append(np.array(old))
    asked = np.array([node("<s>", "An", "␣apple", "␣a"), node("<s>", "An", "␣app", "le")])
    work = cache.work(asked)
    attention = attend(cache, np.array(work.nodes), work.fresh, always_mask=True, layout="range")
    assert attention.full is not None
    seen = attention.full == 0
    cache.append(np.array(work.nodes))

    fig, ax = canvas(13.2, 10.4)
    ax.set_xlim(-3.4, 9.8)
    places = {0: (2.8, 9.0)}
    xs = {
        old[0]: 2.8,
        old[1]: 2.8,
        old[2]: 1.2,
        old[3]: 4.4,
        work.nodes[0]: 1.2,
        work.nodes[1]: 4.4,
    }
    for n, x in xs.items():
        places[n] = (x, 9.0 - 1.15 * int(tree.depth[n]))
    for n, (x, y) in places.items():
        if n:
            above = places[int(tree.parent[n])]
            ax.add_patch(
                FancyArrowPatch(
                    (above[0] + 0.9, above[1]), (x + 0.9, y + 0.8), arrowstyle="-", color=FAINT
                )
            )
        new = n in work.nodes
        name = "0 (empty)" if not n else f"{n} {words[int(tree.token[n])]}"
        box(ax, x, y, 1.8, name, FAINT if not n else ORANGE if new else PURPLE)
    ax.text(-3.2, 9.4, "ContextTree", va="center")
    ax.text(-3.2, 8.9, "a context is one integer:", color=FAINT, fontsize=8.5)
    ax.text(-3.2, 8.5, "parent, token, depth", color=FAINT, fontsize=8.5)
    ax.text(
        6.6, 5.3, "asked for:\ntheir last tokens\nrun in one forward", color=ORANGE, va="center"
    )

    used = cache.used
    columns = {
        "slot": [str(i) for i in range(used)],
        "node[slot]": [str(int(n)) for n in old + work.nodes],
        "depth[slot]": [str(int(d)) for d in tree.depth[old + work.nodes]],
    }
    for i, (name, values) in enumerate(columns.items()):
        row(ax, 3.1 - 0.9 * i + 0.15, name, values, FAINT if name == "slot" else PURPLE)
    ax.text(used + 0.3, 2.75, "TreeCache, on the host;\nKVBuffer holds the keys and\nvalues of the "
            "same slots", color=FAINT, fontsize=8.5, va="center")  # fmt: skip
    for i, n in enumerate(work.nodes):
        y = 0.75 - 0.72 * i
        ax.text(-0.25, y, f"{n} sees", ha="right", va="center", color=ORANGE)
        for j in range(used):
            face = ORANGE if seen[i, j] else WHITE
            ax.add_patch(Rectangle((j + 0.2, y - 0.28), 0.6, 0.56, facecolor=face, edgecolor=FAINT))
    ax.text(used + 0.3, 0.4, "the 4-D mask: ancestors\nand itself", color=FAINT, fontsize=8.5,
            va="center")  # fmt: skip
    ax.set_ylim(-0.5, 10.0)
    return fig


DRAWINGS = {"trie": draw_trie, "tree_cache": draw_cache}


def main(folder: Path = IMAGES) -> None:
    """Write every drawing to `folder`."""
    folder.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in DRAWINGS.items():
            fig = draw()
            fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(fig)


if __name__ == "__main__":
    main(*(Path(a) for a in sys.argv[1:]))
