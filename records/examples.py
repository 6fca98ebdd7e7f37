"""Adapters of the example's tuning, chosen in several ways and measured on held-out texts."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import records
from lorapower import checkpoints, lowrank
from lorapower.checkpoints import Adapter, Pair, Planner
from lorapower.experiments import sweeps
from lorapower.lowrank import LowRank
from records import neighbours, pairs

PROTOCOL = (
    "Tunings of an encoder on docstrings, each with other texts, and adapters that are planned "
    "with 120 texts and measured on 116 others."
)
#: Ways to spend as many parameters as one rank for all modules.
WAYS = ("same rank", "same share", "largest values", "by module", "by effect")
#: Which modules are as tuned, all others the base's; there are none of the kind ``none``.
HALVES = ("attention", "mlp", "none")
#: Errors for which the smallest adapter is looked for.
AIMS = (0.2, 0.05)
_RULES = {"same share": "peft, energy", "largest values": "PARA"}
# Fields that `Lost` shares with `Measured`.
_MEASURED = ("error", "agreement", "kl", "accuracy", "base_accuracy", "tuned_accuracy")
# The part of the way from the tuned to the adapted weights over which derivatives are taken.
_STEP = 0.05


class Example(sweeps.Record):
    """An example, and how many of its texts serve to plan; about as many others are held out."""

    seed: int = 0
    sentences: int = 120


class Adapted(sweeps.Record):
    """A way to an adapter, and the rank or the error that is ``asked``; 0 for neither."""

    problem: Example
    way: str
    asked: float = 0.0


class Lost(sweeps.Results):
    """What an adapter loses on held-out texts, with the names of `Measured`.

    An adapter by module loses ``chosen`` on the texts for choosing, where one ``derivative`` and a
    sum over modules (``apart``) predict it. ``kept`` is the share of the squared norm of the
    changes.
    """

    error: float
    agreement: float
    kl: float
    accuracy: float
    base_accuracy: float
    tuned_accuracy: float
    parameters: int
    ranks: tuple[int, ...]
    kept: float = math.nan
    chosen: float = math.nan
    derivative: float = math.nan
    apart: float = math.nan


class Prepared:
    """An example's plan, and ways to make adapters and to measure them."""

    def __init__(self, example: Example) -> None:
        """Pass the texts through both networks; embeddings are carried row by row."""
        folder, number = pairs.example(example.seed), example.sentences
        given = checkpoints.read_texts(folder / "texts.jsonl")
        pair = Pair.open(str(folder / "base"), str(folder / "tuned"))
        modules = f"^({'|'.join(map(re.escape, pair.modules))})$"
        self.planner = Planner(
            pair,
            given[:number],
            held_out=given[number : 2 * number],
            modules=modules,
            seed=example.seed,
        )
        self.pair, self.modules = self.planner.pair, self.planner.modules

    @functools.cached_property
    def changes(self) -> dict[str, lowrank.SVD]:
        """Decompose all changes."""
        return {name: lowrank.svd(self.pair.change(name)) for name in self.modules}

    @functools.cached_property
    def order(self) -> neighbours.Allocation:
        """Order the directions of all modules by gain for cost."""
        gains = {name: found.values for name, found in self.planner.weighted.items()}
        return neighbours.allocate(gains, self.modules)

    def make(self, way: str, number: int) -> Adapter:
        """Make an adapter in one of the `WAYS` with at most so many parameters."""
        if way == "same rank":
            return self.planner.uniform(number)
        if way == "by effect":
            return self.planner.candidate(number)
        if way == "by module":
            weighted, taken = self.planner.weighted, self.order.ranks(number)
            return self.corrected({m: weighted[m].update.leading(r) for m, r in taken.items()})
        return neighbours.choose(_RULES[way], self.changes, self.modules, number)[1]

    def corrected(self, factors: dict[str, LowRank]) -> Adapter:
        """Add biases that make up on average for what factors lack."""
        biases = {}
        for name in (n for n, module in self.modules.items() if self.pair.frees_bias(module)):
            found, kept = self.planner.weighted[name], torch.zeros(())
            if name in factors:
                kept = factors[name].left @ (factors[name].right.mT @ found.mean.float())
            tuned = self.pair.tuned.read(f"{name}.bias")
            biases[name] = (tuned + found.shift - kept).float()
        return Adapter(factors, biases)

    def predict(self, adapter: Adapter) -> dict[str, float]:
        """Predict what an adapter by module loses on the texts for choosing, and measure it."""
        planner, network = self.planner, self.planner.network
        planner.put(adapter)
        adapted = {name: value.clone() for name, value in network.state_dict().items()}
        self.pair.fill(network, "tuned")
        tuned = {name: value.clone() for name, value in network.state_dict().items()}
        ends = []
        for step in (_STEP, -_STEP):
            network.load_state_dict({n: v.lerp(adapted[n], step) for n, v in tuned.items()})
            with torch.no_grad():
                rows = [planner.readout.states(network, one) for one in planner.select.batches]
            ends.append(planner.readout.rows(torch.cat(rows)))
        moved = float((ends[0] - ends[1]).square().sum()) / (2 * _STEP) ** 2
        # Metrics are means over tokens, and errors are sums over those of a text.
        fit = planner.texts.fit
        texts = sum(len(batch.input_ids) for batch in fit)
        tokens = sum(int(batch.attention_mask.sum()) for batch in fit) / texts
        apart = 0.0
        for name, found in planner.weighted.items():
            gained = float(found.values[: adapter.ranks.get(name, 0)].double().square().sum())
            once = self.modules[name].kind == "other"
            apart += (found.total - gained) * (1 if once else tokens)
        effect = planner.select.effect
        return {
            "derivative": math.sqrt(moved / effect.sum()),
            "apart": math.sqrt(max(apart, 0.0) / effect.mean()),
            "chosen": planner.error(adapter),
        }

    def kept(self, rank: int) -> float:
        """Compute the share of the squared norm of all changes that one rank keeps."""
        squares = torch.stack(
            [change.S.square().cumsum(0)[[rank - 1, -1]] for change in self.changes.values()]
        )
        part, whole = squares.sum(0).tolist()
        return part / whole


@functools.lru_cache(maxsize=1)
def prepare(example: Example) -> Prepared:
    """Prepare an example once for all its adapters."""
    return Prepared(example)


def measure(settings: list[Adapted]) -> list[Lost]:
    """Make adapters of one example and measure them."""
    return [_measure(prepare(setting.problem), setting) for setting in settings]


def _measure(example: Prepared, setting: Adapted) -> Lost:
    way, planner = setting.way, example.planner
    more: dict[str, float] = {}
    if way in HALVES:
        adapter = Adapter({}, {})
        planner.only(way)
    elif way == "least":
        adapter = planner.smallest(setting.asked)
        planner.put(adapter)
    else:
        number = planner.parameters(int(setting.asked))
        adapter = example.make(way, number)
        if way == "by module":
            more |= example.predict(adapter)
        if way == "same rank":
            more["kept"] = example.kept(int(setting.asked))
        planner.put(adapter)
    ranks = tuple(adapter.ranks.get(name, 0) for name in example.modules)
    found = planner.test.summarize(planner.test.compare(planner.network))
    more |= {name: getattr(found, name) for name in _MEASURED}
    return Lost(parameters=adapter.parameters, ranks=ranks, **more)


def sweep(settings: list[Adapted], results: Path | None, profile: str) -> pd.DataFrame:
    """Give the runs of a page."""
    # One without factors and one with; those that need derivatives take long.
    ways = [setting.way for setting in settings]
    repeat = [ways.index(way) for way in ("attention", "same share") if way in ways]
    return records.sweep(
        "planning-tunings",
        settings,
        measure,
        results,
        profile,
        protocol=PROTOCOL,
        repeat=repeat if pairs.is_recorded(0) else (),
    )


def every(seeds: int, ranks: Sequence[int], sentences: int = 120) -> list[Adapted]:
    """List all that is compared of the examples of so many seeds, at the sizes of some ranks."""
    asked = [*map(float, ranks)]
    settings = []
    for problem in sweeps.grid(Example, seed=range(seeds), sentences=sentences):
        settings += sweeps.grid(Adapted, problem=problem, way=[*HALVES])
        settings += sweeps.grid(Adapted, problem=problem, way=[*WAYS], asked=asked)
        settings += sweeps.grid(Adapted, problem=problem, way="least", asked=[*AIMS])
    return settings
