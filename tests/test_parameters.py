"""Parameters of chapters: completed when they are right, named when they are not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch

from lorapower import InputError, book
from lorapower.book.chapter import RESULTS
from lorapower.experiments import texts


class All(book.Parameters):
    """Every type of parameter that there is."""

    width: book.Width
    depth: book.Depth
    seeds: book.Seeds
    ranks: book.Ranks
    few: list[book.whole(1, 9)]  # type: ignore[valid-type]
    source: book.Source
    tasks: list[str]
    model: book.Model
    results: book.results("05-gradient")  # type: ignore[valid-type]


RIGHT: dict[str, Any] = {
    "profile": "quick",
    "seed": 0,
    "width": 16,
    "depth": 6,
    "seeds": 0,
    "ranks": [4, 1],
    "few": [],
    "source": "",
    "tasks": [],
    "model": "",
    "results": "",
}


@pytest.fixture(autouse=True)
def no_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RESULTS, raising=False)


def completed(**given: object) -> All:
    return All(**RIGHT | given)


def test_right_parameters_are_completed() -> None:
    found = completed()
    assert (found.profile, found.seed, found.width, found.depth) == ("quick", 0, 16, 6)
    assert (found.source, found.model, found.tasks) == ("rated", "packaged", [])
    assert completed(source="hub", model="roberta-base").model == "roberta-base"
    assert completed(width=2, ranks=[]).ranks == [0, 1, 2]
    assert completed(width=16, ranks=[]).ranks == list(range(17))
    assert completed(width=64, ranks=[]).ranks == list(range(0, 65, 4))
    assert completed(few=[]).few == []


@pytest.mark.parametrize(
    "given", ["1,4", "1, 4", "[1, 4]", "[4,1]", [4, 1], [1, 4, 1], (1, 4), "1,4,"]
)
def test_lists_of_numbers_are_given_in_any_form(given: object) -> None:
    found = completed(ranks=given, few=given)
    assert found.ranks == found.few == [1, 4]


@pytest.mark.parametrize("given", [4, "4", "[4]", [4]])
def test_one_number_is_a_list(given: object) -> None:
    assert completed(ranks=given).ranks == [4]


@pytest.mark.parametrize("given", ["", "[]", []])
def test_nothing_is_an_empty_list(given: object) -> None:
    assert completed(few=given, tasks=given).few == []
    assert completed(tasks=given).tasks == []


@pytest.mark.parametrize(
    "given", ["rte,cola", "rte, cola", "[rte, cola]", "['rte', 'cola']", ["rte", "cola"]]
)
def test_lists_of_names_are_given_in_any_form(given: object) -> None:
    assert completed(tasks=given).tasks == ["rte", "cola"]


@pytest.mark.parametrize(
    ("profile", "results", "kept", "folder"),
    [
        ("quick", "", "", None),
        ("paper", "", "", Path("results", "05-gradient")),
        ("quick", "runs/mine", "", Path("runs", "mine", "05-gradient")),
        ("paper", "runs/mine", "", Path("runs", "mine", "05-gradient")),
        ("quick", "~/runs", "", Path.home() / "runs" / "05-gradient"),
        ("quick", "", "elsewhere", Path("elsewhere", "05-gradient")),
        ("paper", "", "elsewhere", Path("elsewhere", "05-gradient")),
        ("quick", "runs/mine", "elsewhere", Path("runs", "mine", "05-gradient")),
    ],
)
def test_results_are_kept_where_they_are_wanted(
    profile: str, results: str, kept: str, folder: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESULTS, kept)
    assert completed(profile=profile, results=results).results == folder


def test_tasks_are_completed_in_the_order_of_their_source(tmp_path: Path) -> None:
    assert texts.choose([], "rated") == ["movies"]
    assert texts.choose(["rte", "cola"], "hub") == ["cola", "rte"]
    assert len(texts.choose([], str(tmp_path))) == 9


@pytest.mark.parametrize(
    ("source", "names", "complaint"),
    [
        ("rated", ["cola"], "task must be one of movies, movies-rating, .* got 'cola'"),
        ("hub", ["tweets"], "task must be one of cola, sst2, .* with source 'hub'"),
        ("hub", ["CoLA"], "task must be one of .*; got 'CoLA'"),
        ("hub", ["cola", "ms"], "task must be one of .*; got 'ms'"),
        ("no/such/folder", [], "a folder that exists; got 'no/such/folder'"),
    ],
)
def test_tasks_are_those_of_the_source(source: str, names: list[str], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        texts.choose(names, source)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("profile", "fast", "profile must be 'quick' or 'paper'; got 'fast'"),
        ("profile", None, "got None"),
        ("seed", -1, "seed must be .* 0; got -1"),
        ("seed", 0.5, "got 0.5"),
        ("seeds", 101, "seeds must be .* 100; got 101"),
        ("width", 0, "width must be .* 1; got 0"),
        ("width", 513, "width must be .* 512; got 513"),
        ("width", "16", "width must be .*; got '16'"),
        ("width", True, "got True"),
        ("depth", "two", "depth must be .*; got 'two'"),
        ("ranks", -1, "ranks must be .* 0; got -1"),
        ("ranks", "3,-1", "got -1"),
        ("ranks", 17, r"ranks must be at most 16 \(the width\); got 17"),
        ("ranks", [0, 17], "got 17"),
        ("ranks", [0.5], "got 0.5"),
        ("ranks", "0.5", "got '0.5'"),
        ("ranks", "all", "got 'all'"),
        ("ranks", "--4", "got '--4'"),
        ("few", [2, 0], "few must be .* 1; got 0"),
        ("few", None, "got None"),
        ("tasks", 1, "tasks must be .*; got 1"),
        ("model", None, "model must be .*; got None"),
        ("results", None, "results must be .*; got None"),
    ],
)
def test_wrong_parameters_are_named(name: str, value: object, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        completed(**{name: value})
    assert caught.value.name == name
    assert "\n" not in str(caught.value)


def test_of_two_wrong_parameters_the_first_is_named() -> None:
    with pytest.raises(InputError, match="width"):
        completed(width=0, ranks=[17])


# What a chapter does at its head


class Small(book.Parameters):
    width: book.Width
    ranks: book.Ranks
    results: book.results("05-gradient")  # type: ignore[valid-type]


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The variables of a notebook that declares `Small` and has run its cell of parameters."""
    module = ModuleType("a_notebook")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Small, "__module__", module.__name__)
    threads = torch.get_num_threads()
    given = {"profile": "quick", "seed": 0, "width": 4, "ranks": [], "results": ""}
    vars(module).update(given)
    with mpl.rc_context():
        yield vars(module)
    torch.set_num_threads(threads)


def test_setup_completes_the_variables_and_sets_up_figures_and_threads(
    notebook: dict[str, Any],
) -> None:
    torch.set_num_threads(2)
    mpl.rcParams["svg.hashsalt"] = None
    book.setup(Small)
    assert notebook["ranks"] == [0, 1, 2, 3, 4]
    assert notebook["results"] is None
    assert torch.get_num_threads() == 1
    assert mpl.rcParams["svg.hashsalt"] == "lorapower"


def test_setup_completes_anew_what_was_changed_since(notebook: dict[str, Any]) -> None:
    notebook["results"] = "runs"
    for _ in range(2):
        book.setup(Small)
        assert notebook["results"] == Path("runs", "05-gradient")
    notebook["width"] = 2
    book.setup(Small)
    assert notebook["ranks"] == [0, 1, 2]
    notebook["ranks"] = "1"
    book.setup(Small)
    assert notebook["ranks"] == [1]
    notebook |= {"width": 3, "ranks": [], "results": "", "profile": "paper"}
    book.setup(Small)
    assert notebook["ranks"] == [0, 1, 2, 3]
    assert notebook["results"] == Path("results", "05-gradient")


def test_setup_names_a_parameter_that_is_gone(notebook: dict[str, Any]) -> None:
    del notebook["width"]
    with pytest.raises(InputError, match="width must be given"):
        book.setup(Small)


def test_unknown_names_are_refused_with_those_that_there_are(notebook: dict[str, Any]) -> None:
    notebook["In"] = ["", "width = 4", "# Parameters\nwdith = 24\nranks = [1]\n", "setup()"]
    complaint = "among profile, seed, width, ranks, results; got wdith: did you mean width?"
    with pytest.raises(InputError, match=complaint):
        book.setup(Small)
    # As in JupyterLab, after the cell was mended and run again.
    notebook["In"] += ["# Parameters\nwidth = 24\n", "setup()"]
    book.setup(Small)


def test_other_variables_are_nobodys_parameters(notebook: dict[str, Any]) -> None:
    notebook |= {"wdith": 24, "In": ["wdith = 24", "# Parameters of mine\nwdith = 24"]}
    book.setup(Small)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, 2),
        (torch.tensor(2), 2),
        (torch.tensor(0.5, dtype=torch.float64), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(2), 2),
        ("2, 4", "2, 4"),
    ],
)
def test_the_text_quotes_plain_numbers_and_texts(
    value: object, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    quoted: dict[str, Any] = {}
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: quoted.update({name: value}))
    book.quote("it", value)
    assert quoted == {"it": expected}
    assert type(quoted["it"]) is type(expected)


def test_the_text_quotes_very_small_numbers_typeset(monkeypatch: pytest.MonkeyPatch) -> None:
    quoted: dict[str, Any] = {}
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: quoted.update({name: value}))
    book.quote("it", torch.tensor(2.34e-7, dtype=torch.float64), digits=2)
    assert quoted["it"].data == r"$2.3\times10^{-7}$"


def test_jupyterlab_is_told_what_the_text_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myst_nb.glue", lambda name, value, display: None)
    book.quote("error", torch.tensor(0.0567, dtype=torch.float64))
    book.quote("count", 4.0)
    book.quote("tiny", 2.34e-7, digits=2)
    book.quote("short", 0.21, digits=2)
    assert book.quoted["error:.2f"] == "0.06"
    assert book.quoted["count:d"] == "4"
    assert book.quoted["short"] == "0.21"
    assert book.quoted["tiny"].data == r"$2.3\times10^{-7}$"
    assert book.quoted["yet_to_come:.2f"] == "…"
