"""Adapters of the example's tuning, chosen in several ways and measured on held-out texts."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

import pandas as pd
import torch

import loraplan
import records
from loraplan import Adapter, Pair, Planner, lab
from loraplan.lab import LowRank, Rows, count_tokens, measure_networks, stream
from lorapower import lowrank, regression
from records import Results, Values, grid, neighbours, pairs

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


class Example(Values):
    """An example, and how many of its texts serve to plan; about as many others are held out."""

    seed: int = 0
    sentences: int = 120


class Adapted(Values):
    """A way to an adapter, and the rank or the error that is ``asked``; 0 for neither."""

    problem: Example
    way: str
    asked: float = 0.0


class Lost(Results):
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
        given = loraplan.read_texts(folder / "texts.jsonl")
        pair = Pair.open(str(folder / "base"), str(folder / "tuned"))
        modules = f"^({'|'.join(map(re.escape, pair.modules))})$"
        self.planner = Planner(
            pair,
            given[:number],
            held_out=given[number : 2 * number],
            modules=modules,
            carry="all",
        )
        self.pair, self.modules = self.planner.pair, self.planner.modules

    @functools.cached_property
    def changes(self) -> dict[str, lowrank.SVD]:
        """Decompose all changes."""
        return {name: lowrank.svd(self.pair.change(name)) for name in self.modules}

    def make(self, way: str, number: int) -> Adapter:
        """Make an adapter in one of the `WAYS` with at most so many parameters."""
        if way == "same rank":
            return self.planner.uniform(number)
        if way == "by effect":
            return self.planner.candidate(number)
        if way == "by module":
            weighted = self.planner.weighted
            gains = {name: found.values for name, found in weighted.items()}
            ranks = neighbours.allocate(gains, self.modules).ranks(number)
            best = {n: each.update.leading(ranks.get(n, 0)) for n, each in weighted.items()}
            biases = {
                name: self.pair.tuned.read(f"{name}.bias")
                + (each.shift - best[name].left @ (best[name].right.mT @ each.mean))
                for name, each in weighted.items()
                if self.planner.frees_bias(self.modules[name])
            }
            return Adapter({name: best[name] for name in ranks}, biases)
        return neighbours.choose(_RULES[way], self.changes, self.modules, number)[1]

    def predict(self, adapter: Adapter) -> dict[str, float]:
        """Predict what an adapter by module loses on the texts for choosing, and measure it."""
        planner, tuned = self.planner, self.pair.reader("tuned")
        adapted = self.pair.reader(adapter)

        def read(step: float, name: str, rows: Rows = None) -> torch.Tensor:
            return tuned(name, rows).lerp(adapted(name, rows), step)

        readers = (functools.partial(read, step) for step in (_STEP, -_STEP))
        networks = (stream(self.pair, "tuned", planner.device, read=each) for each in readers)
        one, other = measure_networks([(network, planner.select) for network in networks])
        moved = torch.cat(one.states) - torch.cat(other.states)
        derivative = float(moved.square().sum()) / (2 * _STEP) ** 2
        # Metrics are means over tokens, and errors are sums over those of a text.
        fit, apart = planner.texts.fit, 0.0
        tokens = count_tokens(fit) / sum(len(batch.input_ids) for batch in fit)
        for name, known in lab.moments(planner, self.modules).items():
            inputs = known.inputs - planner.weighted[name].mean
            Z, R = (
                regression.second_moment_root(rows.mT, known.ridge)
                for rows in (inputs, known.outputs)
            )
            missing = tuned(f"{name}.weight") - adapted(f"{name}.weight")
            once = self.modules[name].kind == "other"
            apart += float((R @ missing @ Z.mT).square().sum()) * (1 if once else tokens)
        effect = planner.select.effect
        return {
            "derivative": math.sqrt(derivative / effect.sum()),
            "apart": math.sqrt(apart / effect.mean()),
            "chosen": planner.error(adapter),
        }

    def measure(self, way: str, asked: float) -> Lost:
        """Make an adapter and measure it."""
        planner, adapter = self.planner, Adapter({}, {})
        more: dict[str, float] = {}
        if way == "least":
            adapter = planner.smallest(asked)
        elif way in WAYS:
            adapter = self.make(way, planner.parameters(int(asked)))
        if way == "by module":
            more |= self.predict(adapter)
        if way == "same rank":
            squares = [change.S.square() for change in self.changes.values()]
            kept = torch.cat([each[: int(asked)] for each in squares])
            more["kept"] = float(kept.sum() / torch.cat(squares).sum())
        # Of a half the whole changes, as no factors of the adapter.
        names = [name for name, module in self.modules.items() if module.kind == way]
        changes = {name: self.pair.change(name) for name in names}
        halves = {name: LowRank(E, torch.eye(E.shape[1])) for name, E in changes.items()}
        found = lab.measure(planner, Adapter(adapter.factors | halves, adapter.biases))
        more |= {name: getattr(found, name) for name in _MEASURED}
        ranks = tuple(adapter.ranks.get(name, 0) for name in self.modules)
        return Lost(parameters=adapter.parameters, ranks=ranks, **more)


@functools.lru_cache(maxsize=1)
def prepare(example: Example) -> Prepared:
    """Prepare an example once for all its adapters."""
    return Prepared(example)


def measure(settings: list[Adapted]) -> list[Lost]:
    """Make adapters of one example and measure them."""
    return [prepare(setting.problem).measure(setting.way, setting.asked) for setting in settings]


def sweep(settings: list[Adapted], profile: str) -> pd.DataFrame:
    """Give the runs of a page."""
    # One without factors and one with; those that need derivatives take long.
    ways = [setting.way for setting in settings]
    repeat = [ways.index(way) for way in ("attention", "same share") if way in ways]
    return records.sweep(
        "planning-tunings",
        settings,
        measure,
        profile,
        protocol=PROTOCOL,
        repeat=repeat if pairs.is_recorded(0) else (),
    )


def every(seeds: int, ranks: Sequence[int], sentences: int = 120) -> list[Adapted]:
    """List all that is compared of the examples of so many seeds, at the sizes of some ranks."""
    asked = [*map(float, ranks)]
    settings = []
    for problem in grid(Example, seed=range(seeds), sentences=sentences):
        settings += grid(Adapted, problem=problem, way=[*HALVES])
        settings += grid(Adapted, problem=problem, way=[*WAYS], asked=asked)
        settings += grid(Adapted, problem=problem, way="least", asked=[*AIMS])
    return settings
