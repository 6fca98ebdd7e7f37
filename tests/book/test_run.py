"""One chapter is run with parameters by one command."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import run


@pytest.mark.parametrize(
    "name", ["07", "7", "07-train", "07-training", "chapters/07-training.ipynb"]
)
def test_a_chapter_is_named_as_its_file_begins(name: str) -> None:
    assert run.chapter(name).name == "07-training.ipynb"


@pytest.mark.parametrize("name", ["0", "99", "training"])
def test_what_names_no_single_chapter_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.main([name])
    assert f"{name!r} is not the beginning of one of 01-linear, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("24", 24), ("-1", -1), ("1,4", "1,4"), ("0.5", "0.5"), ("--1", "--1"), ("", "")],
)
def test_values_are_numbers_or_texts(text: str, expected: int | str) -> None:
    assert run.value(text) == expected


@pytest.mark.programs
@pytest.mark.sources("tools/*.py", "chapters/07-training.ipynb", "lorapower/book/*.py")
def test_a_parameter_that_is_none_stops_the_run_in_the_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "RUNS", tmp_path)
    assert run.main(["07", "-p", "ranks", "4,17", "--only-run"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert said == ["07-training stopped: InputError: ranks must be at most 16 (the width); got 17"]
    cells = nbformat.read(tmp_path / "07-training.ipynb", as_version=4).cells
    ran = [cell.source for cell in cells if cell.get("execution_count")]
    assert len(ran) == 3, "what is declared, what is injected, and the first line"
