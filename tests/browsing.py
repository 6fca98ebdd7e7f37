"""The built book in headless Chromium, opened from disk with the network blocked."""

from __future__ import annotations

import os
from pathlib import Path

import print_pdf
import pytest
from playwright.sync_api import ConsoleMessage, Page, Request, Route
from print_pdf import MATHJAX_IS_DONE, NO_CHROMIUM, OPTIONS

__all__ = ["MATHJAX_IS_DONE", "OPTIONS", "SCHEMES", "WIDTHS", "Reader", "chromium"]

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")
# Colours of buttons go over into those of the dark when a page's script has found that it is dark.
_STANDS_STILL = """() => Promise.allSettled(
    document.getAnimations().map((animation) => animation.finished)).then(() => null)"""


def chromium() -> str:
    """The browser; where there is none, the test is skipped, or fails if ``CI`` is set."""
    if program := print_pdf.chromium():
        return program
    if os.environ.get("CI"):
        pytest.fail(NO_CHROMIUM)
    pytest.skip(NO_CHROMIUM)


class Reader:
    """One browser page; `requests` are those to the network, `complaints` the console's errors."""

    def __init__(self, page: Page, book: Path) -> None:
        self.page = page
        self.book = book
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.route(lambda url: not url.startswith(("file:", "data:")), self._block)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def _block(self, route: Route, request: Request) -> None:
        self.requests.append(request.url)
        route.abort()

    def open(self, docname: str, query: str = "") -> None:
        self.page.goto((self.book / f"{docname}.html").as_uri() + query)
        self.page.evaluate(MATHJAX_IS_DONE)
        self.page.evaluate(_STANDS_STILL)
