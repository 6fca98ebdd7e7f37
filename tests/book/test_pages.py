"""The pages of the book in a browser: for who sees, hears or types them, on a desk or a phone.

Each page is opened once, for all that is asked of it on both screens, in the light and the dark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browsing import STANDS_STILL, Reader, reading
from conftest import CHAPTERS, OTHERS, PAGES
from playwright.sync_api import Browser, Page

from lorapower.book.claims import Claim, read

DESK, PHONE = 1280, 390
# Pages are at most so many screens of 1440 × 900 long: those that are read; those on the package,
# which are looked up in, and begin with tables of their names. Indices are as long as they are.
SCREENS, LOOKED_UP = 18.5, 25
# Each of these is two chapters in one.
LONG = {"07-training": 21.5, "09-optimization": 23.5}
# Of these each has parts that no other has; the rest are made of the same parts and colours, and a
# phone has the same besides on every page. Signatures have colours too.
SAMPLES = [
    *("index", "chapters/answers", "search", "chapters/03-partitions", "chapters/14-planning"),
    *("chapters/scorecard", "chapters/statements", "api/networks"),
]
SIGNATURES = {"exclude": [["dt.sig"]]}
# MathJax shows what it cannot read in red: text for an unknown macro, a box for an error.
UNREAD_MATHEMATICS = """() => [...document.querySelectorAll("span.math, div.math")]
    .filter((element) => !element.querySelector("mjx-container")
        || element.querySelector("mjx-merror, [data-mjx-error], [style*='color: red']"))
    .map((element) => element.textContent)"""
FAULTY_IMAGES = """() => [...document.images]
    .filter((image) => !image.complete || image.naturalWidth === 0 || !image.alt)
    .map((image) => image.outerHTML)"""
TOO_WIDE = "document.documentElement.scrollWidth > innerWidth"
HEIGHT = "document.documentElement.scrollHeight"
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
# What each badge shows to a keyboard that reaches it, without mathematics.
REACHED = """() => [...document.querySelectorAll("a.verdict")].map((badge) => {
    badge.closest("details:not([open])")?.setAttribute("open", "");
    badge.focus({focusVisible: true});
    const box = document.getElementById(badge.getAttribute("aria-describedby"));
    if (!badge.matches("[href]:not([tabindex])") || !box?.matches("[role='tooltip']")) return "";
    const copy = box.checkVisibility() ? box.cloneNode(true) : document.createElement("div");
    copy.querySelectorAll(".math").forEach((math) => math.replaceWith(" "));
    return copy.textContent;
})"""
# What is over badges and lines of folded code that are seen; and badges that stand out of their
# line's box, or are too small for a finger.
COVERED = """() => [...document.querySelectorAll("a.verdict, div.cell > details.hide > summary")]
    .filter((mark) => mark.checkVisibility())
    .flatMap((mark) => {
        mark.scrollIntoView({block: "center", behavior: "instant"});
        const {left, right, top, bottom, height} = mark.getBoundingClientRect();
        const box = mark.parentElement.getBoundingClientRect();
        const over = [0.1, 0.5, 0.9].map((part) => left + part * (right - left))
            .map((place) => document.elementFromPoint(place, top + height / 2))
            .filter((found) => !mark.contains(found));
        const inside = left >= box.left && right <= box.right
            && top >= box.top && bottom <= box.bottom && height >= 24;
        return inside || mark.matches("summary") ? over : [...over, mark];
    })
    .map((found) => found?.outerHTML.slice(0, 200))"""
FAIL = """() => [...document.querySelectorAll("a.verdict")].slice(0, 1).forEach((badge) => {
    badge.className = "verdict fails";
})"""
BADGES = {"include": [["a.verdict"]]}
CONTRAST = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}
REFERENCE = ".bd-article a.reference[href$='#thm-one-layer']"


def appearance(page: Page, scheme: str) -> dict[str, Any]:
    """What is wrong with how a page looks, empty values being none."""
    return {
        "scheme": page.locator("html").get_attribute("data-theme") != scheme,
        "mathematics": page.evaluate(UNREAD_MATHEMATICS),
        "images": page.evaluate(FAULTY_IMAGES),
        "wider than the screen": page.evaluate(TOO_WIDE),
    }


def bars(page: Page, context: dict[str, Any] | None = None, **rules: Any) -> list[Any]:
    """What bars some readers, by the rules of axe, in the parts that `context` names."""
    options = {"resultTypes": ["violations"], "preload": False, **rules}
    found = Axe().run(page, context=context, options=options).response
    assert found["passes"]
    return [
        (fault["id"], [part["html"] for part in fault["nodes"]])
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]


def opened(page: Page) -> dict[str, Any]:
    """What is wrong with a chapter's folded solutions and its code to copy."""
    solutions = page.locator("div.admonition.dropdown")
    content = solutions.first.locator("p:not(.admonition-title)").first
    folded = not content.is_visible()
    solutions.first.locator("p.admonition-title").click()
    cells = page.locator("div.cell_input").count()
    return {
        "solutions": not (folded and content.is_visible()),
        "copying": not cells == page.locator("div.cell_input:has(button.copybtn)").count() > 0,
        "copying outputs": page.locator("div.cell_output button.copybtn").count(),
    }


def saved(page: Page, name: str, folder: Path, sources: Path) -> list[str]:
    """Downloads that are not the executed notebook as it is, or its text as the book has it."""
    wrong = []
    for file in (f"{name}.ipynb", f"{name}.md"):
        page.locator(".dropdown-download-buttons > button").click()
        with page.expect_download() as download:
            page.locator("a.btn-download-source-button", has_text=Path(file).suffix).click()
        download.value.save_as(folder / file)
        same = (folder / file).read_bytes() == (sources / file).read_bytes()
        if download.value.suggested_filename != file or not same:
            wrong.append(file)
    return wrong


def words(text: str) -> str:
    """What Markdown says, or what it became, without its mathematics."""
    return " ".join(re.findall(r"\w+", re.sub(r"\$[^$]*\$", " ", text)))


def unreached(page: Page, claims: list[Claim]) -> list[str]:
    """The claims that a keyboard does not find behind one badge, or behind another too."""
    page.keyboard.press("Shift")  # not the mouse, from now on
    shown = [words(text) for text in page.evaluate(REACHED)]
    page.keyboard.press("Escape")
    lines = [words(claim.line) for claim in claims]
    return [line for line in lines if sum(line in text for text in shown) != lines.count(line)]


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
def test_page(reader: Reader, docname: str, tmp_path: Path) -> None:
    page, (folder, _, name) = reader.page, docname.rpartition("/")
    sampled = docname in SAMPLES
    page.emulate_media(color_scheme="light")
    resize(page, DESK)
    reader.open(docname)
    faults = appearance(page, "light")
    faults["bars"] = bars(page, None if sampled else SIGNATURES)
    resize(page, 1440, 900)
    screens = page.evaluate(HEIGHT) / 900
    limit = LOOKED_UP if folder == "api" else LONG.get(name, SCREENS)
    faults["screens"] = docname in PAGES and screens > limit
    resize(page, DESK)
    is_chapter = name in [chapter.stem for chapter in CHAPTERS]
    if is_chapter:
        faults |= opened(page)
        faults["downloads"] = saved(page, name, tmp_path, reader.book / "_sources" / folder)
        faults["badges"] = unreached(page, read(reader.book / "_sources" / f"{docname}.ipynb"))
        faults["covered marks"] = page.evaluate(COVERED)
    reader.darken()
    resize(page, PHONE)
    faults["wider than a phone"] = page.evaluate(TOO_WIDE)
    if is_chapter:
        page.wait_for_function(STANDS_STILL)  # the contents have gone
        faults["covered marks on a phone"] = page.evaluate(COVERED)
        faults["badges in the dark"] = bars(page, BADGES, **CONTRAST)
    if sampled:
        faults["bars on a phone in the dark"] = bars(page)
    faults["silent boxes"] = page.evaluate(SILENT_BOXES)
    faults["opened code is wider than a phone"] = page.evaluate(TOO_WIDE)
    expect_no(faults, reader)


@pytest.mark.parametrize("docname", ["index", "chapters/03-partitions"])
def test_page_begins_in_the_dark_on_a_phone(browser: Browser, book: Path, docname: str) -> None:
    with reading(browser, book, PHONE, color_scheme="dark") as reader:
        reader.open(docname)
        expect_no(appearance(reader.page, "dark") | {"bars": bars(reader.page, **CONTRAST)}, reader)


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


def test_fading_edges_follow_what_is_scrolled(reader: Reader) -> None:
    page = reader.page
    resize(page, PHONE)
    reader.open("index")
    code = page.locator("pre.scrolls").first
    assert not code.evaluate("box => box.matches('.more-left')")
    code.focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('pre.scrolls').matches('.more-left')")
    code.evaluate("box => box.scrollTo(box.scrollWidth, 0)")
    page.wait_for_function("!document.querySelector('pre.scrolls').matches('.more-right')")


@pytest.fixture
def keyboard(browser: Browser, book: Path) -> Iterator[Page]:
    with reading(browser, book) as reader:
        reader.open(f"chapters/{CHAPTERS[0].stem}")
        yield reader.page


def test_contents_can_be_skipped(keyboard: Page) -> None:
    keyboard.keyboard.press("Tab")
    assert "Skip" in keyboard.evaluate(f"{FOCUSED}.textContent")
    assert keyboard.locator("#pst-skip-link").is_visible()
    keyboard.keyboard.press("Enter")
    keyboard.keyboard.press("Tab")
    assert keyboard.evaluate(f"!!{FOCUSED}.closest('main')")


def test_keyboard_opens_folds_and_passes_from_link_to_link(keyboard: Page) -> None:
    """Equations are no stops on its way, and what is in focus is seen."""
    for fold, content in {
        "div.cell details.hide": "div.cell_input",
        "div.admonition.dropdown": "p:not(.admonition-title)",
    }.items():
        first = keyboard.locator(fold).first
        assert not first.locator(content).first.is_visible()
        first.locator("summary, button").first.focus()
        keyboard.keyboard.press("Shift+Tab")
        keyboard.keyboard.press("Tab")
        assert keyboard.evaluate(f"{FOCUSED}.matches('summary, button')")
        assert keyboard.evaluate(OUTLINED)
        keyboard.keyboard.press("Enter")
        assert first.locator(content).first.is_visible()
        keyboard.keyboard.press("Enter")
        assert not first.locator(content).first.is_visible()
    assert keyboard.locator("mjx-container").count()
    assert keyboard.locator("mjx-container[tabindex]:not(.scrolls)").count() == 0
    keyboard.locator(".bd-article a.reference").first.focus()
    for _ in range(10):
        keyboard.keyboard.press("Tab")
        assert keyboard.evaluate(OUTLINED), keyboard.evaluate(f"{FOCUSED}.outerHTML")


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


def test_reference_in_focus_shows_its_statement(browser: Browser, book: Path) -> None:
    with reading(browser, book) as reader:
        reader.open("chapters/03-partitions")
        page = reader.page
        page.wait_for_function("window.previews")
        page.locator(".bd-article").click(position={"x": 2, "y": 2})
        box = page.locator("div.preview")
        for _ in range(100):
            page.keyboard.press("Tab")
            if box.is_visible():
                break
        focused = page.evaluate(f"{FOCUSED}.getAttribute('aria-describedby')")
        assert focused == box.get_attribute("id")
        page.keyboard.press("Escape")
        assert not box.is_visible()


def test_reference_shows_a_figure_of_another_page(reader: Reader) -> None:
    page = reader.page
    resize(page, DESK)
    reader.open("chapters/quickstart")
    page.wait_for_function("window.previews")
    page.locator("a.reference[href*='#fig-']").first.hover()
    page.locator("div.preview img").wait_for()
    page.wait_for_function("document.querySelector('div.preview img').naturalWidth > 100")
    assert re.search(r"Fig\. \d+\.\d", page.locator("div.preview").inner_text())


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "touch"])
def test_badge_shows_its_sentences_and_leads_to_them_and_back(
    browser: Browser, book: Path, touch: bool
) -> None:
    with reading(browser, book, PHONE if touch else DESK, has_touch=touch) as reader:
        reader.open(f"chapters/{CHAPTERS[0].stem}")
        page = reader.page
        page.wait_for_function("window.previews")
        badge, box = page.locator("a.verdict").first, page.locator("div.preview")
        name = badge.get_attribute("id")
        if touch:
            badge.tap()
        else:
            badge.hover()
        box.locator("li").first.wait_for()
        sentence = box.locator("li").first.inner_text()
        assert sentence.startswith("✓ Holds: ")
        if touch:
            badge.tap()
        else:
            badge.click()
        page.wait_for_url("**/scorecard.html#*")
        entry = page.locator("div.claims:target")
        entry.locator("li").first.wait_for()
        entry.locator("a.verdict").click()
        page.wait_for_url(f"**#{name}")
        assert page.locator("a.verdict:target").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_badge_that_fails_can_be_read(browser: Browser, book: Path, scheme: Any) -> None:
    with reading(browser, book, color_scheme=scheme) as reader:
        reader.open(f"chapters/{CHAPTERS[0].stem}")
        reader.page.evaluate(FAIL)
        assert bars(reader.page, BADGES, **CONTRAST) == []


def test_without_scripts_a_reference_is_a_link(browser: Browser, book: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((book / "chapters" / "03-partitions.html").as_uri())
    page.locator(REFERENCE).first.click()
    assert page.url.endswith("02-linearization.html#thm-one-layer")
    assert page.locator("div.preview").count() == 0
    context.close()
