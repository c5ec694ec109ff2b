"""The page of a run: well-formed, and its ancestry is that of the particles one by one."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.smc import smc_sync
from genlm_bytes_smc.viz import run_page
from tests.smc.worlds import FREE, TOPK, toy

N, DX, DY = 12, 14, 17  # particles; width of a step and height of a particle, pixels


class Page(HTMLParser):
    """Tags in their nesting, the paths and dots of the drawings, and the letters."""

    def __init__(self, html):
        super().__init__()
        self.open, self.paths, self.dots, self.letters = [], {}, 0, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)
        self.handle(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.handle(tag, dict(attrs))

    def handle(self, tag, attrs):
        self.dots += tag == "circle"
        if tag == "path":
            self.paths[attrs["class"]] = attrs["d"]
        if tag == "text" and "y" in attrs and "text-anchor" not in attrs:
            self.letters.append((float(attrs["x"]), float(attrs["y"]), "off" in attrs["class"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def result():
    target = toy(params=TOPK) * ByteRegex(FREE)
    return smc_sync(target, N, 0.95, 12, seed=4, record=True, progress=False)


def cells(path):
    """(step, particle) on the horizontal lines of a path, each as often as it is drawn."""
    out = []
    for x, y, end in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)", path):
        first, last = (float(x) - 10) / DX, (float(end) - 10) / DX
        out += [(t, round((float(y) - 4) / DY - 0.5)) for t in range(round(first), int(last) + 1)]
    return sorted(out)


def lives(result):
    """(step, particle) that read a byte or wait for it, and whether anyone of weight descends."""
    found = {}
    alive = np.ones(N, dtype=bool)
    for t, info in enumerate(result.history):
        for i in np.flatnonzero(alive):
            found[t, int(i)] = False
            over = info.symbols[i] == EOS_COLUMN or info.log_weights[i] == -np.inf
            alive[i] = not (info.symbols[i] >= 0 and over)
        if info.ancestors is not None:
            alive = alive[info.ancestors]
    for i in np.flatnonzero(result.normalized_weights > 0):
        for t, info in reversed(list(enumerate(result.history))):
            i = int(i if info.ancestors is None else info.ancestors[i])
            if (t, i) in found:
                found[t, i] = True
    return found


def test_the_ancestry_is_that_of_each_particle(result):
    page, expected = Page(run_page(result)), lives(result)
    assert len(result.ancestry) >= 2 and not all(expected.values())
    assert cells(page.paths["kept"]) == sorted(k for k, kept in expected.items() if kept)
    assert cells(page.paths["lost"]) == sorted(k for k, kept in expected.items() if not kept)
    read = sum(int((i.symbols >= 0).sum()) for i in result.history)
    assert len(page.letters) == read
    for x, y, off in page.letters:
        step, particle = round((x - 10) / DX - 0.5), round((y - 8) / DY - 0.5)
        assert expected[step, particle] is not off


def test_dots_are_where_particles_were_resampled(result):
    assert Page(run_page(result)).dots == 2 * len(result.ancestry)


def test_a_page_needs_nothing_and_escapes_what_it_is_told(result):
    about = {"prompt": "<b>&\x07", "ess_threshold": 0.95}
    page = run_page(result, about, title="<run>")
    Page(page)
    assert "&lt;b&gt;&amp;\\x07" in page and "<title>&lt;run&gt;</title>" in page
    assert "http" not in page and "Dashes" in page
    assert "Particles by step" in page and page.count("</script>") == 1
