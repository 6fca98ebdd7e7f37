"""Fine-tune the packaged language model in every way that its chapter compares.

Each run is kept in a folder as it ends, so that the same command goes on after an interruption, and
its network is kept if `sizes` needs it. When all tasks are done, they are recorded::

    python -m records.tune FOLDER [TASK ...]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lorapower.experiments import sweeps
from records import language, models, protocols, texts
from records.language import TextResults, TextRun
from records.tables import begin, merge, put, workers

PROFILE = protocols.PROFILES["decoder"]
# Each task's source.
TASKS = {"movies": texts.RATED, "movies-next": texts.RATED, "functions-next": texts.CODE}
# Whose networks other commands need.
KEPT = "movies-next"
# Ranks that are run when all else is.
LAST = (2, 8)
# Tasks whose layers are not compared, but ranks up to the most that all layers can have.
RANKS = ("functions-next",)
# Tasks on which all linear layers are tuned in full too.
LINEAR = ("movies-next", "functions-next")
# Tasks whose rates are chosen with as many texts as runs have, and three seeds; see rates.md.
AGAIN = ("movies-next",)
# Numbers of seeds of the main comparison, as those of the profile leave too much open.
SEEDS = {"movies": 5, "movies-next": 8, "functions-next": 4}


def work(settings: list[TextRun]) -> list[TextResults]:
    """Measure, and keep networks."""
    (setting,) = settings
    if setting.problem.task != KEPT or setting.method.kind not in ("lora", "full"):
        return language.measure(settings)
    if setting.problem.samples != PROFILE.samples[-1]:
        return language.measure(settings)
    save = functools.partial(models.save, model=models.LANGUAGE, folder=place(setting))
    return [language.tune(setting, save)]


def place(setting: TextRun) -> Path:
    """Name a network's folder: task, seed, and layers with rank, or all weights."""
    method, problem = setting.method, setting.problem
    way = f"{method.targets}-{method.rank}" if method.kind == "lora" else method.kind
    return Path("tuned", f"{problem.task}-{problem.seed}-{way.replace(' ', '-')}")


def is_needed(setting: TextRun) -> bool:
    """Whether a setting is run: not all ways are for each task and seed."""
    problem, method = setting.problem, setting.method
    first = problem.seed < PROFILE.seeds
    on_all = method.way not in PROFILE.layers
    if method.kind == "linear":
        return problem.task in LINEAR and (first or problem.task in RANKS)
    if method.rank == PROFILE.widest:
        return problem.task in RANKS
    if first:
        return on_all or problem.task not in RANKS
    return on_all and method.rank not in LAST and problem.samples == PROFILE.samples[-1]


def choose(settings: Sequence[TextRun]) -> list[TextRun]:
    """Choose those that are run of a task's settings."""
    return [setting for setting in settings if is_needed(setting)]


def run(tasks: Sequence[str]) -> list[str]:
    """Choose rates for each task, then run everything, seed by seed; name the files."""
    files = ["rates.sqlite", "runs.sqlite"]
    with workers():

        def measure(some: Sequence[TextRun]) -> pd.DataFrame:
            return sweeps.run(some, language.measure, files[0], size=1)

        settings = []
        for task in tasks:
            about = "decoder", task, TASKS[task], models.LANGUAGE
            again = task in AGAIN
            tried = choose(protocols.search(*about, again=again))
            if again:
                rates = protocols.choose_rates(tried, measure)
            else:
                rates = protocols.best_rates(measure(tried))
            settings += choose(protocols.compare(*about, seeds=SEEDS[task], rates=rates))
        settings.sort(key=lambda setting: (setting.method.rank in LAST, setting.problem.seed))
        sweeps.run(settings, work, files[1], size=1)
    return files


if __name__ == "__main__":
    chosen = begin()
    done = run(chosen or [*TASKS])
    if not chosen:
        put(merge(done, TextRun), "decoder")
