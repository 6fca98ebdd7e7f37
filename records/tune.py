"""Fine-tune the packaged language model in every way that its chapter compares.

Each run is written as it ends, so that the same command goes on after an interruption, and its
network is kept if `records/sizes.py` needs it. When all tasks are done, they are put into the
package, for `protocols.read_record`::

    python -m records.tune FOLDER [TASK ...]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lorapower.checkpoints import _libraries
from lorapower.checkpoints import _models as hub
from lorapower.experiments import sweeps
from records import language, protocols, texts
from records.language import Found, Setting
from records.record import put

# Each task's source.
TASKS = {"movies": texts.RATED, "movies-next": texts.RATED, "functions-next": texts.CODE}
# Whose networks other tools need.
KEPT = "movies-next"
# Ranks that are run when all else is.
LAST = (2, 8)
# Tasks whose layers are not compared, but ranks up to the most that all layers can have.
RANKS = ("functions-next",)
# Tasks on which all linear layers are tuned in full too.
LINEAR = ("movies-next", "functions-next")
# Numbers of seeds of the main comparison, as those of the grid leave too much open.
SEEDS = {"movies": 5, "movies-next": 8, "functions-next": 4}
_FOLDER: list[Path] = []


def start(folder: Path) -> None:
    """Prepare a worker: one thread each, as two workers do more than two threads."""
    torch.set_num_threads(1)
    _FOLDER[:] = [folder]


def work(settings: list[Setting]) -> list[Found]:
    """Measure, and keep networks."""
    (setting,) = settings
    folder = _FOLDER[0] / "tuned" / name(setting)
    most = setting.problem.samples == protocols.GRIDS["decoder"]["samples"][-1]
    needed = setting.problem.task == KEPT and most and setting.method.kind in ("lora", "full")
    keep = functools.partial(save, folder) if needed else lambda network: None
    return [language.tune(setting, keep)]


def name(setting: Setting) -> str:
    """A run's folder: task, seed, and layers with rank, or all weights."""
    method = setting.method
    way = f"{method.targets}-{method.rank}" if method.kind == "lora" else method.kind
    return f"{setting.problem.task}-{setting.problem.seed}-{way.replace(' ', '-')}"


def save(folder: Path, network: Any) -> None:
    """Keep a network as a checkpoint, or an adapter of peft."""
    options = {}
    if hasattr(network, "peft_config"):
        network.peft_config["default"].base_model_name_or_path = hub.public_name(hub.LANGUAGE)
        options["save_embedding_layers"] = False
    with _libraries.quiet():
        network.save_pretrained(folder, **options)
        hub.tokenizer(hub.LANGUAGE).save_pretrained(folder)


def choose(settings: Sequence[Setting]) -> list[Setting]:
    """Those that are run of a task's settings."""
    return [setting for setting in settings if needed(setting)]


def needed(setting: Setting) -> bool:
    """Not all ways for each task; of further seeds what the main comparison has."""
    grid, problem, method = protocols.GRIDS["decoder"], setting.problem, setting.method
    first = problem.seed in grid["problem"]["seed"]
    everywhere = getattr(method, "targets", "all") == "all"
    if method.kind == "linear" or method.rank == grid["widest"]:
        compared = LINEAR if method.kind == "linear" else RANKS
        return problem.task in compared and (first or problem.task in RANKS)
    if first:
        return everywhere or problem.task not in RANKS
    return everywhere and method.rank not in LAST and problem.samples == grid["samples"][-1]


def run(folder: Path, tasks: Sequence[str]) -> list[Path]:
    """Choose rates for each task, then run everything, seed by seed; the files that have it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.sqlite" for name in ("rates", "runs")]
    with ProcessPoolExecutor(2, get_context("spawn"), start, (folder,)) as executor:
        options: dict[str, Any] = {"size": 1, "executor": executor}
        settings = []
        for task in tasks:
            about = "decoder", [task], TASKS[task], hub.LANGUAGE
            searched = choose(protocols.search(*about))
            trials = sweeps.run(searched, language.measure, files[0], **options)
            rates = protocols.best_rates(trials)
            compared = protocols.compare(*about, seeds=SEEDS[task], rates=rates)
            settings += choose(compared)
        settings.sort(key=lambda setting: (setting.method.rank in LAST, setting.problem.seed))
        sweeps.run(settings, work, files[1], **options)
    return files


if __name__ == "__main__":
    out, *chosen = sys.argv[1:]
    done = run(Path(out), chosen or [*TASKS])
    if not chosen:
        put("decoder", done)
