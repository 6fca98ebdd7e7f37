"""The chapters as sources, and executed at small sizes by papermill."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from conftest import CHAPTERS
from execute import run
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from lorapower.book.claims import read

LONGEST_CELL = 25
IMAGES = {"image/png", "image/svg+xml"}

# Parameters at which each chapter runs in seconds. Every chapter has a line here.
SMALL: dict[str, dict[str, Any]] = {
    "01-linear": {"width": 6, "depth": 2, "ranks": [0, 1, 2, 3]},
    "02-linearization": {"width": 6, "layers": 2, "ranks": [0, 1, 2, 3]},
    "03-partitions": {"width": 6, "layers": 3, "ranks": [0, 1, 2, 3]},
    "04-transformers": {"width": 6, "depth": 2, "tokens": 4, "ranks": [0, 1, 2, 3]},
    "05-gradient": {"width": 6, "tokens": 4, "ranks": [1, 3, 6]},
    "06-rank": {"width": 6, "ranks": [0, 1, 2, 3]},
    "07-generalization": {"width": 8, "ranks": [4]},
    "08-real-data": {"seeds": 1, "ranks": [8], "text_ranks": [2]},
}

# For each chapter: a parameter, a value that it must refuse, and the part that the message shows.
BAD: list[tuple[str, str, object, str]] = [
    ("01-linear", "profile", "fast", "fast"),
    ("01-linear", "seed", -1, "-1"),
    ("01-linear", "width", 0, "0"),
    ("01-linear", "depth", "two", "two"),
    ("01-linear", "ranks", -1, "-1"),
    ("01-linear", "ranks", 17, "17"),
    ("01-linear", "ranks", [-1], "-1"),
    ("01-linear", "ranks", [0, 17], "17"),
    ("02-linearization", "profile", "fast", "fast"),
    ("02-linearization", "width", 513, "513"),
    ("02-linearization", "layers", 1, "1"),
    ("02-linearization", "ranks", "all", "all"),
    ("03-partitions", "seed", 0.5, "0.5"),
    ("03-partitions", "layers", 6, "6"),
    ("03-partitions", "blocks", 1, "1"),
    ("03-partitions", "blocks", "two", "two"),
    ("03-partitions", "ranks", [17], "17"),
    ("04-transformers", "profile", "fast", "fast"),
    ("04-transformers", "seed", -1, "-1"),
    ("04-transformers", "width", 1, "1"),
    ("04-transformers", "heads", 17, "17"),
    ("04-transformers", "depth", 0, "0"),
    ("04-transformers", "tokens", 0, "0"),
    ("04-transformers", "ranks", 17, "17"),
    ("05-gradient", "profile", "fast", "fast"),
    ("05-gradient", "seed", -1, "-1"),
    ("05-gradient", "width", 1, "1"),
    ("05-gradient", "ranks", [17], "17"),
    ("05-gradient", "results", None, "None"),
    ("06-rank", "profile", "fast", "fast"),
    ("06-rank", "seed", -1, "-1"),
    ("06-rank", "width", 5, "5"),
    ("06-rank", "ranks", [0, 17], "17"),
    ("06-rank", "results", 3, "3"),
    ("07-generalization", "profile", "fast", "fast"),
    ("07-generalization", "seed", -1, "-1"),
    ("07-generalization", "width", 1, "1"),
    ("07-generalization", "ranks", [17], "17"),
    ("07-generalization", "results", 1, "1"),
    ("08-real-data", "profile", "fast", "fast"),
    ("08-real-data", "seed", -1, "-1"),
    ("08-real-data", "seeds", 101, "101"),
    ("08-real-data", "ranks", [65], "65"),
    ("08-real-data", "source", "nowhere", "nowhere"),
    ("08-real-data", "tasks", ["cola"], "cola"),
    ("08-real-data", "model", 3, "3"),
    ("08-real-data", "text_ranks", [0], "0"),
    ("08-real-data", "results", 1, "1"),
]

PARAMETER_LINE = re.compile(r"\w+: [\w\[\], |]+ = [^#]+  # \S.*")


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def notebook(chapter: Path) -> NotebookNode:
    source: NotebookNode = nbformat.read(chapter, as_version=4)
    return source


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_parameters(cell: NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def test_source_holds_nothing_of_a_run(notebook: NotebookNode) -> None:
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == [], "outputs in the source: run `make tidy`"
        assert cell.execution_count is None, "counts in the source: run `make tidy`"
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert not any("injected-parameters" in tag for tag in tags)


def test_source_holds_nothing_of_a_machine(notebook: NotebookNode) -> None:
    assert notebook.metadata.kernelspec.name == "python3"
    about = set(notebook.metadata) - {"kernelspec", "language_info"}
    assert not about, f"metadata {about}: run `make tidy`"
    assert set(notebook.metadata.get("language_info", {})) <= {"name"}, "run `make tidy`"
    for cell in notebook.cells:
        about = set(cell.metadata) - {"tags", "mystnb"}
        assert not about, f"metadata {about} of cell {cell.id}: run `make tidy`"


def test_cells_are_short(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        lines = cell.source.count("\n") + 1
        assert lines <= LONGEST_CELL, f"cell {cell.id} has {lines} lines: move code to lorapower"


def test_one_cell_declares_the_parameters(chapter: Path, notebook: NotebookNode) -> None:
    (cell,) = filter(is_parameters, code_cells(notebook))
    for line in cell.source.splitlines():
        assert PARAMETER_LINE.fullmatch(line), f"not `name: type = value  # comment`: {line}"
    alone: dict[str, object] = {}
    exec(cell.source, alone)
    described = papermill.inspect_notebook(chapter)
    assert set(described) == set(alone) - {"__builtins__", "__annotations__"}
    assert described["profile"]["default"] == '"quick"'
    for about in described.values():
        assert about["inferred_type_name"] != "None", about
        assert about["help"], about


def test_figures_that_the_source_declares_are_complete(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        if "mystnb" in cell.metadata and {"image", "figure"} & set(cell.metadata.mystnb):
            assert_described(cell)


def assert_described(cell: NotebookNode) -> None:
    about = cell.metadata.get("mystnb", {})
    assert about.get("image", {}).get("alt"), f"figure of cell {cell.id} has no alternative text"
    assert about.get("figure", {}).get("caption"), f"figure of cell {cell.id} has no caption"
    assert about["figure"].get("name", "").startswith("fig-"), f"name of figure {cell.id}"


def test_chapter_runs_at_another_size_from_another_folder(
    chapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chapter.stem in SMALL, f"add small parameters of {chapter.stem} to SMALL in this file"
    monkeypatch.chdir(tmp_path)
    executed = tmp_path / "elsewhere" / chapter.name
    notebook = run(chapter, executed, SMALL[chapter.stem])
    claims = read(executed)
    assert claims, "the chapter records no claim"
    assert [claim for claim in claims if not claim.holds] == []
    for cell in code_cells(notebook):
        if any(IMAGES & set(output.get("data", {})) for output in cell.outputs):
            assert_described(cell)


@pytest.mark.parametrize(("name", "parameter", "value", "shown"), BAD)
def test_bad_parameter_stops_the_first_line(
    name: str, parameter: str, value: object, shown: str, tmp_path: Path
) -> None:
    (chapter,) = (path for path in CHAPTERS if path.stem == name)
    with pytest.raises(PapermillExecutionError) as caught:
        run(chapter, tmp_path / "out.ipynb", {parameter: value})
    error = caught.value
    assert error.ename == "InputError"
    assert re.search(rf"\b{parameter}\b", error.evalue)
    assert shown in error.evalue
    cells = nbformat.read(chapter, as_version=4).cells
    (declared,) = (i for i, cell in enumerate(cells) if is_parameters(cell))
    first = next(i for i in range(declared + 1, len(cells)) if cells[i].cell_type == "code")
    assert error.cell_index == first + 1, "one later than in the source, by the injected cell"


def test_every_chapter_refuses_bad_parameters(chapter: Path) -> None:
    assert chapter.stem in {name for name, *_ in BAD}, f"add bad parameters of {chapter.stem}"
