"""One chapter is run with parameters by one command."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import run_chapter


@pytest.mark.parametrize("name", ["05", "05-grad", "05-gradient"])
def test_a_chapter_is_named_as_its_file_begins(name: str) -> None:
    assert run_chapter.chapter(name).name == "05-gradient.ipynb"


@pytest.mark.parametrize("name", ["0", "99", "gradient"])
def test_what_names_no_single_chapter_is_refused(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"one of 01-linear, .*08-real-data"):
        run_chapter.chapter(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("width=24", ("width", 24)),
        ("seed=-1", ("seed", -1)),
        ("ranks=1,4", ("ranks", "1,4")),
        ("source=", ("source", "")),
        ("source=a=b", ("source", "a=b")),
    ],
)
def test_parameters_are_names_and_values(text: str, expected: tuple[str, object]) -> None:
    assert run_chapter.parameter(text) == expected


@pytest.mark.parametrize("text", ["width", "=24", "a-b=1"])
def test_what_is_no_parameter_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not of the form name=value"):
        run_chapter.parameter(text)


def test_an_unknown_parameter_stops_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_chapter, "ROOT", tmp_path)
    assert run_chapter.main(["05", "wdith=24", "--only-run"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert len(said) == 1
    assert said[0].startswith("05-gradient stopped: InputError: parameters must be among profile,")
    assert said[0].endswith("got wdith: did you mean width?")
