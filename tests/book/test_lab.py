"""JupyterLab, as `make lab` starts it, on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from conftest import CHAPTERS, ROOT, Make

pytestmark = pytest.mark.sources("Makefile", "pyproject.toml")

TOKEN = "a-token-for-this-test"


def running_server(lab: subprocess.Popen[str], runtime: Path, seconds: float = 60) -> str:
    """The address of the server once it listens; before, it describes itself in `runtime`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and lab.poll() is None:
        for description in runtime.glob("jpserver-*.json"):
            with suppress(ValueError, ConnectionRefusedError):  # half written, not yet listening
                address = str(json.loads(description.read_text())["url"])
                connect(address)
                return address
        time.sleep(0.1)
    lab.kill()
    pytest.fail(f"JupyterLab did not start:\n{lab.communicate()[0]}")


def connect(address: str) -> None:
    parts = urlsplit(address)
    socket.create_connection((parts.hostname, parts.port)).close()


def test_lab_serves_the_chapters(run_make: Make, tmp_path: Path) -> None:
    options = f"--no-browser --allow-root --ip=127.0.0.1 --IdentityProvider.token={TOKEN}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lab = run_make(
        ROOT, "lab", f"LAB_ARGS={options} --port={port}", JUPYTER_RUNTIME_DIR=str(tmp_path)
    )
    address = running_server(lab, tmp_path)
    for chapter in CHAPTERS:
        with urlopen(f"{address}api/contents/{chapter.name}?token={TOKEN}") as response:
            assert json.load(response)["content"]["cells"]
    with urlopen(f"{address}lab?token={TOKEN}") as response:
        assert "JupyterLab" in response.read().decode()
    with pytest.raises(HTTPError, match="403") as refused:
        urlopen(f"{address}api/contents")
    refused.value.close()

    os.killpg(lab.pid, signal.SIGTERM)
    lab.communicate(timeout=30)
    with pytest.raises(ConnectionRefusedError):
        connect(address)
