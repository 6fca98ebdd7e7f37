"""What the tests of the book share."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from browsing import OPTIONS, SCHEMES, WIDTHS, Reader, chromium
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
# Pages of the book: those of the table of contents, and those that Sphinx adds.
PAGES = list(parse_toc_yaml(ROOT / "_toc.yml"))
OTHERS = ["genindex", "py-modindex", "search"]

# No limit on the time of one example: the machine may be busy. The same examples in every run; to
# look for new ones, `--hypothesis-profile=explore`, which says how to see a failing one again.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("reproducible")

# Chapters that the tests run keep nothing among the results of the book.
os.environ.pop("LORAPOWER_RESULTS", None)

# What runs in the background ignores interrupts, and so would all that the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the book or starts make, and begin with tests that start programs."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "book" in fixtures:
            item.add_marker("book")
        if "run_make" in fixtures:
            item.add_marker("programs")
    items.sort(key=lambda item: item.get_closest_marker("programs") is None)


def own_environment() -> dict[str, str]:
    """The environment without what the make that runs these tests would hand down."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    taken = {
        *re.findall(r"^(\w+) *\?=", makefile, re.MULTILINE),
        *re.findall(r"(\w+)=", os.environ.get("MAKEFLAGS", "")),
    }
    return {
        name: value
        for name, value in os.environ.items()
        if name not in taken and not name.startswith(("MAKE", "MFLAGS", "GNUMAKEFLAGS"))
    }


class Make(Protocol):
    def __call__(
        self, folder: Path, /, *arguments: str, **environment: str
    ) -> subprocess.Popen[str]: ...


@pytest.fixture
def run_make(tmp_path: Path) -> Iterator[Make]:
    """Start `make` with the environment that runs the tests, which counts as installed.

    Returns the process, whose two output streams are one pipe. It leads a group of its own, which
    is gone when the test ends.
    """
    started: list[subprocess.Popen[str]] = []
    ready = tmp_path / "ready"

    def start(folder: Path, /, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        if not ready.exists():
            ready.touch()
        given = dict(word.split("=", 1) for word in arguments if "=" in word)
        # No test may empty the environment that runs it.
        own = {"VENV": sys.prefix, "ready": str(ready), "empty_venv": "false"}
        variables = given if "VENV" in given else own | given
        targets = [word for word in arguments if "=" not in word]
        process = subprocess.Popen(
            ["make", *(f"{name}={value}" for name, value in variables.items()), *targets],
            cwd=folder,
            env=own_environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def book() -> Path:
    """The folder of the built book."""
    html = ROOT / "_build" / "html"
    if not (html / "index.html").is_file():
        pytest.fail("the book is not built: run `make book` (`make test` does)")
    return html.resolve()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=WIDTHS)
def reader(
    browser: Browser, book: Path, scheme: str, request: pytest.FixtureRequest
) -> Iterator[Reader]:
    context = browser.new_context(
        viewport={"width": WIDTHS[request.param], "height": 844},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    yield Reader(context.new_page(), book)
    context.close()
