"""Compare adapters of equal size that were trained, extracted, shrunk, and cut.

All are of the networks that `tune` keeps in a folder; all but one way are nothing but factors of
the blocks' linear layers: embeddings and norms stay the base's. Each one that is measured is kept
at once, so that the same command goes on after an interruption. Without seeds, all that are
recorded are measured, and put into the record::

    python -m records.sizes FOLDER [SEED ...]
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from pydantic import Field

from lorapower.checkpoints import Pair, Planner, _export
from lorapower.checkpoints.pair import KINDS
from lorapower.experiments import sweeps
from records import language, models, pack, pairs, plans, protocols, texts
from records.tables import begin, merge, put
from records.tune import KEPT, SEEDS, choose, place

BASE = models.LANGUAGE
HIGHEST = 64
RECORDED = [0, 3, 4]
# What is kept of a comparison of networks.
SUMS = ("squares", "equal", "divergence", "decisions")
# What an adapter is made from: full tuning, of blocks or of all, or the adapter of the highest
# rank; and how.
MADE = {
    "extracted": ("full", "effect"),
    "svd": ("full", "uniform"),
    "shrunk": ("trained", "effect"),
    "cut": ("trained", "uniform"),
    "cut by norm": ("trained", "peft, energy"),
    "extracted whole": ("whole", "effect"),
}


class SizedRun(sweeps.Record):
    """A network: a way to make it, and the uniform rank whose number of parameters is its limit."""

    seed: int = Field(0, ge=0)
    way: str
    rank: int = Field(0, ge=0)


class SizedResults(sweeps.Results):
    """What ``"sizes"`` of `records.read` says."""

    parameters: int
    seconds: float
    losses: str
    squares: str
    equal: str
    divergence: str
    decisions: str
    squares_64: str = ""
    equal_64: str = ""
    divergence_64: str = ""


@functools.cache
def trained(seed: int) -> dict[SizedRun, language.TextRun]:
    """Map settings here to those of `tune` for a seed."""
    compared = choose(protocols.compare("decoder", KEPT, texts.RATED, BASE, seed=seed, seeds=1))
    most = max(setting.problem.samples for setting in compared)
    names = {"head": "base", "lora": "trained"}
    found = {}
    for setting in compared:
        if setting.problem.samples == most:
            way = names.get(setting.method.way, setting.method.way)
            found[SizedRun(seed=seed, way=way, rank=setting.method.rank)] = setting
    return found


def every(seed: int) -> list[SizedRun]:
    """List all networks of a seed, those first that need no plan."""
    ranks = (*plans.RANKS, HIGHEST)
    given = (s for s in trained(seed) if s.way != "trained" or s.rank in ranks)
    made = (SizedRun(seed=seed, way=way, rank=rank) for way in MADE for rank in plans.RANKS)
    return [*given, SizedRun(seed=seed, way="blocks"), SizedRun(seed=seed, way="full again"), *made]


def folder_of(seed: int, way: str, rank: int = 0) -> Path:
    """Name the folder of a trained network."""
    return place(trained(seed)[SizedRun(seed=seed, way=way, rank=rank)])


@functools.lru_cache(maxsize=2)
def plan(seed: int, source: str) -> Planner:
    """Plan for full tuning, or the adapter of the highest rank, on the same texts for all."""
    way, rank = ("trained", HIGHEST) if source == "trained" else ("full", 0)
    limits: dict[str, Any] = {"modules": plans.BLOCKS, "leave": KINDS} if source != "whole" else {}
    kind = KEPT.removesuffix("-next")
    return Planner(
        Pair.open(BASE, str(folder_of(seed, way, rank))),
        pairs.texts(kind, "validation")[: plans.PLANNING],
        held_out=pairs.texts(kind, "test"),
        **limits,
    )


def make(setting: SizedRun, folder: Path) -> tuple[Any, int, float]:
    """Make a network; also count numbers that are not the base's, and seconds that it took."""
    seed, way = setting.seed, setting.way
    blocks = plan(seed, "full")
    if way in MADE:
        source, method = MADE[way]
        planner = plan(seed, source)
        pair = planner.pair
        beside = sum(other.size for other in pair.others if other.kind not in pair.leave)
        start = time.perf_counter()
        adapter = plans.make(planner, method, blocks.parameters(setting.rank) - beside)
        seconds = time.perf_counter() - start
        _export.save(folder, pair, pair.network(), adapter)
        return _export.load(folder, pair), adapter.parameters + beside, seconds
    if setting.rank:
        folder = folder_of(seed, way, setting.rank)
        return _export.load(folder, blocks.pair), _export.measure_peft(folder)[0], 0.0
    if way == "full again":
        another = folder_of((seed + 1) % SEEDS[KEPT], "full")
        network = Pair.open(BASE, str(another)).network()
    else:
        network = blocks.pair.network()
    if way.startswith("full"):
        return network, sum(values.numel() for values in network.parameters()), 0.0
    names = [f"{module}.weight" for module in blocks.modules if way == "blocks"]
    read = {key: functools.partial(blocks.pair.tuned.read, key) for key in names}
    blocks.pair.fill(network, "base", updates=read)
    return network, sum(network.get_parameter(key).numel() for key in names), 0.0


def work(settings: list[SizedRun]) -> list[SizedResults]:
    """Measure a network against full tuning, and that of the highest rank, and its losses."""
    (setting,) = settings
    with tempfile.TemporaryDirectory() as folder:
        network, parameters, seconds = make(setting, Path(folder))
    compared = plan(setting.seed, "full").test.compare(network)
    numbers: dict[str, ArrayLike] = {name: getattr(compared, name) for name in SUMS}
    if setting.way == "base" or MADE.get(setting.way, ("",))[0] == "trained":
        others = plan(setting.seed, "trained").test.compare(network)
        numbers |= {f"{name}_64": getattr(others, name) for name in SUMS[:-1]}
    problem = next(iter(trained(setting.seed).values())).problem
    numbers["losses"] = language.answer(network, problem)
    packed = {key: pack(values) for key, values in numbers.items()}
    return [SizedResults(parameters=parameters, seconds=seconds, **packed)]


if __name__ == "__main__":
    chosen = [*map(int, begin())]
    asked = [setting for seed in chosen or RECORDED for setting in every(seed)]
    sweeps.run(asked, work, "sizes.sqlite", size=1)
    if not chosen:
        put(merge(["sizes.sqlite"], SizedRun), "sizes")
