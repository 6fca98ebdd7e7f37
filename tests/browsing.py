"""The built book in headless Chromium, opened from disk with the network blocked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import ConsoleMessage, Page, Request, Route

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")
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


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    for path in (os.environ.get("CHROMIUM"), *map(shutil.which, names)):
        if path:
            return path
    lack = "no Chromium: install it (on Debian: apt-get install chromium) or name it in CHROMIUM"
    if os.environ.get("CI"):
        pytest.fail(lack)
    pytest.skip(lack)


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
