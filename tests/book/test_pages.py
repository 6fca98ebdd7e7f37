"""The pages of the book in a browser: for who sees, hears or types them, on a desk or a phone.

Each page is opened once, for its mathematics, pictures and width. What all pages are made of is
looked at on some, with axe, on both screens, in the light and the dark.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import OTHERS, PAGES, STANDS_STILL, Reader, reading
from conftest import CHAPTERS
from playwright.sync_api import Browser, Locator, Page

DESK, PHONE = 1280, 390
# Of these each has parts that no other has; the rest are made of the same parts and colours.
SAMPLES = [
    *("index", "chapters/answers", "search", "chapters/03-partitions", "chapters/15-planning"),
    *("chapters/scorecard", "chapters/statements", "chapters/whole-transformers", "api/networks"),
]
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
# Printed tables that are wrapped, and messages that are not.
PRINTED_WRONG = """() => [...document.querySelectorAll("div.output.stream pre")]
    .filter((text) => text.closest(".columns")
        ? getComputedStyle(text).whiteSpace !== "pre" : text.scrollWidth > text.clientWidth)
    .map((text) => text.textContent)"""
SWITCH, FOLDED, MARK = "button.show-code", "div.cell > details.hide", "details.hide > summary"
FOCUSED = "document.activeElement"
# Whether what is in focus stands out.
OUTLINED = """() => [document.activeElement, ...document.activeElement.children]
    .map((element) => getComputedStyle(element))
    .some((style) => style.outlineStyle !== "none" || style.boxShadow !== "none")"""
REFERENCE = ".bd-article a.reference[href$='#thm-one-layer']"


def appearance(page: Page, scheme: str) -> dict[str, Any]:
    """What is wrong with how a page looks, empty values being none."""
    return {
        "scheme": page.locator("html").get_attribute("data-theme") != scheme,
        "mathematics": page.evaluate(UNREAD_MATHEMATICS),
        "images": page.evaluate(FAULTY_IMAGES),
        "wider than the screen": page.evaluate(TOO_WIDE),
        "silent boxes": page.evaluate(SILENT_BOXES),
    }


def bars(page: Page, *part: str) -> list[Any]:
    """What bars some readers, by the rules of axe, on the page or in a part of it."""
    options = {"resultTypes": ["violations"], "preload": False}
    found = Axe().run(page, context={"include": [[*part]]} if part else None, options=options)
    assert found.response["passes"]
    return [
        (fault["id"], [node["html"] for node in fault["nodes"]])
        for fault in found.response["violations"]
        if fault["impact"] in ("serious", "critical")
    ]


def opened(page: Page) -> dict[str, Any]:
    """What is wrong with a chapter's folded solutions, which a note lacks, and its code to copy."""
    wrong = False
    for solution in page.locator("div.admonition.dropdown").all()[:1]:
        content = solution.locator("p:not(.admonition-title)").first
        folded = not content.is_visible()
        solution.locator("p.admonition-title").click()
        wrong = not (folded and content.is_visible())
    cells = page.locator("div.cell_input").count()
    return {
        "solutions": wrong,
        "copying": not cells == page.locator("div.cell_input:has(button.copybtn)").count() > 0,
        "copying outputs": page.locator("div.cell_output button.copybtn").count(),
    }


@pytest.fixture(scope="module")
def reader(browser: Browser, book: Path) -> Iterator[Reader]:
    with reading(browser, book) as reader:
        yield reader


def resize(page: Page, width: int, height: int = 844) -> None:
    page.set_viewport_size({"width": width, "height": height})


def expect_no(faults: dict[str, Any], reader: Reader) -> None:
    left = {what: fault for what, fault in faults.items() if fault}
    left |= {"requests and errors": reader.faults.copy()} if reader.faults else {}
    reader.faults.clear()
    assert not left


@pytest.mark.parametrize("docname", [*PAGES, *OTHERS])
def test_page_shows_what_it_has(reader: Reader, docname: str) -> None:
    page = reader.page
    page.emulate_media(color_scheme="light")
    resize(page, DESK)
    reader.open(docname)
    faults = appearance(page, "light")
    resize(page, PHONE)
    faults["wider than a phone"] = page.evaluate(TOO_WIDE)
    expect_no(faults, reader)


@pytest.mark.parametrize("docname", SAMPLES)
def test_page_is_for_everybody(reader: Reader, docname: str) -> None:
    page = reader.page
    page.emulate_media(color_scheme="light")
    resize(page, DESK)
    reader.open(docname)
    faults: dict[str, Any] = {"bars": bars(page)}
    faults["switch"] = page.locator(SWITCH).count() != min(page.locator(FOLDED).count(), 1)
    if docname in ("chapters/03-partitions", "chapters/15-planning"):
        faults |= opened(page)
    reader.darken()
    resize(page, PHONE)
    page.wait_for_function(STANDS_STILL)  # the contents have gone
    faults["bars on a phone in the dark"] = bars(page)
    faults["printed"] = page.evaluate(PRINTED_WRONG)
    page.evaluate(OPEN_FOLDS)
    faults["silent boxes in folds"] = page.evaluate(SILENT_BOXES)
    faults["opened code is wider than a phone"] = page.evaluate(TOO_WIDE)
    expect_no(faults, reader)


def test_the_executed_notebook_is_saved(reader: Reader, tmp_path: Path) -> None:
    page, name = reader.page, f"{CHAPTERS[0].stem}.ipynb"
    resize(page, DESK)
    reader.open(f"chapters/{CHAPTERS[0].stem}")
    page.locator(".dropdown-download-buttons > button").click()
    with page.expect_download() as download:
        page.locator("a.btn-download-source-button").first.click()
    download.value.save_as(tmp_path / name)
    assert download.value.suggested_filename == name
    source = reader.book / "_sources" / "chapters" / name
    assert (tmp_path / name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("width", "word", "place"), [(DESK, "rank", ""), (PHONE, "fnn_threshold", "api/bounds.html")]
)
def test_search_finds_a_word(
    browser: Browser, book: Path, width: int, word: str, place: str
) -> None:
    with reading(browser, book, width) as reader:
        reader.open("search", f"?q={word}")
        results = reader.page.locator("#search-results ul.search li a")
        results.first.wait_for()
        assert any(results.all_inner_texts())
        results.first.click()
        assert reader.page.url.split("?")[0] != (book / "search.html").as_uri()
        assert place in reader.page.url


@pytest.fixture
def keyboard(browser: Browser, book: Path) -> Iterator[Page]:
    with reading(browser, book) as reader:
        reader.open(f"chapters/{CHAPTERS[0].stem}")
        yield reader.page


def reach(page: Page, control: Locator) -> None:
    """Come to a control by the Tab key, and see that it is in focus."""
    control.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert control.evaluate(f"control => control === {FOCUSED}")
    assert page.evaluate(OUTLINED)


def test_keyboard_opens_folds_and_passes_from_link_to_link(keyboard: Page) -> None:
    """Equations are no stops on its way, and what is in focus is seen."""
    fold = keyboard.locator("div.admonition.dropdown").first
    content = fold.locator("p:not(.admonition-title)").first
    assert not content.is_visible()
    reach(keyboard, fold.locator("button").first)
    keyboard.keyboard.press("Enter")
    assert content.is_visible()
    keyboard.keyboard.press("Enter")
    assert not content.is_visible()
    assert keyboard.locator("mjx-container").count()
    assert keyboard.locator("mjx-container[tabindex]:not(.scrolls)").count() == 0
    keyboard.locator(".bd-article a.reference").first.focus()
    for _ in range(10):
        keyboard.keyboard.press("Tab")
        assert keyboard.evaluate(OUTLINED), keyboard.evaluate(f"{FOCUSED}.outerHTML")


def shown(page: Page, selector: str) -> set[bool]:
    """Whether elements are seen: all, none or some."""
    return {element.is_visible() for element in page.locator(selector).all()}


def test_one_switch_shows_the_code_of_all_pages(browser: Browser, book: Path) -> None:
    """To a keyboard too, and until it is pressed again; cells have no marks."""
    code = f"{FOLDED}:not(.dropdown *, .sd-dropdown *) div.cell_input"
    first, second = (chapter.stem for chapter in CHAPTERS[:2])
    with reading(browser, book) as reader:
        page = reader.page
        off, on = (page.get_by_role("button", name="Show code", pressed=p) for p in (False, True))
        reader.open(f"chapters/{first}")
        assert shown(page, code) == {False}
        reach(page, off)
        page.keyboard.press("Enter")
        assert shown(page, code) == {True}
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")
            page.wait_for_function(STANDS_STILL)
            assert bars(page, SWITCH) == []
        reader.open(f"chapters/{second}")
        assert shown(page, code) == {True}
        assert shown(page, MARK) == {False}
        reach(page, on)
        page.keyboard.press("Space")
        assert shown(page, code) == shown(page, MARK) == {False}
        reader.open(f"chapters/{first}")
        assert shown(page, code) == {False}
        assert off.count() == 1


def test_showing_code_leaves_what_is_read_in_its_place(browser: Browser, book: Path) -> None:
    with reading(browser, book) as reader:
        page = reader.page
        reader.open("chapters/03-partitions")
        read, place = page.locator("article h2").nth(3), "part => part.getBoundingClientRect().top"
        # The first that is seen, below the header.
        top = read.evaluate(place) - 80
        page.evaluate("top => scrollTo({ top, behavior: 'instant' })", top)
        before = read.evaluate(place)
        for _ in range(2):
            page.locator(SWITCH).evaluate("button => button.click()")
            page.wait_for_function(STANDS_STILL)
            assert abs(read.evaluate(place) - before) < 2


def test_a_link_opens_the_code_that_it_leads_to(browser: Browser, book: Path) -> None:
    with reading(browser, book) as reader:
        page, docname = reader.page, "chapters/04-transformers"
        reader.open(docname)
        cell = page.locator(f"{FOLDED} pre[id]").last.get_attribute("id")
        reader.open("index")  # of what was opened nothing stays
        reader.open(docname, f"#{cell}")
        page.locator(f"#{cell}").wait_for()
        assert page.locator(f"{FOLDED}[open]").count() == 1


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "touch"])
def test_reference_shows_its_statement(browser: Browser, book: Path, touch: bool) -> None:
    with reading(browser, book, PHONE if touch else DESK, has_touch=touch) as reader:
        reader.open("chapters/03-partitions")
        page = reader.page
        page.wait_for_function("window.previews")
        link, box = page.locator(REFERENCE).first, page.locator("div.preview")
        here = page.url
        link.scroll_into_view_if_needed()
        assert not box.is_visible()
        if touch:
            link.tap()
        else:
            link.hover()
        box.locator("mjx-container").first.wait_for()
        assert page.url == here
        assert "One ReLU layer from many" in box.inner_text()
        left, right, room = box.evaluate(
            "box => [box.getBoundingClientRect().left, box.getBoundingClientRect().right,"
            " innerWidth]"
        )
        assert 0 <= left < right <= room
        assert box.evaluate("box => !box.querySelector('mjx-merror')")
        page.keyboard.press("Escape")
        assert not box.is_visible()
        if touch:
            link.tap()
            assert page.url == here
            link.tap()
        else:
            link.click()
        page.wait_for_url("**/02-linearization.html#thm-one-layer")


def test_badge_shows_its_sentences_and_leads_to_them_and_back(browser: Browser, book: Path) -> None:
    with reading(browser, book) as reader:
        reader.open(f"chapters/{CHAPTERS[0].stem}")
        page = reader.page
        page.wait_for_function("window.previews")
        badge, box = page.locator("a.verdict").first, page.locator("div.preview")
        name = badge.get_attribute("id")
        badge.hover()
        assert box.locator("li").first.inner_text().startswith("✓ Holds: ")
        badge.click()
        page.wait_for_url("**/scorecard.html#*")
        entry = page.locator("div.claims:target")
        entry.locator("li").first.wait_for()
        entry.locator("a.verdict").click()
        page.wait_for_url(f"**#{name}")
        assert page.locator("a.verdict:target").is_visible()


def test_without_scripts_references_are_links_and_code_opens(browser: Browser, book: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((book / "chapters" / "03-partitions.html").as_uri())
    assert page.locator(SWITCH).count() == 0
    code = page.locator(f"{FOLDED} div.cell_input").first
    assert not code.is_visible()
    page.locator(MARK).first.click()
    assert code.is_visible()
    page.locator(REFERENCE).first.click()
    assert page.url.endswith("02-linearization.html#thm-one-layer")
    assert page.locator("div.preview").count() == 0
    context.close()
