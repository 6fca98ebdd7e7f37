"""Which runs of language models are compared, and how sure a difference of their scores is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from lorapower.errors import InputError
from lorapower.experiments import sweeps

from . import language, texts
from .language import Lora, Method, Problem, Setting, Targets, Whole

#: For each profile of the encoder's chapter, and for the decoder's: what all runs share; ranks, and
#: the widest, for models whose layers can have it; the layers that are compared at equal numbers,
#: for the highest rank on all or the one named; what is tuned without adapters; whether random
#: weights are adapted too; numbers of training samples, 0 for all; learning rates by kind of
#: method, or layers, and rank, the default first; and how `search` tries them.
GRIDS: dict[str, dict[str, Any]] = {
    "quick": {
        "problem": {"epochs": 1, "batch": 16, "tokens": 48, "seed": range(1)},
        "ranks": [1, 8],
        "parts": ["attention", "feed-forward"],
        "whole": ["final", "full", "head"],
        "random": True,
        "samples": [640],
        "search": {"epochs": 1, "samples": 640},
        "rates": {
            "lora": {1: [4e-3], 8: [2e-3]},
            "final": {0: [1e-3]},
            "full": {0: [2e-4]},
            "head": {0: [1e-2]},
        },
    },
    "paper": {
        "problem": {"epochs": 1, "batch": 16, "tokens": 64, "seed": range(3)},
        "ranks": [1, 2, 4, 8],
        "parts": ["attention", "feed-forward"],
        "whole": ["final", "full", "head"],
        "random": True,
        "samples": [1000, 2000, 4000, 0],
        "search": {"epochs": 3, "samples": 1000},
        "rates": {
            "lora": {1: [2e-3, 1e-3, 4e-3], 8: [1e-3, 5e-4, 2e-3]},
            "final": {0: [1e-3, 3e-4, 3e-3]},
            "full": {0: [1e-4, 5e-5, 2e-4]},
            "head": {0: [1e-2, 3e-3, 3e-2]},
        },
    },
    "decoder": {
        "problem": {
            **{"epochs": 1, "batch": 16, "tokens": 64, "seed": range(3)},
            **{"head": "own", "bfloat16": True},
        },
        "ranks": [1, 2, 4, 8, 16, 64],
        "widest": 192,
        "parts": ["attention", "feed-forward", "queries and keys"],
        "equal": 4,
        "whole": ["full", "linear", "head"],
        "random": False,
        "samples": [160, 2000],
        "search": {"samples": 1000},
        "rates": {
            "lora": {
                1: [8e-3, 1e-3, 2e-3, 4e-3, 1.6e-2],
                64: [2e-3, 2.5e-4, 5e-4, 1e-3, 4e-3],
                192: [1e-3, 5e-4, 2e-3],
            },
            **{part: {0: [4e-3, 1e-3, 2e-3, 8e-3]} for part in ("attention", "feed-forward")},
            "queries and keys": {0: [8e-3, 1e-3, 2e-3, 4e-3]},
            "full": {0: [2e-4, 5e-5, 1e-4, 4e-4]},
            "linear": {0: [4e-4, 1e-4, 2e-4, 8e-4]},
            "head": {0: [1e-2, 3e-3, 3e-2]},
        },
    },
}
# Made by records/record.py, records/tune.py and records/before.py.
_RECORDS = ("movies", "decoder", "encoder", "before")
#: Learning rates by kind of method, or its layers, and whether weights are pretrained, then by rank
#: (0 for none). `compare` interpolates between ranks.
Rates = Mapping[tuple[str, bool], Mapping[int, float]]


def compare(
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

    From pretrained weights and the most samples: adapters of each rank on all linear layers; on
    attention and on feed-forward layers, of the rank with as many numbers as the highest on all
    (`language.equal_ranks`), in paper also of each rank; the last layer; all weights; the head
    alone. From random weights: the highest rank on all layers, in paper each, the last layer and
    all weights. With fewer samples: the lowest and the highest rank on all layers, and all weights.

    Of a decoder the last layer and random weights are left out; queries and keys alone, all linear
    layers in full and, without ``ranks``, a rank of 192 are there; equal numbers are those of rank
    4; ``head`` is the base itself where next tokens are told.

    ``seeds`` counts seeds from ``seed`` on; ``samples`` are the most. Defaults are the profile's;
    `best_rates` finds other learning rates.
    """
    grid = GRIDS[profile]
    chosen = sorted(ranks or grid["ranks"])
    whole = profile == "paper"
    problems = _problems(grid, tasks, source, model, seed, seeds)
    equal = _equal(grid, problems[0], chosen[-1])
    everywhere = [Lora(rank=rank) for rank in chosen]
    full = Whole(kind="full")
    fewer: list[Method] = [everywhere[0], everywhere[-1], full]
    pretrained: list[Method] = [
        *everywhere,
        *(Lora(rank=rank) for rank in _widest(grid, problems[0]) if not ranks),
        *(Lora(targets=targets, rank=rank) for targets, rank in equal.items()),
        *(Lora(targets=targets, rank=rank) for targets in equal for rank in chosen if whole),
        *(Whole(kind=kind) for kind in grid["whole"]),
    ]
    drawn: list[Method] = [*everywhere, Whole(kind="final"), full] if whole else [everywhere[-1]]
    drawn = drawn if grid["random"] else []
    default = {
        way: {rank: tried[0] for rank, tried in by_rank.items()}
        for way, by_rank in grid["rates"].items()
    }
    settings = []
    for problem in problems:
        *few, most = _samples(grid["samples"], problem, samples)
        runs = [
            *((True, most, method) for method in pretrained),
            *((False, most, method) for method in drawn),
            *((True, less, method) for less in few for method in fewer),
        ]
        for shipped, size, method in dict.fromkeys(runs):
            way = getattr(method, "targets", "all")
            way = way if way in default else method.kind
            by_rank = (rates or {}).get((way, shipped), default[way])
            tuned = method.replace(learning_rate=_rate(by_rank, method.rank))
            place = problem.replace(pretrained=shipped, samples=size)
            settings.append(Setting(problem=place, method=tuned))
    return settings


def search(
    profile: str, tasks: Sequence[str], source: str, model: str, *, seed: int = 0
) -> list[Setting]:
    """Settings that try the profile's learning rates for each kind of method.

    They have the first task, one seed and few samples, but about as many steps as most runs (half
    as many for a decoder). Scores are on the validation set, not used otherwise if the test set has
    labels.
    """
    grid = GRIDS[profile]
    (problem,) = _problems(grid, tasks[:1], source, model, seed, 1)
    (size,) = _fewer([grid["search"]["samples"]], problem) or (0,)
    problem = problem.replace(**grid["search"] | {"samples": size}, part="validation")
    equal = _equal(grid, problem, grid["ranks"][-1])
    left_out = {grid.get("widest")} - {*_widest(grid, problem)}
    methods: list[Method] = []
    for way, by_rank in grid["rates"].items():
        if way == "head" and texts.find(problem.task).next_tokens:
            continue
        for rank, rates in by_rank.items():
            if rank in left_out:
                continue
            one: Method = Whole(kind=way) if way in grid["whole"] else Lora(rank=max(rank, 1))
            if way in equal:
                one = Lora(targets=way, rank=equal[way])
            methods += [one.replace(learning_rate=tried) for tried in sorted(rates)]
    shipped = [True, False][: 1 + grid["random"]]
    problems = [problem.replace(pretrained=each) for each in shipped]
    return sweeps.grid(Setting, problem=problems, method=methods)


def best_rates(table: pd.DataFrame) -> dict[tuple[str, bool], dict[int, float]]:
    """`Rates` with the best scores in a table of `search`; of equal scores, the lowest rate."""
    everywhere = table.targets.isna() | (table.targets == "all")
    ranked = table.assign(
        rank=table["rank"].fillna(0).astype(int),
        method=table.method.where(everywhere, table.targets),
    )
    ranked = ranked.sort_values(["score", "learning_rate"], ascending=[False, True])
    keys = ["method", "pretrained", "rank"]
    best = ranked.drop_duplicates(keys)[[*keys, "learning_rate"]]
    rates: dict[tuple[str, bool], dict[int, float]] = {}
    for kind, shipped, rank, value in best.itertuples(index=False):
        rates.setdefault((kind, bool(shipped)), {})[int(rank)] = float(value)
    return rates


def read_record(name: str) -> pd.DataFrame:
    """What was done once: a table as `sweeps.run` makes it.

    ``"movies"`` are those of profile paper on this task with the packaged encoder, ``"encoder"``
    adapters on all layers and all weights on tweets and products with fewer texts, ``"decoder"``
    those of this profile. Rows with ``part`` ``"validation"`` are of `search`, the others of
    `compare`, all on one thread.

    ``"before"`` has, for six tasks and models, what can be known of a ``rank`` without training at
    it. ``share`` and ``gain`` are of the mean gradients ``G`` and ``G'`` of two halves of 400 texts
    at the base, and the best approximations ``G_R`` of rank R, module by module:
    ``⟨G_R, G'⟩ / ⟨G, G'⟩`` and ``(2⟨G_R, G'⟩ - ‖G_R‖²) / ⟨G, G'⟩``, with sums over modules and both
    orders. ``error`` is what ten steps at rank 64 lose of their effect on logits if each product of
    factors is cut to this rank. Raises `InputError` for other names.
    """
    if name not in _RECORDS:
        raise InputError("name", allowed=f"one of {', '.join(_RECORDS)}", given=repr(name))
    table = pd.read_csv(Path(__file__).parent / f"{name}.csv.gz")
    return table.fillna({"changes": "", "revision": ""})


def _rate(by_rank: Mapping[int, float], rank: int) -> float:
    """The learning rate of a rank, on a logarithmic scale by those of the two ranks next to it."""
    ranks = sorted(by_rank)
    if len(ranks) == 1:
        return by_rank[ranks[0]]
    at = min(max(1, int(np.searchsorted(ranks, rank))), len(ranks) - 1)
    low, high = ranks[at - 1 : at + 1]
    part = math.log(rank / low) / math.log(high / low)
    return by_rank[low] ** (1 - part) * by_rank[high] ** part


def _samples(sizes: Sequence[int], problem: Problem, most: int) -> list[int]:
    """Numbers of samples, from least to ``most`` or the last; 0 for more than there are."""
    if most:
        sizes = [*(size for size in sizes if 0 < size < most), most]
    fewer = _fewer(sizes, problem)
    return fewer if len(fewer) == len(sizes) else [*fewer, 0]


def _fewer(sizes: Sequence[int], problem: Problem) -> list[int]:
    """The sizes that are below the number of all samples."""
    there = len(texts.read(problem.task, problem.source, "train").labels)
    return [size for size in sizes if 0 < size < there]


def _problems(
    grid: dict[str, Any], tasks: Sequence[str], source: str, model: str, seed: int, seeds: int
) -> list[Problem]:
    seeds = seeds or len(grid["problem"]["seed"])
    part = "test" if source in texts.SCORED else "validation"
    shared = {"part": part, "head": "mean" if source == texts.RATED else "own"}
    shared |= grid["problem"] | {"seed": range(seed, seed + seeds)}
    return sweeps.grid(Problem, task=[*tasks], source=source, model=model, **shared)


def _equal(grid: dict[str, Any], problem: Problem, highest: int) -> dict[Targets, int]:
    """The ranks of parts of the layers with as many numbers as one on all."""
    rank = grid.get("equal", highest)
    return language.equal_ranks(problem.model, rank, problem.head, grid["parts"])


def _widest(grid: dict[str, Any], problem: Problem) -> list[int]:
    """The rank beyond the others, if the grid has one and all layers can have it."""
    if "widest" not in grid:
        return []
    rank = grid["widest"]
    most = language.equal_ranks(problem.model, rank, problem.head, ["all"])["all"]
    return [rank] if most == rank else []


def contributions(runs: pd.DataFrame) -> NDArray[np.float64]:
    """What texts add to the score, ``[seeds, texts]``, see ``texts.Task.contributions``.

    ``runs`` are rows of one task and method in a table of `sweeps.run`, one for each seed.
    """
    task, source, part = runs[["task", "source", "part"]].iloc[0]
    about, labels = texts.find(task), texts.read(task, source, part).labels
    given = map(language.answers, runs.sort_values("seed").answers)
    return np.array([about.contributions(answers, labels) for answers in given])


#: The share of intervals that hold the mean.
LEVEL = 0.95


class _Interval(NamedTuple):
    mean: float
    error: float
    low: float
    high: float


def interval(values: ArrayLike) -> _Interval:
    """The ``mean`` of values, its standard ``error``, and the limits ``low, high`` of its interval.

    The interval holds the mean over other seeds and texts in 95% of cases. Of ``values``
    ``[seeds, texts]``, each is what a text contributes to a score
    (``texts.Task.contributions``), or, to compare two methods, the difference of theirs. The
    variance of the mean is ``s²_texts/texts + s²_seeds/seeds``, with the variances of the means
    over seeds and over texts; limits are Student's with Satterthwaite's degrees of freedom. With
    one seed the second part is missing: the interval is for these networks. Raises `InputError` for
    other shapes or one text.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise InputError("values", allowed="[seeds, at least two texts]", given=table.shape)
    from scipy import stats

    seeds, texts = table.shape
    parts = [(table.mean(0).var(ddof=1) / texts, texts - 1)]
    if seeds > 1:
        parts.append((table.mean(1).var(ddof=1) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    width = stats.t.ppf((1 + LEVEL) / 2, variance**2 / spread) if spread else 0.0
    mean, error = float(table.mean()), float(np.sqrt(variance))
    return _Interval(mean, error, mean - width * error, mean + width * error)
