"""The command as pages run it."""

from __future__ import annotations

import shutil
import sys
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


def test_a_crash_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both exit with 1."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError):
        pairs.run_command("plan")
