"""The pages of the book in a browser: for who sees, hears or types them, on a desk or a phone.

One page of each kind is opened, once: for its mathematics, pictures and width, and with axe. The
others are opened in nightly runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import PAGES, STANDS_STILL, reading
from conftest import CHAPTERS
from playwright.sync_api import Browser, Page
from print_pdf import print_page
from pypdf import PdfReader

PHONE = 390
# Of these each has parts that no other has; the rest are made of the same parts and colours.
KINDS = [
    *("index", "search", "chapters/answers", "chapters/03-partitions", "chapters/14-planning"),
    *("chapters/scorecard", "chapters/statements", "chapters/whole-transformers"),
    "chapters/reference/networks",
]
OTHERS = [name for name in PAGES if name not in KINDS]
# MathJax shows what it cannot read in red: text for an unknown macro, a box for an error.
UNREAD_MATHEMATICS = """() => [...document.querySelectorAll("span.math, div.math")]
    .filter((element) => !element.querySelector("mjx-container")
        || element.querySelector("mjx-merror, [data-mjx-error], [style*='color: red']"))
    .map((element) => element.textContent)"""
FAULTY_IMAGES = """() => [...document.images]
    .filter((image) => !image.complete || image.naturalWidth === 0 || !image.alt)
    .map((image) => image.outerHTML)"""
TOO_WIDE = "document.documentElement.scrollWidth > innerWidth"
OPEN_FOLDS = 'document.querySelectorAll("details").forEach((fold) => { fold.open = true; })'
# Boxes with more behind an edge that does not fade there, that a keyboard does not reach or that
# have no name.
SILENT_BOXES = """async () => {
    const silent = () => [...document.querySelectorAll(".bd-main *")]
        .filter((box) => /auto|scroll/.test(getComputedStyle(box).overflowX))
        .filter((box) => box.checkVisibility())
        .filter((box) => box.clientWidth && box.scrollWidth > box.clientWidth + 1)
        .filter((box) => box.tabIndex || !box.ariaLabel || !box.matches(".more-right")
            || getComputedStyle(box).maskImage === "none")
        .map((box) => box.outerHTML.slice(0, 200));
    // Boxes are marked soon after they are laid out.
    for (let k = 0; k < 60 && silent().length; k++) await new Promise(requestAnimationFrame);
    return silent();
}"""
# Code and numbered equations of which a phone shows a part.
CLIPPED = """() => [...document.querySelectorAll(
        "div.math:has(.eqno) mjx-container, div.highlight pre:not(.output *)")]
    .filter((box) => box.clientWidth && box.scrollWidth > box.clientWidth + 1)
    .map((box) => box.textContent.slice(0, 200))"""
SWITCH, FOLDED = "button.show-code", "div.cell > details.hide"
# Whether what is in focus stands out.
OUTLINED = """() => [document.activeElement, ...document.activeElement.children]
    .map((element) => getComputedStyle(element))
    .some((style) => style.outlineStyle !== "none" || style.boxShadow !== "none")"""
REFERENCE = ".bd-article a.reference[href$='#thm-one-layer']"


def bars(page: Page) -> list[Any]:
    """What bars some readers, by the rules of axe."""
    found = Axe().run(page, options={"resultTypes": ["violations"], "preload": False})
    assert found.response["passes"]
    return [
        (fault["id"], [node["html"] for node in fault["nodes"]])
        for fault in found.response["violations"]
        if fault["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(
    "docname", [*KINDS, *(pytest.param(name, marks=pytest.mark.nightly) for name in OTHERS)]
)
def test_page_shows_what_it_has_to_everybody(browser: Browser, book: Path, docname: str) -> None:
    with reading(browser, book) as reader:
        page = reader.page
        reader.open(docname)
        faults = {
            "mathematics": page.evaluate(UNREAD_MATHEMATICS),
            "images": page.evaluate(FAULTY_IMAGES),
            "wider than the screen": page.evaluate(TOO_WIDE),
            "bars": bars(page),
        }
        page.set_viewport_size({"width": PHONE, "height": 844})
        page.evaluate(OPEN_FOLDS)
        faults["wider than a phone"] = page.evaluate(TOO_WIDE)
        faults["silent boxes"] = page.evaluate(SILENT_BOXES)
        faults["clipped"] = page.evaluate(CLIPPED)
        if docname == "chapters/03-partitions":
            # As where the whole screen becomes dark in the evening.
            page.emulate_media(color_scheme="dark")
            page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
            page.wait_for_function(STANDS_STILL)
            faults["bars on a phone in the dark"] = bars(page)
        assert not {what: fault for what, fault in faults.items() if fault}


def test_search_finds_a_word(browser: Browser, book: Path) -> None:
    with reading(browser, book) as reader:
        reader.open("search", "?q=fnn_threshold")
        reader.page.locator("#search-results ul.search li a").first.click()
        assert "reference/bounds.html" in reader.page.url


def shown(page: Page, selector: str) -> set[bool]:
    """Whether elements are seen: all, none or some."""
    return {element.is_visible() for element in page.locator(selector).all()}


def test_one_switch_shows_the_code_of_all_pages(browser: Browser, book: Path) -> None:
    """To a keyboard too, until it is pressed again; what is read stays in its place."""
    code = f"{FOLDED}:not(.dropdown *, .sd-dropdown *) div.cell_input"
    place = "part => part.getBoundingClientRect().top"
    with reading(browser, book) as reader:
        page = reader.page
        reader.open("chapters/03-partitions")
        assert shown(page, code) == {False}
        page.locator(SWITCH).focus()
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Tab")
        assert page.evaluate(OUTLINED)
        heading = page.locator("article h2").nth(3)
        page.evaluate("top => scrollTo({ top, behavior: 'instant' })", heading.evaluate(place) - 80)
        before = heading.evaluate(place)
        page.keyboard.press("Enter")
        page.wait_for_function(STANDS_STILL)
        assert shown(page, code) == {True}
        assert abs(heading.evaluate(place) - before) < 2
        reader.open(f"chapters/{CHAPTERS[0].stem}")
        assert shown(page, code) == {True}
        assert shown(page, f"{FOLDED} > summary") == {False}
        page.get_by_role("button", name="Show code", pressed=True).press("Space")
        assert shown(page, code) == {False}


def test_a_link_opens_the_code_that_it_leads_to(browser: Browser, book: Path) -> None:
    with reading(browser, book) as reader:
        page, docname = reader.page, "chapters/04-transformers"
        reader.open(docname)
        cell = page.locator(f"{FOLDED} pre[id]").last.get_attribute("id")
        reader.open("index")  # of what was opened nothing stays
        reader.open(docname, f"#{cell}")
        page.locator(f"#{cell}").wait_for()
        assert page.locator(f"{FOLDED}[open]").count() == 1


def test_without_scripts_references_are_links_and_code_opens(browser: Browser, book: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((book / "chapters" / "03-partitions.html").as_uri())
    assert page.locator(SWITCH).count() == 0
    code = page.locator(f"{FOLDED} div.cell_input").first
    assert not code.is_visible()
    page.locator(f"{FOLDED} > summary").first.click()
    assert code.is_visible()
    page.locator(REFERENCE).first.click()
    assert page.url.endswith("02-linearization.html#thm-one-layer")
    context.close()


def test_a_page_is_printed_whole_and_without_code(
    browser: Browser, book: Path, tmp_path: Path
) -> None:
    target = tmp_path / "page.pdf"
    print_page(browser, book / "chapters" / "02-linearization.html", target)
    text = " ".join(page.extract_text() for page in PdfReader(target).pages)
    assert "One ReLU layer from many" in " ".join(text.split())
    assert "In sum" in text
    assert "import matplotlib" not in text
    assert str(book).encode() not in target.read_bytes()
