"""Print the built book as one PDF, and each note as another, with headless Chromium.

usage: python tools/print_pdf.py _build/quick/html _build/quick/lorapower.pdf

All pages of the table of contents but those on the package become one document, so that
references, page numbers and bookmarks go through all of it. How they look is in
``_static/print.css`` and ``_static/note.css``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urldefrag, urljoin

from bs4 import BeautifulSoup
from playwright.sync_api import Browser, sync_playwright
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parent.parent
NO_CHROMIUM = "no Chromium: install it (on Debian: apt-get install chromium) or name it in CHROMIUM"
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MATHJAX_IS_DONE = "() => window.MathJax?.startup?.promise.then(() => null)"
_NUMBER = '<p style="font: 8pt sans-serif; margin: auto"><span class="pageNumber"></span></p>'
_PATIENCE = 300_000  # milliseconds: all of a book's mathematics is typeset at once


def chromium() -> str | None:
    """The browser's program, as ``CHROMIUM`` names it or as it is found."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def document(pages: Sequence[Path]) -> tuple[Path, str]:
    """The articles of all `pages` in one page, and the page at whose address it is to be read.

    Anchors get the number of their page, and links lead to them; what leads to other files of the
    book is no link any more.
    """
    numbers = {page.as_uri(): f"page-{number}" for number, page in enumerate(pages)}
    soups = [BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in pages]
    # Sphinx gives MathJax to pages with mathematics alone.
    found = (number for number, soup in enumerate(soups) if "mathjax" in str(soup.head))
    base = next(found, 0)
    whole = soups[base]
    content = whole.new_tag("main", attrs={"class": "bd-content"})
    for (address, number), soup in zip(numbers.items(), soups, strict=True):
        article = soup.select_one("article.bd-article")
        assert article is not None, address
        for part in article.select("[id]"):
            part["id"] = f"{number}-{part['id']}"
        for picture in article.select("img[src]"):
            picture["src"] = urljoin(address, str(picture["src"]))
        for link in article.select("a[href]"):
            page, anchor = urldefrag(urljoin(address, str(link["href"])))
            if page in numbers:
                link["href"] = f"#{numbers[page]}" + (f"-{anchor}" if anchor else "")
            elif page.startswith("file:"):
                del link["href"]
        article["id"] = number
        content.append(article)
    assert whole.body is not None
    whole.body.clear()
    whole.body.append(content)
    return pages[base], str(whole)


def print_pages(browser: Browser, pages: Sequence[Path], target: Path) -> None:
    """Write `pages` of the built book to the file `target`."""
    page = browser.new_page(color_scheme="light")
    page.set_default_timeout(_PATIENCE)
    page.emulate_media(media="print", color_scheme="light")
    base, text = document(pages)
    page.goto(base.as_uri())
    page.set_content(text, wait_until="load")
    page.evaluate(MATHJAX_IS_DONE)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("html", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    html, target = arguments.html.resolve(), arguments.target.resolve()
    if (program := chromium()) is None:
        print(NO_CHROMIUM, file=sys.stderr)
        return 1
    site = parse_toc_yaml(ROOT / "_toc.yml")
    trees = [part for part in site.root.subtrees if part.caption == "Notes"]
    notes = [html / f"{name}.html" for part in trees for name in part.files()]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        pages = [html / f"{name}.html" for name in site if not name.startswith("api/")]
        print_pages(browser, pages, target)
        for note in notes:
            print_pages(browser, [note], target.with_name(f"{note.stem}.pdf"))
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
