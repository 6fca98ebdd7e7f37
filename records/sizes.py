"""Compare adapters of equal size that were trained, extracted, shrunk, and cut.

All but one way are nothing but factors of the blocks' linear layers: embeddings and norms stay the
base's. The trained networks are those of ``"decoder"``, at the rates that were chosen first; they
are made if they are missing, and kept in the folder ``tuned``.
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.typing import ArrayLike
from pydantic import Field

import records
from lorapower.checkpoints import Pair, Planner, _export
from lorapower.checkpoints.pair import KINDS
from lorapower.experiments import sweeps
from records import language, models, pack, pairs, plans, tables

BASE = models.LANGUAGE
HIGHEST = 64
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
def trained(seed: int, way: str, rank: int = 0) -> language.TextRun:
    """Find the training of a network among those recorded, at the rate that was used first."""
    runs = pd.concat([records.read("rates"), records.read("decoder")])
    runs = runs.query("task == 'movies-next' and part == 'test' and samples == 2000")
    targets = "all" if way == "trained" else way
    of_way = runs.targets.eq(targets) & runs["rank"].eq(rank) if rank else runs.method.eq(way)
    setting = tables.settings(runs[of_way & runs.seed.eq(seed)][:1], language.TextRun)[0]
    return setting.replace(problem=setting.problem.replace(model=BASE))


def place(seed: int, way: str, rank: int = 0) -> Path:
    """Name the folder of a trained network."""
    return Path("tuned", f"{seed}-{way.replace(' ', '-')}-{rank}")


def folder_of(seed: int, way: str, rank: int = 0) -> Path:
    """Find the folder of a trained network, which is made if it is missing."""
    folder = place(seed, way, rank)
    if not folder.exists():
        language.tune(trained(seed, way, rank), lambda network: models.save(network, BASE, folder))
    return folder


@functools.lru_cache(maxsize=2)
def plan(seed: int, source: str) -> Planner:
    """Plan for full tuning, or the adapter of the highest rank, on the same texts for all."""
    way, rank = ("trained", HIGHEST) if source == "trained" else ("full", 0)
    limits: dict[str, Any] = {"modules": plans.BLOCKS, "leave": KINDS} if source != "whole" else {}
    return Planner(
        Pair.open(BASE, str(folder_of(seed, way, rank))),
        pairs.texts("movies", "validation")[: plans.PLANNING],
        held_out=pairs.texts("movies", "test"),
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
        another = folder_of((seed + 1) % 8, "full")  # of eight seeds
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
    numbers["losses"] = language.answer(network, trained(setting.seed, "full").problem)
    packed = {key: pack(values) for key, values in numbers.items()}
    return [SizedResults(parameters=parameters, seconds=seconds, **packed)]
