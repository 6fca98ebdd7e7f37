"""Pairs of checkpoints and texts that pages make in minutes, and the command, run on them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock

from records import texts as sources

# Where examples are kept, in a folder that `make` removes when what makes them has changed.
_MADE = Path(__file__).resolve().parent.parent / "_build" / "pair"


def texts(kind: str, part: str) -> list[str]:
    """Read the rated sentences of a kind in a part, without ratings, those near neutral too."""
    return [*sources.read(f"{kind}-next", sources.RATED, part).texts]


def example(seed: int = 0) -> Path:
    """Find the folder of `lorapower example`, which all pages share; it is made once for a seed.

    A page that writes beside what is there works in a folder of its own (`linked`).
    """
    folder = _MADE / str(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Another page may be at it; the command leaves nothing that looks finished.
    with filelock.FileLock(folder.with_name(f".{seed}.lock")):
        if not folder.is_dir():
            run_command("example", str(folder), "--seed", str(seed))
    return folder


def linked(folder: Path) -> Path:
    """Make a temporary folder with links to all that is in another."""
    new = Path(tempfile.mkdtemp())
    for path in folder.iterdir():
        (new / path.name).symlink_to(path)
    return new


def run_command(*words: str, folder: Path | str | None = None) -> tuple[str, float, float]:
    """Run ``lorapower`` in a folder; return what it prints, its seconds, and its memory in GB.

    Raises `RuntimeError` with what it printed if it failed. That an error is out of reach, which it
    says by a verdict and an exit status of 1, is no failure.
    """
    # Without the colours that a notebook asks for.
    around = {name: value for name, value in os.environ.items() if "COLOR" not in name}
    around |= {"COLUMNS": "88", "TERM": "dumb"}
    command = [sys.executable, "-m", "lorapower", *words]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as trouble:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=around, stdout=out, stderr=trouble)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (out, trouble):
            stream.seek(0)
        printed = out.read()
        if process.returncode and not (process.returncode == 1 and "Verdict" in printed):
            raise RuntimeError(printed + trouble.read())
    return printed, seconds, used.ru_maxrss / 1e6
