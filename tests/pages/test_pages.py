"""Pages in a real browser: what keys, mouse and buttons do, and screenshots beside kept ones.

They need a Python that has PySide6 with QtWebEngine: `make test-pages` makes one in `.venv-pages`,
and `PAGES_PYTHON` names another. With `PAGES_WRITE=1` the kept pictures are written anew.
"""

import functools
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genlm_bytes_smc.choosing import Choice
from genlm_bytes_smc.surprisals import page as surprisal_page
from genlm_bytes_smc.viz import run_page
from tests.test_viz import HOSTILE, coloured, made

HERE = Path(__file__).parent
PYTHON = Path(os.environ.get("PAGES_PYTHON", HERE.parents[1] / ".venv-pages" / "bin" / "python"))
WIDTHS, SCHEMES = (1400, 400), ("light", "dark")
SHRUNK = 4  # kept pictures are smaller by this factor
BLOCK = 4  # pixels of a kept picture that are compared as one
STRIP = 8  # rows of blocks; the strip that differs most counts
APART = 12  # of 255: blocks that differ more are counted
MOST_APART = 0.1  # share of such blocks in a strip; other fonts shift lines, and count

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"no browser at {PYTHON}: run `make test-pages`"
)


@functools.cache
def pages():
    """The pages looked at: a run, texts coloured by surprisal, answers as in a notebook."""
    texts = ["Once upon — a time there\nwas a dog.".encode(), b"abcdefgh" * 5]
    about = {"prompt": "Once", "constraint": "regex [a-z]{24}", "ess_threshold": 0.5}
    read = [coloured(texts[0], 2), coloured(texts[1], 1)]
    logs = np.log([0.62, 0.3, 0.0799, 0.0001])
    options = ("Paris", "London", "a town with quite a long name " * 4, "<b>")
    choice = Choice(options, logs, np.full(4, -np.inf), "none")
    frame = "<!doctype html><meta name=color-scheme content='light dark'><body>"
    return {
        "run": run_page(made(12, 24), about, surprisals=read),
        "surprisal": surprisal_page(read),
        "notebook": frame + read[0]._repr_html_() + choice._repr_html_(),
        "plain": run_page(made(12, 24, recorded=False)),
        "dead": run_page(made(3, 5, dead=True)),
        "one": run_page(made(1, 1)),
        "hostile": run_page(
            made(4, len(HOSTILE), np.frombuffer(HOSTILE, np.uint8)[None].repeat(4, 0), False),
            surprisals=[coloured(HOSTILE)],
        ),
    }


def browse(folder, scheme, jobs):
    """What the browser found, by jobs of (page, width, actions)."""
    told = []
    for name, width, actions in jobs:
        (folder / f"{name}.html").write_text(pages()[name], encoding="utf-8")
        told.append({"html": str(folder / f"{name}.html"), "width": width, "do": actions})
    done = subprocess.run(
        [str(PYTHON), str(HERE / "browser.py"), scheme],
        input=json.dumps(told), text=True, capture_output=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert all(f["console"] == [] for f in found), found
    assert all(f["requests"] == [] for f in found), found
    return [f["values"] for f in found]


FIT = {"js": "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"}
GROUND = {"js": "return getComputedStyle(document.body).backgroundColor"}


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """Pictures of three pages in two widths and both schemes, and what else was found there."""
    folder, found = tmp_path_factory.mktemp("shots"), {}
    names = [(n, w) for n in ("run", "surprisal", "notebook") for w in WIDTHS]
    for scheme in SCHEMES:
        jobs = [
            (n, w, [{"shot": str(folder / f"{n}_{w}_{scheme}.png")}, FIT, GROUND]) for n, w in names
        ]
        for (n, w), values in zip(names, browse(folder, scheme, jobs), strict=True):
            found[n, w, scheme] = (folder / f"{n}_{w}_{scheme}.png", *values)
    return found


def small(path):
    picture = Image.open(path).convert("RGB")
    size = (picture.width // SHRUNK, picture.height // SHRUNK)
    return picture.resize(size, Image.Resampling.BOX)


def blocks(picture):
    size = (max(picture.width // BLOCK, 1), max(picture.height // BLOCK, 1))
    return np.asarray(picture.resize(size, Image.Resampling.BOX), dtype=float)


def apart(one, other):
    """The share of blocks that differ in the strip where it is greatest.

    1 for pictures whose heights differ by more than 5 %.
    """
    if abs(one.height - other.height) > 0.05 * other.height:
        return 1.0
    a, b = blocks(one), blocks(other.resize(one.size))
    differ = np.abs(a - b).max(axis=2) > APART
    return max(float(differ[y : y + STRIP].mean()) for y in range(0, len(differ), STRIP))


def kept(name, width, scheme):
    return HERE / "kept" / f"{name}_{width}_{scheme}.png"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "surprisal", "notebook"])
def test_pages_look_as_they_did(shots, name, width, scheme):
    """A screenshot has few blocks that differ from the kept picture, and nothing overflows."""
    path, (wide, room), _ = shots[name, width, scheme]
    assert wide <= room
    picture, place = small(path), kept(name, width, scheme)
    if os.environ.get("PAGES_WRITE"):
        place.parent.mkdir(exist_ok=True)
        picture.quantize(192, dither=Image.Dither.NONE).save(place, optimize=True)
    assert apart(picture, Image.open(place).convert("RGB")) <= MOST_APART


def test_the_comparison_sees_what_it_is_for(shots):
    """Another scheme, another page, and a page without its ancestry are all seen as different."""
    picture = small(shots["run", 1400, "light"][0])
    assert apart(picture, small(shots["run", 1400, "dark"][0])) > 0.5
    assert apart(picture, small(shots["surprisal", 1400, "light"][0])) > MOST_APART
    pixels = np.asarray(picture).copy()
    height = len(pixels)
    assert (pixels[int(0.6 * height) : int(0.7 * height)] < 200).any()
    pixels[int(0.6 * height) : int(0.7 * height)] = 255
    assert apart(picture, Image.fromarray(pixels)) > MOST_APART


def test_kept_pictures_are_small():
    """They take less than 150 kB together."""
    assert sum(p.stat().st_size for p in (HERE / "kept").iterdir()) < 150_000


def test_the_ground_follows_the_system_and_the_button(shots, tmp_path):
    """Light and dark as the system prefers; the button changes it, and back, by mouse or key."""
    assert shots["run", 400, "light"][2] == "rgb(255, 255, 255)"
    assert shots["run", 400, "dark"][2] == "rgb(20, 23, 27)"
    press = [{"key": "Tab"}, GROUND, {"key": "Space"}, GROUND, {"key": "Space"}, GROUND]
    for scheme, order in (("light", [255, 20, 255]), ("dark", [20, 255, 20])):
        (values,) = browse(tmp_path, scheme, [("surprisal", 600, press)])
        assert [int(v[4:].split(",")[0]) for v in values] == order


WHERE = {
    "js": "const a=document.activeElement,b=getComputedStyle(a);"
    "return [a.id||a.dataset.go||a.name||a.getAttribute('aria-label')||a.tagName, b.outlineStyle]"
}
STEP = {"js": "return document.getElementById('step').textContent"}
WHO = {"js": "return document.getElementById('who').textContent"}
TOLD = {"js": "return document.querySelector('[data-heat]~output').textContent"}
BAR = {"js": "return document.querySelectorAll('td.bar i')[5].getBoundingClientRect().width"}


def test_all_can_be_reached_and_used_by_keys(tmp_path):
    """Tab goes through all controls, with an outline; arrows read texts, step and choose."""
    order = ["theme", "scale", "posterior", "text 1 coloured by surprisal",
             "text 2 coloured by surprisal", "first", "back", "on", "last", "at", "tree",
             "texts at this step"]  # fmt: skip
    tabs = [action for _ in order for action in ({"key": "Tab"}, WHERE)]
    bars = [{"key": "Tab"}, {"key": "Tab"}, BAR, {"key": "Right"}, BAR, {"key": "Right"}, BAR]
    read = [{"key": "Tab"}] * 2 + [{"key": "Right"}] * 6 + [TOLD, {"key": "Home"}, TOLD]
    step = (
        [{"key": "Tab"}] * 3 + [STEP, {"key": "Space"}, STEP] + [{"key": "Tab"}] * 3
        + [{"key": "Right"}, STEP, {"key": "Tab"}, {"key": "Left"}, {"key": "Left"}, STEP]
        + [{"key": "Home"}, STEP, WHO, {"key": "Down"}, WHO, {"key": "End"}, STEP]
    )  # fmt: skip
    walked, used = browse(
        tmp_path, "light", [("run", 1400, tabs), ("run", 1400, bars + read + step)]
    )
    assert [name for name, _ in walked] == order
    assert all(outline != "none" for _, outline in walked)
    greatest, logarithmic, probability = used[:3]
    assert logarithmic > greatest > probability
    assert used[3:5] == [
        "6 of 35: “u” 7.21 bits; in tokens “e u”, “ upo”",
        "1 of 35: “O” 0.00 bits; in tokens “Onc”, “Once”",
    ]
    before, after = used[5:7]
    assert (before, after) == ("step 12 of 24", "step 11 of 24")
    assert used[7:10] == ["step 12 of 24", "step 10 of 24", "step 1 of 24"]
    one, other = used[10:12]
    assert one.startswith("Particle ") and other.startswith("Particle ") and one != other
    assert used[12] == "step 24 of 24"


def test_the_mouse_shows_a_line_and_its_text(tmp_path):
    """Over the third row of the second stretch, the page tells its particle, text and ancestor."""
    place = {"js": "document.getElementById('tree').scrollIntoView();return 0"}
    box = "const b=document.getElementById('tree').getBoundingClientRect();"
    at = {"js": box + "return [b.left,b.top]"}
    hot = {"js": "return document.getElementById('hot').getAttribute('d')"}
    ((_, (left, top)),) = browse(tmp_path, "light", [("run", 1400, [place, at])])
    x, y = left + 10 + 4.5 * 14 + 26, top + 50
    moves = [place, {"move": [int(x), int(y) - 1]}, {"move": [int(x), int(y)]}, STEP, WHO, hot]
    ((_, step, who, line),) = browse(tmp_path, "light", [("run", 1400, moves)])
    run = made(12, 24)
    data = json.loads(pages()["run"].split("const run=")[1].split(";\n")[0])
    part, before = data["parts"][1], data["parts"][0]
    particle, ancestor = part["i"][2], before["i"][part["p"][2]]
    assert ancestor == run.history[2].ancestors[particle]
    assert step == "step 5 of 24"
    symbols = [run.history[t].symbols[ancestor] for t in range(3)]
    symbols += [run.history[t].symbols[particle] for t in (3, 4)]
    assert who.startswith(f"Particle {particle} at step 5: reads “{chr(symbols[-1])}”")
    assert f"copied from particle {ancestor} after step 3" in who
    assert who.endswith(bytes(symbols).decode())
    assert line.count("H") == 2


def test_a_hostile_text_does_nothing(tmp_path):
    """No script of a text runs, no element of it is made, and its controls are shown as escapes."""
    seen = {"js": "return [document.scripts.length, document.getElementById('now').textContent]"}
    last = {"js": "document.querySelector('[data-go=last]').click();return 0"}
    ((_, (scripts, shown)),) = browse(tmp_path, "light", [("hostile", 400, [last, seen])])
    assert scripts == 1
    assert "</script><script>alert(1)</script><!--\\u0000\\u0007\\u001b[31m��\\u{202e}" in shown


def test_runs_of_other_kinds_step_without_errors(tmp_path):
    """A run that noted no symbols, one whose particles all died, and one of one step."""
    keys = [{"js": "document.getElementById('tree').focus();return 0"}]
    keys += [{"key": k} for k in ("Home", "Right", "Down", "Right", "Right", "Left", "End", "Up")]
    names = ("plain", "dead", "one")
    found = browse(tmp_path, "light", [(n, 400, [*keys, STEP, WHO]) for n in names])
    assert [step for _, step, _ in found] == ["step 24 of 24", "step 5 of 5", "step 1 of 1"]
    assert "of the weight" not in found[0][2] and "copied from particle" in found[0][2]
    assert "no final particle of weight descends" in found[1][2]
