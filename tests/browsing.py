"""The built book in headless Chromium, opened from disk with the network blocked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import print_pdf
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route
from print_pdf import MATHJAX_IS_DONE, NO_CHROMIUM
from sphinx_external_toc.parsing import parse_toc_yaml

# Pages of the book, but for that of the search, which Sphinx adds.
PAGES = list(parse_toc_yaml(ROOT / "_toc.yml"))

# Colours of buttons go over into those of the dark when a page's script has found that it is dark.
STANDS_STILL = "document.getAnimations().every(({playState}) => playState !== 'running')"


def chromium() -> str:
    """The browser; where there is none, the test is skipped, or fails if ``CI`` is set."""
    if program := print_pdf.chromium():
        return program
    if os.environ.get("CI"):
        pytest.fail(NO_CHROMIUM)
    pytest.skip(NO_CHROMIUM)


class Reader:
    """One browser page; `faults` are requests to the network and errors of the console."""

    def __init__(self, page: Page, book: Path) -> None:
        self.page = page
        self.book = book
        self.faults: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.route(lambda url: not url.startswith(("file:", "data:", "blob:")), self._block)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.faults.append(message.text)

    def _block(self, route: Route, request: Request) -> None:
        self.faults.append(request.url)
        route.abort()

    def open(self, docname: str, query: str = "") -> None:
        self.page.goto((self.book / f"{docname}.html").as_uri() + query)
        self.page.evaluate(MATHJAX_IS_DONE)
        self.page.wait_for_function(STANDS_STILL)


@cache
def soup(book: Path, docname: str) -> BeautifulSoup:
    """Parse a page of the built book."""
    return BeautifulSoup((book / f"{docname}.html").read_text(encoding="utf-8"), "html.parser")


@contextmanager
def reading(browser: Browser, book: Path, width: int = 1280, **options: Any) -> Iterator[Reader]:
    """Somebody with a screen of this width, who meets no fault."""
    context = browser.new_context(viewport={"width": width, "height": 844}, **options)
    reader = Reader(context.new_page(), book)
    yield reader
    context.close()
    assert reader.faults == []
