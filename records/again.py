"""Make a recorded table of trainings again, by the settings in its rows.

Each run is kept in a folder as it ends, so that the same command goes on after an interruption::

    python -m records.again FOLDER TABLE
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

import records
from records import facts, language, run
from records.tables import begin, put


class RecipeResults(language.TextResults):
    """What a run reaches on the test part, and its score on the ``validation`` part."""

    validation: float


def with_validation(runs: list[language.TextRun]) -> list[RecipeResults]:
    """Tune once, and score on the part for choosing and on the part for testing."""
    (setting,) = runs
    kept: list[Any] = []
    found = language.tune(setting, kept.append)
    losses = language.answer(kept[0], setting.problem.replace(part="validation"))
    return [RecipeResults(**dict(found), validation=-float(np.mean(losses)))]


#: What states a row's setting, and what runs it.
MADE: dict[str, tuple[type[Any], Callable[..., Any]]] = {
    "movies": (language.TextRun, language.measure),
    "decoder": (language.TextRun, language.measure),
    "recipes": (language.TextRun, with_validation),
    "facts": (facts.FactRun, facts.work),
}


def settings(table: pd.DataFrame, kind: type[Any]) -> list[Any]:
    """Read the setting of each row of a table back, as values of a kind."""
    problem, found = kind.model_fields["problem"].annotation, []
    for _, row in table.convert_dtypes().rename(columns={"method": "kind"}).iterrows():
        method: Any = language.Lora if row.kind == "lora" else language.Whole
        given = row.dropna()
        parts = ({**given.filter(part.model_fields)} for part in (problem, method))
        found.append(kind(**dict(zip(("problem", "method"), parts, strict=True))))
    return found


if __name__ == "__main__":
    (name,) = begin()
    kind, work = MADE[name]
    asked = settings(records.read(name), kind)
    put(run(asked, work, name, size=1), name)
