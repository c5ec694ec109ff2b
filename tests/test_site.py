"""The documentation site, as `make docs-site` has built it: whole, readable without a network."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

import genlm_bytes_smc

pytest.importorskip("mkdocs", reason="`make docs-site` runs these tests")

ROOT = Path(__file__).parent.parent
SITE = ROOT / "site"
sys.path.insert(0, str(ROOT / "docs"))

import refresh_outputs  # noqa: E402

# What a browser fetches by itself, by tag and attribute; a link is followed by the reader only.
FETCHED = {
    ("script", "src"),
    ("img", "src"),
    ("link", "href"),
    ("iframe", "src"),
    ("source", "src"),
}
NOT_FETCHED = {"canonical", "prev", "next", "author", "license"}


class Page(HTMLParser):
    """The addresses that a page names, and the anchors that it has."""

    def __init__(self, path):
        super().__init__()
        self.fetched, self.links, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given.get("id"), given.get("name")}
        for name, value in attrs:
            if (tag, name) in FETCHED and given.get("rel") not in NOT_FETCHED:
                self.fetched.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


@pytest.fixture(scope="module")
def pages():
    assert (SITE / "index.html").exists(), "run `make docs-site`"
    found = {p: Page(p) for p in SITE.rglob("*.html")}
    assert len(found) > 50
    return found


def test_no_page_fetches_anything_from_another_place(pages):
    """A page read from a disk loads no script, font, style or picture from the network."""
    for path, page in pages.items():
        for address in page.fetched:
            assert urlsplit(address).scheme in ("", "data"), (path, address)
    for path in SITE.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\([\"']?(https?:)?//", text), path


def test_every_link_leads_to_a_file_and_an_anchor(pages):
    """All addresses within the site exist, those of generated pages and the reference included."""
    for path, page in pages.items():
        if path.name == "404.html":  # its links are from the root of a server
            continue
        for address in page.fetched + page.links:
            if urlsplit(address).scheme:
                continue
            file, anchor = urldefrag(address)
            target = (path.parent / unquote(file)).resolve() if file else path
            assert target.is_file(), (path, address)
            if anchor and target in pages and not anchor.startswith("__"):
                assert unquote(anchor) in pages[target].anchors, (path, address)


def test_every_public_name_is_in_the_reference(pages):
    """The reference has an entry with its parameters for all that users import."""
    page = pages[SITE / "reference" / "main.html"]
    missing = {f"genlm_bytes_smc.{n}" for n in genlm_bytes_smc.__all__} - page.anchors
    assert missing <= {"genlm_bytes_smc.smc"}, missing  # a package, with a page of its own
    assert "genlm_bytes_smc.smc.smc_repeat" in pages[SITE / "reference" / "smc.html"].anchors


def test_every_example_is_shown_with_its_output():
    """Each script of examples/ has a page with all its code, and the output that was kept."""
    for script in refresh_outputs.scripts():
        text = visible(SITE / "examples" / f"{script.stem}.html")
        kept = (refresh_outputs.OUTPUTS / f"{script.stem}.txt").read_text(encoding="utf-8")
        assert squeezed(kept) in text, script
        assert squeezed(script.read_text(encoding="utf-8").split('"""', 2)[2]) in text, script


def test_the_search_works_from_a_disk(pages):
    """The index is a script that has every page, and pages load what runs it without a server."""
    index = (SITE / "search" / "search_index.js").read_text(encoding="utf-8")
    for place in ("tutorial.html", "howto/classify.html", "reference/smc.html"):
        assert f'"location":"{place}' in index, place
    assert any(a.endswith("iframe-worker.js") for a in pages[SITE / "theory.html"].fetched)


def test_every_block_of_code_is_shown_as_one(pages):
    """No fence of a block is left as text."""
    for path in pages:
        if path.is_relative_to(SITE / "repository" / "tests") or "experiments" in path.parts:
            continue  # which have fences in their own text
        assert "```" not in visible(path), path


def test_formulas_are_shown_without_scripts():
    """Formulas of the theory are MathML: no TeX is left, and no library that would turn it."""
    text = (SITE / "theory.html").read_text(encoding="utf-8")
    assert text.count("<math") > 100
    assert "\\(" not in visible(SITE / "theory.html")


def visible(path):
    """The text of a page without white space."""
    parts = []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_data = parts.append
    parser.feed(path.read_text(encoding="utf-8"))
    return squeezed("".join(parts))


def squeezed(text):
    return re.sub(r"\s+", "", text)
