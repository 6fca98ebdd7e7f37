"""What tests share; those of the built book and of its pages import a browser when they need it."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*-*.ipynb"))
Make = Callable[..., "subprocess.Popen[str]"]

# No limit on the time of one example: the machine may be busy. Where runs draw the same examples,
# as under CI, one must find what others find in several. `--hypothesis-profile=many` for a long
# search.
FEW = 25 if settings().derandomize else 8
settings.register_profile("few", deadline=None, max_examples=FEW, print_blob=True)
settings.register_profile("many", settings.get_profile("few"), max_examples=300)
settings.load_profile("few")

# What runs in the background ignores interrupts, and so would all that the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Draw other examples in every run, all of which one number brings back."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = secrets.randbelow(2**32)


def pytest_report_header(config: pytest.Config) -> str:
    return f"these examples again: --hypothesis-seed={config.option.hypothesis_seed}"


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
    """Return the environment without what the make that runs these tests would hand down."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    taken = {*re.findall(r"^(?:export )?(\w+) *\?=", makefile, re.MULTILINE)}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in taken and not name.startswith(("MAKE", "MFLAGS", "GNUMAKEFLAGS"))
    }


@pytest.fixture
def run_make(tmp_path: Path) -> Iterator[Make]:
    """Start ``make`` with the environment that runs the tests, which counts as installed.

    Returns the process, whose two output streams are one pipe. It leads a group of its own, which
    is gone when the test ends.
    """
    started: list[subprocess.Popen[str]] = []
    ready = tmp_path / "ready"

    def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        if not ready.exists():  # newer than what the test has written
            ready.touch()
        # No test may empty the environment that runs it.
        own = [f"VENV={sys.prefix}", f"ready={ready}", "empty_venv=false"]
        process = subprocess.Popen(
            ["make", *own, *arguments],
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
    """Find the folder of the built book."""
    html = ROOT / "_build" / "html"
    if not (html / "index.html").is_file():
        pytest.fail("the book is not built: run `make book` (`make test` does)")
    return html.resolve()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from browsing import chromium
    from playwright.sync_api import sync_playwright

    executable = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()
