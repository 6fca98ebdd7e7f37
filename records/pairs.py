"""Pairs of checkpoints and texts that pages make in minutes, and the command, run on them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from records import language, models
from records import texts as sources


def texts(kind: str, part: str) -> list[str]:
    """Read the rated sentences of a kind in a part, without ratings, those near neutral too."""
    return [text for (text,) in sources.read(f"{kind}-rating", sources.RATED, part).texts]


def encoder(folder: Path | str, *, samples: int = 640, epochs: int = 2, seed: int = 0) -> None:
    """Tune all weights of the packaged encoder to tell the sign of movie snippets, and save it.

    ``folder`` is a checkpoint like others, with the head of ``transformers``; its base is
    ``"packaged"``.
    """
    setting = language.Setting(
        problem=language.Problem(head="own", samples=samples, epochs=epochs, seed=seed),
        method=language.Whole(kind="full", learning_rate=2e-4),
    )
    language.tune(setting, lambda network: models.save(network, models.PACKAGED, folder))


def run_command(*words: str, folder: Path | str | None = None) -> tuple[str, float, float]:
    """Run ``lorapower`` in a folder; return what it prints, its seconds, and its memory in GB.

    Raises `RuntimeError` with what it printed unless it exits with 0, or with 1 as an error that
    was asked for is out of reach.
    """
    # Without the colours that a notebook asks for.
    around = {name: value for name, value in os.environ.items() if "COLOR" not in name}
    around |= {"COLUMNS": "88", "TERM": "dumb"}
    command = [sys.executable, "-m", "lorapower", *words]
    options: dict[str, Any] = {"cwd": folder, "env": around, "text": True}
    with tempfile.TemporaryFile("w+") as trouble:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=trouble, **options)
        assert process.stdout is not None
        with process.stdout:
            printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, 1):
            trouble.seek(0)
            raise RuntimeError(printed + trouble.read())
    return printed, time.perf_counter() - started, used.ru_maxrss / 1e6
