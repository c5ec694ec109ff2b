"""The page of a run: well-formed, safe, of limited size, usable by keyboard; its ancestry true."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from genlm_bytes_smc import viz
from genlm_bytes_smc.alphabet import EOS_COLUMN
from genlm_bytes_smc.constraints import ByteRegex
from genlm_bytes_smc.scoring import Cut
from genlm_bytes_smc.smc import SMCResult, smc_sync
from genlm_bytes_smc.smc.particles import Particles, SMCState, StepInfo
from genlm_bytes_smc.surprisals import Surprisal, spans_of
from genlm_bytes_smc.viz import DX, DY, GAP, LEFT, MOST_ROWS, letters_of, run_page
from tests.smc.worlds import FREE, TOPK, toy

N = 12  # particles
EMPTY = ("meta", "input", "img", "br")  # elements that have no end
HOSTILE = b"</script><script>alert(1)</script><!--\x00\x07\x1b[31m\xff\xfe" + (
    b"\xe2\x80\xae\xe2\x80\xa8&amp;'\""
)


class Page(HTMLParser):
    """Tags in their nesting, their attributes, the paths and dots of drawings, the letters."""

    def __init__(self, html):
        super().__init__()
        self.open, self.paths, self.dots, self.letters, self.tags = [], {}, 0, [], []
        self.text = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in EMPTY:
            self.open.append(tag)
        self.handle(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.handle(tag, dict(attrs))

    def handle(self, tag, attrs):
        self.tags.append((tag, attrs))
        self.dots += tag == "circle"
        if tag == "path":
            self.paths[attrs["class"]] = attrs["d"]
        if tag == "text" and "y" in attrs and "text-anchor" not in attrs:
            self.letters.append((attrs["x"], float(attrs["y"]), attrs.get("class") == "off"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def result():
    target = toy(params=TOPK) * ByteRegex(FREE)
    return smc_sync(target, N, 0.95, 12, seed=4, record=True, progress=False)


def made(n, steps, texts=None, resample=True, seed=0, recorded=True, dead=False):
    """A run of printable bytes, with a resampling after every third step."""
    rng = np.random.default_rng(seed)
    history, text = [], np.zeros((n, 0), dtype=np.uint8)
    for t in range(steps):
        symbols = rng.integers(97, 123, n) if texts is None else texts[:, t]
        weights = rng.normal(size=n) * 3 if not (dead and t + 1 == steps) else np.full(n, -np.inf)
        text = np.concatenate([text, symbols[:, None].astype(np.uint8)], axis=1)
        copied = resample and t % 3 == 2 and t + 1 < steps
        ancestors = np.sort(rng.integers(0, n, n)) if copied else None
        if ancestors is not None:
            text = text[ancestors]
        history.append(
            StepInfo(t, 1.0, float(weights.mean()), n, 0, 0, n, ancestors=ancestors,
                     symbols=symbols.astype(np.int16) if recorded else None,
                     log_weights=weights if recorded else None)
        )  # fmt: skip
    zeros = np.zeros(n)
    particles = Particles(
        text, np.full(n, steps), np.ones(n, dtype=bool), weights, zeros, np.arange(n)
    )
    return SMCResult(SMCState(particles, steps, 0, None, 0.0, tuple(history)))


def data(page):
    """What the page's script is given."""
    return json.loads(re.search(r"const run=(\{.*\});\n", page)[1])


# -- the ancestry ------------------------------------------------------------------------


def x_of(step, part):
    return LEFT + step * DX + part * GAP


def cells(path, run):
    """(step, particle) on the horizontal lines of a path, each as often as it is drawn."""
    out, starts = [], {x_of(p["b"], k): p for k, p in enumerate(run["parts"])}
    for x, y, end in re.findall(r"[ML]([\d.]+) ([\d.]+)H([\d.]+)", path):
        part, row = starts[float(x)], round((float(y) - 18) / DY)
        length = round((float(end) - float(x)) / DX + 0.05)
        out += [(part["b"] + t, part["i"][row]) for t in range(length)]
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
    """Lines cover each particle's life once, in colour if a final particle of weight descends."""
    html = run_page(result)
    page, run, expected = Page(html), data(html), lives(result)
    assert len(result.ancestry) >= 2 and not all(expected.values())
    assert cells(page.paths["kept"], run) == sorted(k for k, kept in expected.items() if kept)
    assert cells(page.paths["lost"], run) == sorted(k for k, kept in expected.items() if not kept)
    read = sum(int((i.symbols >= 0).sum()) for i in result.history)
    columns = {
        x_of(t + 0.5, k): (t, p) for k, p in enumerate(run["parts"]) for t in range(p["b"], p["e"])
    }
    assert sum(len(xs.split()) for xs, *_ in page.letters) == read
    for xs, y, off in page.letters:
        for x in xs.split():
            step, part = columns[float(x)]
            assert expected[step, part["i"][round((y - 13) / DY)]] is not off


@pytest.mark.parametrize("seed", range(3))
def test_lines_never_cross(seed):
    """Rows are in the order of their ancestors' rows, at every resampling."""
    parts = data(run_page(made(20, 12, seed=seed)))["parts"]
    assert len(parts) == 4
    for part in parts[1:]:
        assert part["p"] == sorted(part["p"]) and min(part["p"]) >= 0


def test_the_script_gets_each_text_and_its_share(result):
    """Followed to its ancestors, each row spells a particle's text; shares are the weights'."""
    for run_of in (result, made(9, 10)):
        parts = data(run_page(run_of))["parts"]
        for at, particle in enumerate(parts[-1]["i"]):
            row, spelled = at, ""
            for part in reversed(parts):
                spelled = part["s"][row] + spelled
                row = part["p"][row]
            digits = [d for d in re.findall("..", spelled) if d not in ("--", "##")]
            assert bytes.fromhex("".join(digits)) == run_of.texts[particle]
            last = parts[-1]["w"][at][-1]
            share = 0.0 if last is None else math.exp(last)
            assert share == pytest.approx(run_of.normalized_weights[particle], abs=1e-3)


def test_dots_are_where_particles_were_resampled(result):
    """Both charts mark the steps after which particles were resampled."""
    assert Page(run_page(result)).dots == 2 * len(result.ancestry)


def test_letters_keep_their_place():
    """Each symbol has one sign of one UTF-16 unit, whatever the bytes are."""
    symbols = [*"é😀ا\u0301a\n ".encode(), 255, 7, EOS_COLUMN]
    signs = letters_of(symbols)
    assert signs == "é╌◆╌╌╌◆╌◆╌a↵·◆◆■"
    assert len(signs) == len(symbols) == len(signs.encode("utf-16-le")) // 2


def test_a_run_that_noted_no_symbols_shows_lines_alone():
    """Without `record=True` the ancestry is there, without letters and without texts by step."""
    page = run_page(made(9, 10, recorded=False))
    assert Page(page).letters == [] and "Ancestry" in page
    assert "Particles by step" not in page
    assert all(part["s"] == part["w"] == [] and len(part["p"]) == 9 for part in data(page)["parts"])


# -- safety and size ------------------------------------------------------------------------


def coloured(text, n_cuts=2):
    """A text as if it was read: surprisals 0, 1, 2, ... nats, and cuts of every 3rd, 4th byte."""
    cuts = tuple(Cut(0.6 - 0.2 * i, tuple(range(0, len(text), 3 + i))) for i in range(n_cuts))
    nats = np.arange(len(text), dtype=np.float64) % 20
    return Surprisal(text, nats, spans_of(text, "byte"), "<m>", cuts)


def test_a_page_needs_nothing_and_escapes_what_it_is_told(result):
    """Names, prompt and title are escaped, and no address stands in the page."""
    about = {"prompt": "<b>&\x07", "ess_threshold": 0.95}
    page = run_page(result, about, title="<run>")
    Page(page)
    assert "&lt;b&gt;&amp;\\x07" in page and "<title>&lt;run&gt;</title>" in page
    assert "http" not in page and "Dashes" in page
    assert "Particles by step" in page


def test_hostile_texts_are_shown_safely():
    """A text cannot end a script, begin one, hide, or turn the direction of what follows it."""
    texts = np.frombuffer(HOSTILE, dtype=np.uint8)[None].repeat(4, 0)
    result = made(4, len(HOSTILE), texts, resample=False)
    html = run_page(result, {"prompt": HOSTILE.decode("latin-1")}, surprisals=[coloured(HOSTILE)])
    page = Page(html)
    assert html.count("<script>") == html.count("</script>") == 1
    assert "alert(1)</script>" not in html and "<!--" not in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028]", html)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert HOSTILE in result.texts and "\\x00\\x07\\x1b[31m\\xff\\xfe\\u202e" in "".join(page.text)
    run_json = re.search(r"const run=(.*);\n", html)[1]
    assert "<" not in run_json and data(html)["parts"][0]["s"][0] == HOSTILE.hex()


def test_sizes():
    """An ordinary run's page takes less than 200 kB; no run makes one above the stated limit."""
    texts = [coloured(t, 4) for t in made(4, 100).texts]
    ordinary = run_page(made(32, 100), surprisals=texts)
    assert len(ordinary.encode()) < 200_000 and "Drawn:" not in ordinary
    long = [coloured(b"abc\xff" * 250, 4) for _ in range(4)]
    for n, steps in ((3000, 60), (200, 200), (2, 3000)):
        page = run_page(made(n, steps), surprisals=long)
        assert len(page.encode()) < viz.MOST_BYTES
        assert "Drawn:" in page
        assert all(len(p["i"]) <= min(n, MOST_ROWS) for p in data(page)["parts"])


def test_of_many_particles_the_heaviest_are_drawn():
    """The rows in the end are the particles of the greatest weights, and the page says so."""
    result = made(3000, 6)
    page = run_page(result)
    heavy = np.argsort(-result.log_weights)[:MOST_ROWS]
    assert set(data(page)["parts"][-1]["i"]) == set(heavy.tolist())
    assert f"the {MOST_ROWS} of 3,000 particles that weigh most in the end" in page


def test_bars_have_three_scales(result):
    """Widths are shares of the greatest, of one, and of six decades below the greatest."""
    page = run_page(result)
    widths = re.findall(r"--a:([\d.e-]+)%;--p:([\d.e-]+)%;--l:([\d.e-]+)%", page)
    shares = [p for _, p, *_ in result.grouped()]
    assert len(widths) == len(shares) > 3
    for (a, p, log), share in zip(widths, shares, strict=True):
        assert float(a) == pytest.approx(100 * share / shares[0], rel=1e-3)
        assert float(p) == pytest.approx(100 * share, rel=1e-3)
        assert float(log) == pytest.approx(100 + 100 / 6 * math.log10(share / shares[0]), rel=1e-3)


# -- without a mouse -------------------------------------------------------------------------


def test_everything_has_a_name_and_can_have_the_focus(result):
    """Controls are named, drawings described, tables headed; what scrolls takes the focus."""
    html = run_page(result, surprisals=[coloured(b"abcab")])
    page = Page(html)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    for tag, attrs in page.tags:
        if tag == "svg":
            assert attrs["role"] == "img" and attrs["aria-label"]
        if tag == "input" and attrs["type"] == "range":
            assert attrs["aria-label"]
        if tag == "button" and attrs["id" if "id" in attrs else "aria-label"] != "theme":
            assert attrs["aria-label"]
        if tag == "th":
            assert attrs["scope"] == "col"
        if attrs.get("class") == "wide" and attrs.get("id") != "frame":
            assert attrs["tabindex"] == "0" and attrs["aria-label"] and attrs["role"] == "region"
        if "aria-describedby" in attrs:
            assert attrs["aria-describedby"] in ids
    assert sum("data-heat" in a and a["tabindex"] == "0" for _, a in page.tags) == 1
    assert sum(t == "svg" and a.get("tabindex") == "0" for t, a in page.tags) == 1
    assert sum(a.get("aria-live") == "polite" for _, a in page.tags) == 2
    assert ":focus-visible" in html and 'lang="en"' in html
    for name in re.findall(r"\$\('([a-z-]+)'\)|getElementById\('([a-z-]+)'\)", html):
        assert "".join(name) in ids


def luminance(colour):
    """Relative luminance of sRGB in [0, 255], WCAG 2.2."""
    parts = np.asarray(colour, dtype=float) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def rgb(code):
    code = code if len(code) == 6 else "".join(c + c for c in code)
    return np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)])


def test_colours_have_contrast(result):
    """Text has a contrast of 4.5 to its ground (WCAG AA), lines of 3, light and dark."""
    html = run_page(result, surprisals=[coloured(b"abcab")])
    light = dict(re.findall(r"--(\w+):#(\w+)", re.search(r":root\{(.*?)\}", html, re.S)[1]))
    dark = re.search(r":root\[data-theme=dark\]\{(.*?)\}", html, re.S)[1]
    assert (
        dark.strip() in re.search(r"\(prefers-color-scheme:dark\)\{(.*?)\n", html, re.S)[0] + html
    )
    for theme in (light, light | dict(re.findall(r"--(\w+):#(\w+)", dark))):
        colours = {name: rgb(code) for name, code in theme.items()}
        for ground in ("bg", "soft", "here"):
            assert contrast(colours["fg"], colours[ground]) >= 4.5
        for text in ("dim", "hue"):
            assert contrast(colours[text], colours["bg"]) >= 4.5
        for line in ("note", "hue"):
            assert contrast(colours[line], colours["bg"]) >= 3
        heats = re.findall(r"\.gbs-\d\{background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)", html)
        assert len(heats) == 6
        for *heat, alpha in heats:
            blend = float(alpha) * np.array(heat, dtype=float)
            blend = blend + (1 - float(alpha)) * colours["bg"]
            assert contrast(colours["fg"], blend) >= 4.5
