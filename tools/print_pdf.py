"""Print pages of the built book, each as a PDF of its own, with headless Chromium.

usage: python tools/print_pdf.py FOLDER _build/quick/html/chapters/whole-transformers.html ...

How they look is in ``_static/print.css`` and ``_static/note.css``.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

NO_CHROMIUM = "no Chromium: install it (on Debian: apt-get install chromium) or name it in CHROMIUM"
MATHJAX_IS_DONE = "() => window.MathJax?.startup?.promise.then(() => null)"
# On paper the other pages of the book are nowhere.
_LEAVE_BOOK = """() => document.querySelectorAll("a[href]").forEach((link) => {
    if (link.protocol === "file:" && link.pathname !== location.pathname)
        link.removeAttribute("href");
})"""
_NUMBER = '<p style="font: 8pt sans-serif; margin: auto"><span class="pageNumber"></span></p>'


def chromium() -> str | None:
    """The browser's program, as ``CHROMIUM`` names it or as it is found."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def print_page(browser: Browser, source: Path, target: Path) -> None:
    """Write the page of a book to the file `target`."""
    page = browser.new_page(color_scheme="light")
    page.goto(source.resolve().as_uri())
    page.evaluate(MATHJAX_IS_DONE)
    page.evaluate(_LEAVE_BOOK)
    page.pdf(
        path=target,
        format="A4",
        margin={"top": "20mm", "bottom": "20mm", "left": "18mm", "right": "18mm"},
        display_header_footer=True,
        header_template="<span></span>",
        footer_template=_NUMBER,
        print_background=True,
        outline=True,
        tagged=True,
    )
    page.close()
    print(f"Printed: {target}")


def main(folder: Path, *pages: Path) -> None:
    if (program := chromium()) is None:
        sys.exit(NO_CHROMIUM)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        for page in pages:
            print_page(browser, page, folder / f"{page.stem}.pdf")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
