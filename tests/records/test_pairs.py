"""The pair that pages share, and the command as they run it."""

from __future__ import annotations

import math
import platform
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

import records
from records import pairs


def test_what_a_refused_command_says_is_raised_and_a_crash_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("one\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="nowhere"):
        pairs.run_command("plan", "nowhere", "nowhere", "--texts", "texts.txt", folder=tmp_path)
    # It exits with 1, as an error out of reach does.
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError):
        pairs.run_command("plan")


def test_a_command_may_write_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As ``shrink``, where an error is out of reach."""
    commands = {name: pairs.COMMANDS[name] for name in ("extract", "shrink")}
    monkeypatch.setattr(pairs, "COMMANDS", commands)
    monkeypatch.setattr(pairs, "example", lambda _: tmp_path)
    monkeypatch.setattr(pairs, "linked", lambda folder: folder)
    monkeypatch.setattr(pairs, "run_command", lambda *_, **__: ("Verdict", 1.0, 1.0))
    made = tmp_path / commands["extract"].split()[-1]
    made.mkdir()
    (made / "adapter.safetensors").write_bytes(bytes(1000))
    written = pairs.transcripts().set_index("name").written
    assert written["extract"] == 1e-3
    assert math.isnan(written["shrink"])


@pytest.mark.nightly
@pytest.mark.skipif(not pairs.is_recorded(0), reason="this Python has other docstrings")
def test_the_commands_of_the_quick_start_print_what_is_recorded() -> None:
    found, recorded = pairs.transcripts(), records.read("commands")
    assert found.printed.tolist() == recorded.printed.tolist()
    sizes = ["read", "written"]
    pd.testing.assert_frame_equal(found[sizes], recorded[sizes], rtol=1e-3)


def test_another_python_or_seed_has_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"3\.\d+\.\d+", pairs.PYTHON)
    monkeypatch.setattr(platform, "python_version", lambda: pairs.PYTHON)
    assert [pairs.is_recorded(seed) for seed in (0, 1)] == [True, False]
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    assert not pairs.is_recorded(0)


def test_an_example_is_made_once_for_all_that_ask_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(folder: Path, seed: int) -> None:
        made.append((str(folder), seed))
        time.sleep(0.1)
        folder.mkdir()

    monkeypatch.setattr(pairs, "_MADE", tmp_path / "new")
    monkeypatch.setattr(pairs, "_make_example", make)
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(pairs.example, [0, 1, 0, 1, 0])]
    assert [folder.name for folder in found] == ["0", "1", "0", "1", "0"]
    assert sorted(made) == [(str(tmp_path / "new" / str(seed)), seed) for seed in (0, 1)]
    # What is written beside links to an example stays out of it.
    (pairs.linked(tmp_path / "new") / "adapter").mkdir()
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {"0", "1"}
    assert not (tmp_path / "new" / "adapter").exists()
