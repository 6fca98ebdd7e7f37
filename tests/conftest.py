"""What the tests of the book share."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pytest
from browsing import OPTIONS, chromium
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright
from sphinx_external_toc.parsing import parse_toc_yaml

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
# Pages of the book: those of the table of contents, and those that Sphinx adds.
PAGES = list(parse_toc_yaml(ROOT / "_toc.yml"))
PASSED = ROOT / "_build" / "passed.json"
OTHERS = ["genindex", "py-modindex", "search"]

# No limit on the time of one example: the machine may be busy. `--hypothesis-profile=many` for a
# long search.
settings.register_profile("few", deadline=None, max_examples=25, print_blob=True)
settings.register_profile("many", settings.get_profile("few"), max_examples=300)
settings.load_profile("few")

# Chapters that the tests run keep nothing among the results of the book.
os.environ.pop("LORAPOWER_RESULTS", None)

# What runs in the background ignores interrupts, and so would all that the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Other examples in every run, all of which one number brings back."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = secrets.randbelow(2**32)


def pytest_report_header(config: pytest.Config) -> str:
    return f"these examples again: --hypothesis-seed={config.option.hypothesis_seed}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the book or starts make, and begin with tests that start programs.

    Tests that are marked ``sources("Makefile", …)`` and passed with the same files are skipped, but
    never where ``CI`` is set.
    """
    passed = {} if os.environ.get("CI") else _passed()
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "book" in fixtures:
            item.add_marker("book")
        if "run_make" in fixtures:
            item.add_marker("programs")
        if sources := item.get_closest_marker("sources"):
            digest = _digest(item.path, *sources.args)
            item.user_properties.append(("sources", digest))
            if passed.get(item.nodeid) == digest:
                item.add_marker(pytest.mark.skip("passed with the same sources"))
    items.sort(key=lambda item: item.get_closest_marker("programs") is None)


def _passed() -> dict[str, str]:
    """By test, the digest of the sources with which it passed last."""
    with suppress(FileNotFoundError):
        return dict(json.loads(PASSED.read_text(encoding="utf-8")))
    return {}


@functools.cache
def _digest(test: Path, *patterns: str) -> str:
    digest = hashlib.blake2b(sys.version.encode(), digest_size=8)
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    for path in [test, Path(__file__), ROOT / "constraints.txt", *sorted(found)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


_now_passed: dict[str, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _now_passed[report.nodeid] = str(dict(report.user_properties).get("sources", ""))


def pytest_sessionfinish(session: pytest.Session) -> None:
    kept = {name: digest for name, digest in _now_passed.items() if digest}
    if kept and not hasattr(session.config, "workerinput"):  # where there are workers, not in them
        PASSED.parent.mkdir(exist_ok=True)
        PASSED.write_text(json.dumps(_passed() | kept), encoding="utf-8")


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


@pytest.fixture(scope="session")
def small_runs(book: Path) -> Path:
    """The folder of the chapters as they were executed at a small size."""
    folder = ROOT / "_build" / "small"
    if not (folder / "done").is_file():
        pytest.fail("no chapter is executed at a small size: run `make test`")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        yield browser
        browser.close()
