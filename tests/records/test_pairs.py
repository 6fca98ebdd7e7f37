"""The pair that pages share, and the command as they run it."""

from __future__ import annotations

import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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


def test_an_example_is_made_once_for_all_that_ask_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(_: str, folder: str, *seed: str) -> None:
        made.append((folder, *seed))
        time.sleep(0.1)
        Path(folder).mkdir()

    monkeypatch.setattr(pairs, "_MADE", tmp_path / "new")
    monkeypatch.setattr(pairs, "run_command", make)
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(pairs.example, [0, 1, 0, 1, 0])]
    assert [folder.name for folder in found] == ["0", "1", "0", "1", "0"]
    assert sorted(made) == [(str(tmp_path / "new" / seed), "--seed", seed) for seed in "01"]
    # What is written beside links to an example stays out of it.
    (pairs.linked(tmp_path / "new") / "adapter").mkdir()
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {"0", "1"}
    assert not (tmp_path / "new" / "adapter").exists()
