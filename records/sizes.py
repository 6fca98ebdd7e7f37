"""Compare adapters of equal size that were trained, extracted, shrunk, and cut.

All are of the networks that `records/tune.py` keeps in a folder; all but one way are nothing but
factors of the blocks' linear layers: embeddings and norms stay the base's. Each one that is
measured is written at once, so that the same command goes on after an interruption. When all are
there, they are put into the package, for `checkpoints.read_sizes`::

    python -m records.sizes FOLDER [SEED ...]
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from pydantic import Field

import records as _record
from lorapower._records import pack
from lorapower.checkpoints import Pair, Planner, _export
from lorapower.checkpoints import _models as hub
from lorapower.checkpoints import _peft_files as _files
from lorapower.checkpoints.pair import KINDS
from lorapower.experiments import sweeps
from records import language, pairs, plans, protocols, texts
from records.record import record
from records.tune import KEPT, SEEDS, choose, name

BASE = hub.LANGUAGE
HIGHEST = 64
# What an adapter is made from: full tuning, of blocks or of all, or the adapter of the highest
# rank; and how.
MADE = {
    "extracted": ("full", "effect"),
    "svd": ("full", "uniform"),
    "shrunk": ("trained", "effect"),
    "cut": ("trained", "uniform"),
    "cut by norm": ("trained", "energy"),
    "extracted whole": ("whole", "effect"),
}
_FOLDER: list[Path] = []


class Setting(sweeps.Record):
    """A network: a way to make it, and the uniform rank whose number of parameters is its limit."""

    seed: int = Field(0, ge=0)
    way: str
    rank: int = Field(0, ge=0)


class Found(sweeps.Results):
    """What `checkpoints.read_sizes` reads."""

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
def trained(seed: int) -> dict[Setting, language.Setting]:
    """The settings of `records/tune.py` for a seed, by those here."""
    compared = choose(protocols.compare("decoder", [KEPT], texts.RATED, BASE, seed=seed, seeds=1))
    most = max(setting.problem.samples for setting in compared)
    found = {}
    for setting in compared:
        if setting.problem.samples < most:
            continue
        method = setting.method
        way = {"head": "base"}.get(method.kind, method.kind)
        if method.kind == "lora":
            way = "trained" if method.targets == "all" else method.targets
        found[Setting(seed=seed, way=way, rank=method.rank)] = setting
    return found


def every(seed: int) -> list[Setting]:
    """All networks of a seed, those first that need no plan."""
    ranks = (*plans.RANKS, HIGHEST)
    given = (s for s in trained(seed) if s.way != "trained" or s.rank in ranks)
    made = (Setting(seed=seed, way=way, rank=rank) for way in MADE for rank in plans.RANKS)
    return [*given, Setting(seed=seed, way="blocks"), Setting(seed=seed, way="full again"), *made]


def place(setting: Setting) -> Path:
    """The folder of a trained network."""
    return _FOLDER[0] / "tuned" / name(trained(setting.seed)[setting])


def another(seed: int) -> Path:
    """The folder of full tuning with another seed."""
    return place(Setting(seed=(seed + 1) % SEEDS[KEPT], way="full"))


@functools.lru_cache(maxsize=2)
def plan(seed: int, source: str) -> Planner:
    """A plan for full tuning, or the adapter of the highest rank, on the same texts for all."""
    way, rank = ("trained", HIGHEST) if source == "trained" else ("full", 0)
    tuned = Setting(seed=seed, way=way, rank=rank)
    limits: dict[str, Any] = {"modules": plans.BLOCKS, "leave": KINDS} if source != "whole" else {}
    kind = KEPT.removesuffix("-next")
    return Planner(
        Pair.open(BASE, str(place(tuned))),
        pairs.texts(kind, "validation")[: plans.PLANNING],
        held_out=pairs.texts(kind, "test"),
        **limits,
    )


def make(setting: Setting, folder: Path) -> tuple[Any, int, float]:
    """A network, how many numbers it has that are not the base's, and seconds that it took."""
    blocks = plan(setting.seed, "full")
    if setting.way in MADE:
        source, method = MADE[setting.way]
        planner = plan(setting.seed, source)
        pair = planner.pair
        beside = sum(other.size for other in pair.others if other.kind not in pair.leave)
        start = time.perf_counter()
        adapter = planner.candidate(method, blocks.parameters(setting.rank) - beside)
        seconds = time.perf_counter() - start
        _export.save(folder, pair, pair.network(), adapter)
        return _export.load(folder, pair), adapter.parameters + beside, seconds
    if setting.rank:
        folder = place(setting)
        return _export.load(folder, blocks.pair), _files.measure_peft(folder)[0], 0.0
    again = setting.way == "full again"
    pair = Pair.open(BASE, str(another(setting.seed))) if again else blocks.pair
    network = pair.network()
    if setting.way.startswith("full"):
        return network, sum(values.numel() for values in network.parameters()), 0.0
    names = [f"{module}.weight" for module in blocks.modules if setting.way == "blocks"]
    read = {key: functools.partial(pair.tuned.read, key) for key in names}
    pair.fill(network, "base", updates=read)
    return network, sum(network.get_parameter(key).numel() for key in names), 0.0


def work(settings: list[Setting]) -> list[Found]:
    """Measure a network against full tuning, and that of the highest rank, and its losses."""
    (setting,) = settings
    with tempfile.TemporaryDirectory() as folder:
        network, parameters, seconds = make(setting, Path(folder))
    numbers: dict[str, ArrayLike] = plan(setting.seed, "full").test.compare(network)._asdict()
    if setting.way == "base" or MADE.get(setting.way, ("",))[0] == "trained":
        others = plan(setting.seed, "trained").test.compare(network)._asdict()
        del others["decisions"]
        numbers |= {f"{key}_64": values for key, values in others.items()}
    problem = next(iter(trained(setting.seed).values())).problem
    numbers["losses"] = language.answer(network, problem)
    texts = {key: pack(values) for key, values in numbers.items()}
    return [Found(parameters=parameters, seconds=seconds, **texts)]


def run(folder: Path, seeds: list[int]) -> Path:
    """Measure all networks of these seeds; the file that has them."""
    _FOLDER[:] = [folder]
    torch.set_num_threads(1)
    file = folder / "sizes.sqlite"
    sweeps.run([setting for seed in seeds for setting in every(seed)], work, file, size=1)
    return file


if __name__ == "__main__":
    out, *chosen = sys.argv[1:]
    done = run(Path(out), [*map(int, chosen)] or [0, 3, 4])
    record([done], Path(__file__).parent / _record.SIZES, Setting)
