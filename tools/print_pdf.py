"""Print the built book as one PDF, and each note as another, with headless Chromium.

usage: python tools/print_pdf.py _build/quick/html _build/quick/lorapower.pdf

All pages of the table of contents but those on the package become one document, so that
references, page numbers and bookmarks go through all of it. A note is a page of the book that is
printed by itself too, as ``whole-transformers.pdf`` beside it. How they look is in
``_static/print.css`` and ``_static/note.css``. A file appears only if it is complete.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urldefrag, urljoin

from bs4 import BeautifulSoup, Tag
from playwright.sync_api import Error, sync_playwright
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
NOTES = "Notes"  # the part of the table of contents whose pages are printed alone too
_FOOTER = """<p style="font: 8pt sans-serif; margin: auto"><span class="pageNumber"></span></p>"""
_PATIENCE = 300_000  # milliseconds: all of a book's mathematics is typeset at once


def chromium() -> str | None:
    """The browser's program, as ``CHROMIUM`` names it or as it is found."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def contents(toc: Path, html: Path) -> tuple[list[Path], list[Path]]:
    """List the built pages to print: those of the book in its order, and the notes among them."""
    site = parse_toc_yaml(toc)
    names = [name for name in site if not name.startswith("api/")]
    parts = [part for part in site.root.subtrees if part.caption == NOTES]
    notes = [name for part in parts for name in part.files()]
    book, alone = ([(html / f"{n}.html").resolve() for n in each] for each in (names, notes))
    return book, alone


def document(pages: Sequence[Path]) -> str:
    """The articles of all `pages` in one page, to be read at the address of `base(pages)`.

    Anchors get the name of their page, and links lead to them; what leads to other files of the
    book is no link any more.
    """
    keys = {page.as_uri(): f"page-{number}" for number, page in enumerate(pages)}
    whole = _soup(base(pages))
    assert whole.body is not None
    whole.body.clear()
    content = whole.new_tag("main", attrs={"class": "bd-content"})
    whole.body.append(content)
    for page in pages:
        article = _soup(page).select_one("article.bd-article")
        assert article is not None, page
        _rename(article, page.as_uri(), keys)
        article["id"] = keys[page.as_uri()]
        content.append(article)
    return str(whole)


def base(pages: Sequence[Path]) -> Path:
    """The first page that loads MathJax, which Sphinx gives to pages with mathematics alone."""
    return next((page for page in pages if "mathjax" in page.read_text(encoding="utf-8")), pages[0])


def _soup(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


def _rename(article: Tag, address: str, keys: dict[str, str]) -> None:
    for part in article.select("[id]"):
        part["id"] = f"{keys[address]}-{part['id']}"
    for picture in article.select("img[src]"):
        picture["src"] = urljoin(address, str(picture["src"]))
    for link in article.select("a[href]"):
        page, anchor = urldefrag(urljoin(address, str(link["href"])))
        if key := keys.get(page):
            link["href"] = f"#{key}-{anchor}" if anchor else f"#{key}"
        elif page.startswith("file:"):
            del link["href"]


def print_pages(pages: Sequence[Path], target: Path, program: str) -> None:
    """Write `pages` of the built book to the file `target`, which is complete or not there."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        page = browser.new_page(color_scheme="light")
        page.set_default_timeout(_PATIENCE)
        page.emulate_media(media="print", color_scheme="light")
        page.goto(base(pages).as_uri())
        page.set_content(document(pages), wait_until="load")
        page.evaluate(MATHJAX_IS_DONE)
        printed = page.pdf(
            format="A4",
            margin={"top": "20mm", "bottom": "20mm", "left": "18mm", "right": "18mm"},
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=_FOOTER,
            print_background=True,
            outline=True,
            tagged=True,
        )
        browser.close()
    partial = target.with_suffix(".partial.pdf")
    partial.write_bytes(printed)
    partial.replace(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("html", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    program = chromium()
    if program is None:
        print(NO_CHROMIUM, file=sys.stderr)
        return 1
    book, notes = contents(ROOT / "_toc.yml", arguments.html)
    files = {arguments.target: book}
    files |= {arguments.target.with_name(f"{note.stem}.pdf"): [note] for note in notes}
    for target, pages in files.items():
        try:
            print_pages(pages, target, program)
        except Error as error:
            print(f"{target.name} is not printed: {str(error).splitlines()[0]}", file=sys.stderr)
            return 1
        print(f"Printed: {target.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
