"""What the tests of the book share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))

# The same examples in every run, and no limit on the time of one: the machine may be busy.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")

# What runs in the background ignores interrupts, and so would all that the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Make(Protocol):
    def __call__(
        self, folder: Path, /, *arguments: str, **environment: str
    ) -> subprocess.Popen[str]: ...


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Start `make` with the environment that runs the tests, which counts as installed.

    Returns the process, whose two output streams are one pipe. It leads a group of its own, which
    is gone when the test ends.
    """
    started: list[subprocess.Popen[str]] = []
    ready = tmp_path / "ready"

    def start(folder: Path, /, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        if not ready.exists():
            ready.touch()
        # The make that runs these tests would otherwise hand its variables and level down.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        process = subprocess.Popen(
            ["make", f"VENV={sys.prefix}", f"ready={ready}", *arguments],
            cwd=folder,
            env=inherited | environment,
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
