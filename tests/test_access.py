"""The built book for who reads by ear, by keyboard or on a phone, and for who has to scroll."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import WIDTHS, Reader
from conftest import CHAPTERS, OTHERS, PAGES
from playwright.sync_api import Browser

# A page is at most so many screens of 1440 × 900 long.
SCREENS = 18.5
# Boxes with more behind an edge that does not fade there, that a keyboard does not reach or that
# have no name.
SILENT_BOXES = """async () => {
    document.querySelectorAll("details").forEach((details) => { details.open = true; });
    const silent = () => [...document.querySelectorAll(".bd-main *")]
        .filter((box) => /auto|scroll/.test(getComputedStyle(box).overflowX))
        .filter((box) => box.clientWidth && box.scrollWidth > box.clientWidth + 1)
        .filter((box) => box.tabIndex || !box.ariaLabel || !box.matches(".more-right")
            || getComputedStyle(box).maskImage === "none")
        .map((box) => box.outerHTML.slice(0, 200));
    // Boxes are marked soon after they are laid out.
    for (let k = 0; k < 60 && silent().length; k++) await new Promise(requestAnimationFrame);
    return silent();
}"""
FOCUSED = "document.activeElement"
# Whether what is in focus stands out.
OUTLINED = """() => [document.activeElement, ...document.activeElement.children]
    .map((element) => getComputedStyle(element))
    .some((style) => style.outlineStyle !== "none" || style.boxShadow !== "none")"""


# On a phone, dark pages have the colours that they have on a desktop.
@pytest.mark.parametrize(
    ("scheme", "reader"),
    [("light", "desktop"), ("light", "phone"), ("dark", "desktop")],
    indirect=True,
    scope="module",
)
@pytest.mark.parametrize("docname", [*PAGES, *OTHERS])
def test_page_bars_nobody(reader: Reader, docname: str) -> None:
    reader.open(docname)
    found = Axe().run(reader.page, options={"resultTypes": ["violations"]}).response
    assert found["passes"]
    assert [
        (fault["id"], [part["html"] for part in fault["nodes"]])
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ] == []


@pytest.fixture(scope="module")
def phone(browser: Browser, book: Path) -> Iterator[Reader]:
    context = browser.new_context(viewport={"width": WIDTHS["phone"], "height": 844})
    yield Reader(context.new_page(), book)
    context.close()


@pytest.mark.parametrize("docname", [*PAGES, *OTHERS])
def test_what_scrolls_on_a_phone_says_so(phone: Reader, docname: str) -> None:
    phone.open(docname)
    assert phone.page.evaluate(SILENT_BOXES) == []
    width, room = phone.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= room, "opened code must not widen the page"


def test_fading_edges_follow_what_is_scrolled(phone: Reader) -> None:
    phone.open("index")
    code = phone.page.locator("pre.scrolls").first
    assert not code.evaluate("box => box.matches('.more-left')")
    code.focus()
    for _ in range(40):
        phone.page.keyboard.press("ArrowRight")
    phone.page.wait_for_function("document.querySelector('pre.scrolls').matches('.more-left')")
    code.evaluate("box => box.scrollTo(box.scrollWidth, 0)")
    phone.page.wait_for_function("!document.querySelector('pre.scrolls').matches('.more-right')")


@pytest.mark.parametrize("docname", PAGES)
def test_page_has_an_end(browser: Browser, book: Path, docname: str) -> None:
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    Reader(page, book).open(docname)
    height = page.evaluate("document.documentElement.scrollHeight")
    page.close()
    assert height <= SCREENS * 900


@pytest.fixture
def keyboard(browser: Browser, book: Path) -> Iterator[Reader]:
    page = browser.new_page(viewport={"width": WIDTHS["desktop"], "height": 844})
    reader = Reader(page, book)
    reader.open(f"chapters/{CHAPTERS[0].stem}")
    yield reader
    page.close()


def test_contents_can_be_skipped(keyboard: Reader) -> None:
    page = keyboard.page
    page.keyboard.press("Tab")
    assert "Skip" in page.evaluate(f"{FOCUSED}.textContent")
    assert page.locator("#pst-skip-link").is_visible()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate(f"!!{FOCUSED}.closest('main')")


@pytest.mark.parametrize(
    ("fold", "content"),
    [
        ("div.cell details.hide", "div.cell_input"),
        ("div.admonition.dropdown", "p:not(.admonition-title)"),
    ],
    ids=["code", "solution"],
)
def test_what_is_folded_opens_with_enter(keyboard: Reader, fold: str, content: str) -> None:
    page = keyboard.page
    first = page.locator(fold).first
    assert not first.locator(content).first.is_visible()
    first.locator("summary, button").first.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert page.evaluate(f"{FOCUSED}.matches('summary, button')")
    assert page.evaluate(OUTLINED)
    page.keyboard.press("Enter")
    assert first.locator(content).first.is_visible()
    page.keyboard.press("Enter")
    assert not first.locator(content).first.is_visible()


def test_keyboard_passes_from_link_to_link(keyboard: Reader) -> None:
    """Equations are no stops on its way, and what is in focus is seen."""
    page = keyboard.page
    assert page.locator("mjx-container").count()
    assert page.locator("mjx-container[tabindex]:not(.scrolls)").count() == 0
    page.locator(".bd-article a.reference").first.focus()
    for _ in range(10):
        page.keyboard.press("Tab")
        assert page.evaluate(OUTLINED), page.evaluate(f"{FOCUSED}.outerHTML")
