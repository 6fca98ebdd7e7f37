"""The command as pages run it."""

from __future__ import annotations

import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from records import pairs


def test_the_command_runs_in_a_folder_and_is_measured(tmp_path: Path) -> None:
    printed, seconds, memory = pairs.run_command("plan", "--help", folder=tmp_path)
    assert "--error" in printed
    assert seconds > 0
    assert 0.01 < memory < 10


def test_what_a_refused_command_says_is_raised(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="nowhere"):
        pairs.run_command("plan", "nowhere", "nowhere", "--texts", "texts.txt", folder=tmp_path)


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


def test_a_linked_folder_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "texts.jsonl").write_text("text")
    new = pairs.linked(tmp_path)
    assert (new / "texts.jsonl").read_text() == "text"
    (new / "adapter").mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "texts.jsonl"}


def test_a_crash_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both exit with 1."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError):
        pairs.run_command("plan")
