"""Parameters of chapters: completed when they are right, named when they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorapower import InputError
from lorapower.book import parameters

RIGHT: dict[str, Any] = {
    "profile": "quick",
    "seed": 0,
    "width": 16,
    "depth": 6,
    "ranks": [4, 1],
    "seeds": 0,
}


def test_a_token_of_one_coordinate_has_no_narrower_heads() -> None:
    assert parameters.check(width=2, heads=1) == [2, 1]
    with pytest.raises(InputError, match="width must be an integer from 2 to 512; got 1"):
        parameters.check(width=1, heads=1)


def test_right_parameters_come_back_in_order() -> None:
    assert parameters.check(**RIGHT) == ["quick", 0, 16, 6, [1, 4], 0]
    assert parameters.check(width=2, ranks=[]) == [2, [0, 1, 2]]
    assert parameters.check(width=2, ranks=1) == [2, [1]]
    assert parameters.check(width=16, ranks=[])[1] == list(range(17))
    assert parameters.check(width=64, ranks=[])[1] == list(range(0, 65, 4))


@pytest.mark.parametrize(
    ("profile", "results", "folder"),
    [
        ("quick", "", None),
        ("paper", "", Path("results", "05-gradient")),
        ("quick", "runs/mine", Path("runs", "mine", "05-gradient")),
        ("paper", "runs/mine", Path("runs", "mine", "05-gradient")),
        ("quick", "~/runs", Path.home() / "runs" / "05-gradient"),
    ],
)
def test_results_are_kept_where_they_are_wanted(
    profile: str, results: str, folder: Path | None
) -> None:
    assert parameters.check("05-gradient", profile=profile, results=results) == [profile, folder]


def test_texts_are_the_packaged_ones_by_default(tmp_path: Path) -> None:
    def of(source: str, names: Any, model: str = "") -> list[Any]:
        return parameters.check(source=source, tasks=names, model=model)

    assert of("", []) == ["packaged", ["condition"], "packaged"]
    assert of("hub", ["rte", "cola"])[:2] == ["hub", ["cola", "rte"]]
    # As papermill's option -p gives them.
    assert of("hub", "rte, cola")[1] == of("hub", ["rte", "cola"])[1]
    assert of("hub", "rte")[1] == ["rte"]
    assert len(of("hub", "")[1]) == 9
    assert parameters.check(text_ranks=[4, 1, 4]) == [[1, 4]]
    assert parameters.check(text_ranks=2) == [[2]]
    assert parameters.check(text_ranks=[]) == [[]]
    folder, every, model = of(str(tmp_path), [], "roberta-base")
    assert (folder, len(every), model) == (str(tmp_path), 9, "roberta-base")


@pytest.mark.parametrize(
    ("source", "names", "complaint"),
    [
        ("", ["cola"], "tasks must be among condition, rating with source 'packaged'; got 'cola'"),
        ("hub", ["rating"], "tasks must be among cola, sst2, .* with source 'hub'"),
        ("hub", ["CoLA"], "tasks must be among .*; got 'CoLA'"),
        ("hub", "cola,ms", "tasks must be among .*; got 'ms'"),
        ("hub", 1, "tasks must be a list of names; got 1"),
        ("hub", [1], "got 1"),
        (
            "no/such/folder",
            [],
            "source must be 'hub' or a folder that exists; got 'no/such/folder'",
        ),
        (None, [], "source must be a folder, hub, or empty; got None"),
    ],
)
def test_tasks_are_those_of_the_source(source: Any, names: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parameters.check(source=source, tasks=names)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("profile", "fast", "profile must be quick or paper; got 'fast'"),
        ("profile", None, "got None"),
        ("seed", -1, "seed must be an integer from 0; got -1"),
        ("seed", 0.5, "got 0.5"),
        ("seeds", -1, "seeds must be an integer from 0 to 100; got -1"),
        ("seeds", 101, "got 101"),
        ("width", 0, "width must be an integer from 1 to 512; got 0"),
        ("width", "16", "got '16'"),
        ("width", True, "got True"),
        ("depth", "two", "depth must be an integer from 1 to 64; got 'two'"),
        ("depth", 65, "got 65"),
        ("ranks", -1, r"ranks must be an integer from 0 to 16 \(the width\); got -1"),
        ("ranks", 17, "got 17"),
        ("ranks", [0, 17], "got 17"),
        ("ranks", [0.5], "got 0.5"),
        ("ranks", "all", "got 'all'"),
        ("text_ranks", [2, 0], "text_ranks must be an integer from 1; got 0"),
        ("text_ranks", "all", "got 'all'"),
        ("model", None, "model must be a folder, a hub name, or empty; got None"),
        ("results", None, "results must be the name of a folder, or empty; got None"),
    ],
)
def test_wrong_parameters_are_named(name: str, value: object, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        parameters.check(**RIGHT | {name: value})
