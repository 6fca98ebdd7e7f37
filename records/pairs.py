"""Pairs of checkpoints and texts that pages make in minutes, and the command, run on them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock
import pandas as pd

from records import tables
from records import texts as sources

#: The Python whose docstrings are in recorded examples; those of another are other texts.
PYTHON = "3.11.7"
#: What the quick start runs, in this order, in the folder of an example.
COMMANDS = {
    "prices": "plan base tuned --texts texts.jsonl",
    "plan": "plan base tuned --texts texts.jsonl --same 0.9",
    "extract": "extract base tuned --texts texts.jsonl --same 0.9 --out adapter",
    "check": "check base adapter tuned --texts fresh.jsonl",
    "half": "check base tuned tuned --texts fresh.jsonl --dtype bfloat16",
    "shrink": "shrink base lora --texts texts.jsonl --same 0.9 --out small",
}

# Where examples are kept, in a folder that `make` removes when what makes them has changed.
_MADE = Path(__file__).resolve().parent.parent / "_build" / "pair"


def texts(kind: str, part: str) -> list[str]:
    """Read the rated sentences of a kind in a part, without ratings, those near neutral too."""
    return [*sources.read(f"{kind}-next", part).texts]


def example(seed: int = 0) -> Path:
    """Find the folder of `loraplan example`, which all pages share; it is made once for a seed.

    A page that writes beside what is there works in a folder of its own (`linked`).
    """
    folder = _MADE / str(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Another page may be at it; the command leaves nothing that looks finished.
    with filelock.FileLock(folder.with_name(f".{seed}.lock")):
        if not folder.is_dir():
            _make_example(folder, seed)
    return folder


def _make_example(folder: Path, seed: int) -> None:
    """Make an example in a process of its own, as the networks that it trains take memory."""
    code = f"from loraplan import lab; lab.write_example({str(folder)!r}, seed={seed})"
    subprocess.run([sys.executable, "-c", code], check=True)


def is_recorded(seed: int) -> bool:
    """Say whether ``"commands"`` of `records.read` has what the commands do with an example."""
    return seed == 0 and platform.python_version() == PYTHON


def transcripts(seed: int = 0) -> pd.DataFrame:
    """Run the quick start's commands on an example: ``"commands"`` of `records.read`."""
    folder, rows = linked(example(seed)), []
    for name, words in COMMANDS.items():
        printed, seconds, memory = run_command(*words.split(), folder=folder)
        rows.append({"name": name, "printed": printed, "seconds": seconds, "memory": memory})
        for column, option in (("read", 2), ("written", -1)):
            if name in ("extract", "shrink"):
                # Nothing is written where an error is out of reach.
                files = [*(folder / words.split()[option]).glob("*.safetensors")]
                size = sum(file.stat().st_size for file in files) / 1e6
                rows[-1][column] = size if files else float("nan")
    return pd.DataFrame(rows)


def linked(folder: Path) -> Path:
    """Make a temporary folder with links to all that is in another."""
    new = Path(tempfile.mkdtemp())
    for path in folder.iterdir():
        (new / path.name).symlink_to(path)
    return new


def run_command(*words: str, folder: Path | str | None = None) -> tuple[str, float, float]:
    """Run ``loraplan`` in a folder; return what it prints, its seconds, and its memory in GB.

    Raises `RuntimeError` with what it printed if it failed. That an error is out of reach, which it
    says by a verdict and an exit status of 1, is no failure.
    """
    # Without the colours that a notebook asks for.
    around = {name: value for name, value in os.environ.items() if "COLOR" not in name}
    around |= {"COLUMNS": "88", "TERM": "dumb"}
    command = [sys.executable, "-m", "loraplan", *words]
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


if __name__ == "__main__":
    tables.put(transcripts(), "commands")
