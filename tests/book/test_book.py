"""The built book's files; how it looks and behaves in a browser is in `test_pages`."""

from __future__ import annotations

import functools
import posixpath
import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import api
import pytest
import yaml
from browsing import PAGES, soup
from bs4 import Tag
from conftest import CHAPTERS, ROOT
from sphinx.util.inventory import InventoryFile

from lorapower.book._executed import read_claims
from lorapower.book.claims import Claim

# The modules that each page on the package shows.
REFERENCE = ROOT / "chapters" / "reference"
PACKAGE = {
    f"chapters/reference/{page.stem}": re.findall(r"(?m)^\.\. automodule:: (.+)$", page.read_text())
    for page in sorted(REFERENCE.glob("*.rst"))
    if page.stem != "index"
}
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


def test_addresses_of_earlier_editions_lead_on(book: Path) -> None:
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    redirects = settings["sphinx"]["config"]["redirects"]
    assert redirects
    for old, new in redirects.items():
        assert new in (book / f"{old}.html").read_text(encoding="utf-8")
        assert ((book / old).parent / new).is_file()


@every_chapter
def test_chapter_has_the_number_of_its_file(book: Path, chapter: Path) -> None:
    """In all parts of the book; its statements and figures count from there, a note's from one."""
    name = chapter.stem.partition("-")[0].lstrip("0")
    expected = rf"\b{name}\." if re.fullmatch(r"\d+|[A-Z]", name) else r"^\D+\d+\s*$"
    page = soup(book, f"chapters/{chapter.stem}")
    counters = page.select("h1 .section-number, article .caption-number")
    assert counters
    for counter in counters:
        assert re.search(expected, counter.get_text()), counter


@pytest.mark.parametrize("docname", [*PAGES, "search"])
def test_links_resolve_and_mathematics_keeps_its_punctuation(book: Path, docname: str) -> None:
    here, page = book / f"{docname}.html", soup(book, docname)
    broken = []
    for link in page.select("a[href]"):
        address = urlsplit(str(link["href"]))
        if address.scheme or address.netloc:
            continue
        target = (here.parent / unquote(address.path)).resolve() if address.path else here
        fragment = unquote(address.fragment)
        if not target.is_file() or (fragment and fragment not in anchors(target)):
            broken.append(link["href"])
    assert broken == []
    # A line may end behind a formula, but not before what closes it.
    for formula in page.select("article span.math"):
        if str(formula.next_sibling)[:1] in {*",.;:!?)"}:
            assert formula.find_parent("span", class_="text-nowrap"), formula


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    return frozenset(re.findall(r'<[^>]* id="([^"]+)"', page.read_text(encoding="utf-8")))


def claimed(book: Path, chapter: Path) -> list[Claim]:
    return read_claims(book / "_sources" / "chapters" / chapter.name)


@every_chapter
def test_every_claim_is_on_the_scorecard_and_behind_its_statement(
    book: Path, chapter: Path
) -> None:
    page, scorecard = soup(book, f"chapters/{chapter.stem}"), soup(book, "chapters/scorecard")
    assert "✓ Holds" not in page.get_text()
    shown: list[str] = []
    badges = {str(badge["href"]): badge for badge in page.select("div.proof a.verdict")}
    for entry in scorecard.select(f"div.claims[id^='claims-{chapter.stem.lower()}-']"):
        statement, back = entry.select("p > a")
        label = str(statement["href"]).partition("#")[2]
        if badge := badges.pop(f"scorecard.html#{entry['id']}", None):
            box = badge.find_parent("div", class_="proof")
            assert box is not None
            assert box["id"] == label
            assert back["href"] == f"{chapter.stem}.html#{badge['id']}"
            assert back.get_text() == badge.get_text()
        else:
            assert not page.select(f"div.proof#{label}")
        sentences = entry.select("li")
        assert (str(len(sentences)) in back.get_text()) is (len(sentences) > 1)
        shown += [f"{label}: {plain(sentence)}" for sentence in sentences]
    assert not badges
    claims = claimed(book, chapter)
    assert Counter(shown) == Counter(f"{claim.label}: {plain(claim.line)}" for claim in claims)


def plain(text: str | Tag) -> str:
    """The words of Markdown, or of what it became, without its mathematics."""
    if isinstance(text, Tag):
        text = " ".join(part for part in text.strings if not part.startswith("\\("))
    return " ".join(re.findall(r"\w+", re.sub(r"\$[^$]*\$", " ", text)))


def test_every_module_of_the_package_has_a_place() -> None:
    modules = [module for modules in PACKAGE.values() for module in modules]
    shown = [name.partition(".")[2] for name in modules if name.startswith("lorapower.")]
    top = {path.stem for path in (ROOT / "lorapower").iterdir() if not path.name.startswith("_")}
    index = (REFERENCE / "index.rst").read_text()
    listed = {name.split(".")[0] for name in re.findall(r"(?m)^   ([\w.]+)$", index)}
    assert {name.split(".")[0] for name in shown} == top - {"py"} == listed
    assert len(shown) == len(set(shown))


@pytest.mark.parametrize("docname", PACKAGE)
def test_page_on_the_package_has_every_public_name(book: Path, docname: str) -> None:
    modules = PACKAGE[docname]
    expected = {f"{name}.{each}" for name in modules for each in api.public(import_module(name))}
    shown = {str(entry["id"]) for entry in soup(book, docname).select("dt.sig[id]")}
    assert expected <= shown
    assert {f"module-{module}" for module in modules} <= anchors(book / f"{docname}.html")


def test_members_come_from_bases_without_an_entry(book: Path) -> None:
    with (book / "objects.inv").open("rb") as file:
        entries = InventoryFile.load(file, "", posixpath.join)
    methods = entries["py:method"]
    assert {f"lorapower.networks.FNN.{name}" for name in ("__call__", "random")} <= {*methods}
    assert "lorapower.networks.FNN.depth" in entries["py:property"]
    # The first is said at the base, which has an entry; the second has no docstring of its own.
    assert not {f"lorapower.networks.FNN.{name}" for name in ("map", "with_parameters")} & {
        name for name, (*_, place, _) in methods.items() if "FNN" in place
    }
    assert "lorapower.book.WIDEST" in entries["py:data"]


def test_labels_in_docstrings_become_links() -> None:
    text = api.link_labels("`pad` of ``x `y` z`` by [thm-partition], ``[a-b]``, [..., k].")
    assert text == "`pad` of ``x `y` z`` by [:prf:ref:`thm-partition`], ``[a-b]``, [..., k]."


def test_labels_in_docstrings_lead_to_their_statements(book: Path) -> None:
    kinds = "Assumption|Corollary|Definition|Lemma|Proposition|Remark|Theorem"
    numbered = re.compile(rf"({kinds}) ((\d+|[A-Z])\.)?\d+")
    found = {}
    for docname in PACKAGE:
        page = soup(book, docname)
        assert not re.search(r"\[[a-z]+-[a-z-]+\]", page.get_text()), docname
        for link in page.select("dl.py a[href^='../']"):
            assert numbered.fullmatch(link.get_text()), link
            found[str(link["href"]).partition("#")[2]] = link.get_text()
    assert {"thm-optimal-adaptation", "thm-partition", "thm-transformer"} <= found.keys()
    assert found["thm-optimal-adaptation"].startswith("Theorem 1.")


def referred(part: Tag) -> set[str]:
    """The anchors that links in a part of a page lead to, but for those beside headings."""
    links = part.select("a.reference.internal[href*='#']")
    return {str(link["href"]).partition("#")[2] for link in links}


def test_index_has_every_statement_and_what_it_rests_on(book: Path) -> None:
    stated = {
        str(box["id"])
        for chapter in CHAPTERS
        for box in soup(book, f"chapters/{chapter.stem}").select("div.proof.admonition:not(#proof)")
    }
    checks = Counter(claim.label for chapter in CHAPTERS for claim in claimed(book, chapter))
    listed, uses = set[str](), set[str]()
    for row in soup(book, "chapters/statements").select("table.statements tbody tr"):
        _, statement, _, rests, number = row.select("td")
        (label,) = referred(statement)
        assert number.get_text() == str(checks[label] or "–")
        listed.add(label)
        uses |= referred(rests)
    assert listed == stated
    assert "thm-optimal-adaptation" in uses <= stated


# The pages that a reader meets first


def test_front_page_leads_everywhere(book: Path) -> None:
    page = soup(book, "index")
    links = {str(link["href"]).partition("#")[0] for link in page.select("article a[href]")}
    doors = {f"chapters/{name}.html" for name in ("quickstart", "map", "answers", "built")}
    assert doors | {f"chapters/{chapter.stem}.html" for chapter in CHAPTERS} <= links
    assert len(page.select("article figure img")) == 2


def test_answers_are_one_line_and_say_what_they_rest_on(book: Path) -> None:
    """With numbers of the run, all of which are shown."""
    page = soup(book, "chapters/answers")
    for question in page.select("article h3"):
        answer = question.find_next_sibling("p")
        assert answer is not None
        (bold,) = answer.select(":scope > strong")
        assert answer.get_text() == bold.get_text()
        details = answer.find_next_sibling("details")
        assert details is not None
        assert details.select("a.reference.internal")
    numbers = [number.get_text() for number in page.select("span.pasted-text")]
    assert numbers
    assert all(re.search(r"\d", number) and "nan" not in number for number in numbers)


def test_quick_start_shows_every_command_and_its_output(book: Path) -> None:
    page = soup(book, "chapters/quickstart")
    blocks = [block.get_text() for block in page.select("article div.highlight pre")]
    outputs = [block.get_text() for block in page.select("article div.terminal pre")]
    for name in ("plan", "extract", "check", "shrink"):
        # Of plans the first lists sizes; of checks it has the adapter.
        places = [k for k, text in enumerate(blocks) if text.startswith(f"loraplan {name} ")]
        at = places[name == "plan"]
        assert blocks[at + 1] in outputs
        assert re.search(r"Estimate +[\d.]+% of tuning's effect lost", blocks[at + 1])
        assert "NOT" not in blocks[at + 1]
