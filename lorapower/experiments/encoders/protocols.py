"""Which runs are compared: settings by profile, and the search for learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ...errors import InputError
from .. import sweeps
from . import models, sources
from .models import Final, Full, Lora, Method
from .runs import Problem, Setting

#: Of each profile: what all runs share; the ranks; the numbers of training samples, 0 for all; and
#: the learning rates that `search` tries for each kind of method, the first being the default.
#: Quick is for a processor and some minutes.
GRIDS: dict[str, dict[str, Any]] = {
    "quick": {
        "problem": {"epochs": 1, "batch": 32, "tokens": 48, "seed": range(1)},
        "ranks": [1, 8],
        "samples": [192, 640],
        "rates": {"lora": [5e-3], "final": [1e-3], "full": [2e-4]},
    },
    "paper": {
        "problem": {"epochs": 3, "batch": 32, "tokens": 64, "seed": range(3)},
        "ranks": [1, 2, 4, 8],
        "samples": [250, 1000, 4000, 0],
        "rates": {
            "lora": [3e-3, 1e-3, 1e-2],
            "final": [1e-3, 3e-4, 3e-3],
            "full": [1e-4, 3e-5, 3e-4],
        },
    },
}
#: Learning rates, by kind of method and whether the weights are pretrained.
Rates = Mapping[tuple[str, bool], float]


def compared(
    profile: str,
    tasks: Sequence[str],
    source: str,
    model: str,
    *,
    ranks: Sequence[int] = (),
    seed: int = 0,
    seeds: int = 0,
    samples: int = 0,
    rates: Rates | None = None,
) -> list[Setting]:
    """Settings that compare ranks, layers, weights and numbers of samples, for each task and seed.

    From pretrained weights and the most samples: adapters of each rank on all linear layers, and
    for attention and for feed-forward layers of the rank at which they have as many numbers as the
    highest on all (`models.equal_ranks`), in paper also of each rank; the last layer; all weights.
    From random weights: the highest rank on all layers, in paper each, and the last two. With
    fewer samples: the lowest and the highest rank on all layers, and all weights.

    Ranks, the number of seeds from ``seed`` on, and the most samples are by default those of the
    profile; learning rates, its first (`best_rates` finds others). Raises `InputError` for a
    profile that there is not.
    """
    grid = _grid(profile)
    chosen = sorted(ranks or grid["ranks"])
    whole = profile == "paper"
    equal = models.equal_ranks(model, chosen[-1])
    parts = [targets for targets in models.TARGETS if targets != "all"]
    everywhere = [Lora(rank=rank) for rank in chosen]
    fewer: list[Method] = [everywhere[0], everywhere[-1], Full()]
    pretrained: list[Method] = [
        *everywhere,
        *(Lora(targets=targets, rank=equal[targets]) for targets in parts),
        *(Lora(targets=targets, rank=rank) for targets in parts for rank in chosen if whole),
        Final(),
        Full(),
    ]
    drawn: list[Method] = [*everywhere, Final(), Full()] if whole else [everywhere[-1]]
    found = []
    for problem in _problems(grid, tasks, source, model, seed, seeds):
        *few, most = _samples(grid, problem, samples)
        wanted = [
            *((True, most, method) for method in pretrained),
            *((False, most, method) for method in drawn),
            *((True, less, method) for less in few for method in fewer),
        ]
        found += [
            Setting(
                problem=problem.replace(pretrained=shipped, samples=size),
                method=_at(method, (rates or {}).get((method.kind, shipped), _first(grid, method))),
            )
            for shipped, size, method in dict.fromkeys(wanted)
        ]
    return found


def search(
    profile: str, tasks: Sequence[str], source: str, model: str, *, seed: int = 0
) -> list[Setting]:
    """Settings that try the profile's learning rates for each kind of method.

    Scores are taken on the validation set, which nothing else uses where there is a test set with
    labels; for the first task, one seed, and the least number of samples but one. Raises
    `InputError` for a profile that there is not.
    """
    grid = _grid(profile)
    (problem,) = _problems(grid, tasks[:1], source, model, seed, 1)
    methods: list[Method] = [Lora(rank=4), Final(), Full()]
    samples = _samples(grid, problem)[:2][-1]
    return [
        Setting(
            problem=problem.replace(pretrained=shipped, samples=samples, part="validation"),
            method=_at(method, rate),
        )
        for shipped in (True, False)
        for method in methods
        for rate in sorted(grid["rates"][method.kind])
    ]


def best_rates(table: pd.DataFrame) -> dict[tuple[str, bool], float]:
    """Of a table of runs of `search`: the learning rate with the best score; of two, the lower."""
    best = table.loc[table.groupby(["method", "pretrained"]).score.idxmax()]
    return {
        (kind, bool(shipped)): float(rate)
        for kind, shipped, rate in zip(
            best["method"], best["pretrained"], best["learning_rate"], strict=True
        )
    }


def _grid(profile: str) -> dict[str, Any]:
    if profile not in GRIDS:
        raise InputError("profile", allowed=" or ".join(GRIDS), given=repr(profile))
    return GRIDS[profile]


def _samples(grid: dict[str, Any], problem: Problem, most: int = 0) -> list[int]:
    """Numbers of samples, from least to ``most`` or the profile's; 0 for more than there are."""
    sizes = (
        [size for size in grid["samples"] if 0 < size < most] + [most] if most else grid["samples"]
    )
    there = len(sources.read(problem.task, problem.source, "train").labels)
    fewer = [size for size in sizes if 0 < size < there]
    return fewer if len(fewer) == len(sizes) else [*fewer, 0]


def _at(method: Method, rate: float) -> Method:
    return method.replace(learning_rate=rate)


def _first(grid: dict[str, Any], method: Method) -> float:
    rate: float = grid["rates"][method.kind][0]
    return rate


def _problems(
    grid: dict[str, Any], tasks: Sequence[str], source: str, model: str, seed: int, seeds: int
) -> list[Problem]:
    own = grid["problem"]
    return sweeps.grid(
        Problem,
        task=[*tasks],
        source=source,
        model=model,
        part=sources.held_out(source),
        **own | {"seed": range(seed, seed + (seeds or len(own["seed"])))},
    )
