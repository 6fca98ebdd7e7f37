"""Tune the packaged language model on sentences with PiSSA and LoRA+, as peft has them.

Adapters have rank 4 and are on all linear layers; the plain ones are in the table ``"decoder"``.
Each run is kept in a folder as it ends, so that the same command goes on after an interruption;
``recipes.md`` says how rates are chosen::

    python -m records.recipes FOLDER
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorapower.experiments import sweeps
from records import language, models, protocols, texts
from records.language import Part, TextRun
from records.tables import begin, merge, put, workers

TASK, RANK, SAMPLES = "movies-next", 4, 2000
# Rates a factor of two apart; the rate of LoRA+ is for the factor next to the inputs.
RATES: dict[Literal["pissa", "lora+"], list[float]] = {
    "pissa": [0.001, 0.002, 0.004],
    "lora+": [0.0005, 0.001, 0.002],
}
# Numbers of seeds: in the search for rates, and at the chosen rates.
SEARCHED, SEEDS = 1, 3


class RecipeResults(language.TextResults):
    """What a run reaches on the test part, and its score on the ``validation`` part."""

    validation: float


def work(settings: list[TextRun]) -> list[RecipeResults]:
    """Tune once, and score on the part for choosing and on the part for testing."""
    (setting,) = settings
    kept: list[Any] = []
    found = language.tune(setting, kept.append)
    losses = language.answer(kept[0], setting.problem.replace(part="validation"))
    return [RecipeResults(**dict(found), validation=-float(np.mean(losses)))]


def run(file: str) -> None:
    """Choose rates, then run the chosen ones with all seeds, kept in a file."""
    about = protocols.PROFILES["decoder"], TASK, texts.RATED, models.LANGUAGE
    problems = [
        protocols.state_problem(*about, seed).replace(samples=SAMPLES) for seed in range(SEEDS)
    ]
    ways = {recipe: Part(pattern="", rank=RANK, recipe=recipe) for recipe in RATES}
    with workers():
        tune = functools.partial(sweeps.run, work=work, path=file, size=1)
        tried = [
            TextRun(problem=problem, method=ways[recipe].replace(learning_rate=rate))
            for problem in problems[:SEARCHED]
            for recipe, rates in RATES.items()
            for rate in rates
        ]
        best = protocols.choose_rates(tried, lambda some: by_validation(tune(some)))
        chosen = [way.replace(learning_rate=best[way.way, True][RANK]) for way in ways.values()]
        tune(sweeps.grid(TextRun, problem=problems, method=chosen))


def by_validation(table: pd.DataFrame) -> pd.DataFrame:
    """Score runs as rates are chosen."""
    return table.assign(score=table.validation)


def at_best_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Keep each recipe's runs at the rate that was best in the search."""
    return protocols.at_best_rates(table, by_validation(table[table.seed < SEARCHED]))


if __name__ == "__main__":
    begin()
    run("recipes.sqlite")
    put(merge(["recipes.sqlite"], TextRun), "recipes")
