"""Adapters of the example's tuning, chosen in several ways and measured on held-out texts."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import records
from lorapower import checkpoints, lowrank
from lorapower.checkpoints import Adapter, Pair, Planner
from lorapower.experiments import sweeps
from lorapower.lowrank import LowRank
from records import neighbours, pairs

PROTOCOL = (
    "Tunings of an encoder on docstrings, each with other texts, and adapters that are planned "
    "with 120 texts and measured on 120 others."
)
#: Ways to spend as many parameters as one rank for all modules.
WAYS = ("same rank", "same share", "largest values", "by module", "by effect")
#: What is varied of three of them, at the smallest size.
VARIED = (
    "same rank, multiplied",
    "same rank, biases corrected",
    "by module, multiplied",
    "by module, biases as tuned",
    "by effect, multipliers 1",
)
#: Which modules are as tuned, all others the base's; there are none of the kind ``none``.
HALVES = ("attention", "mlp", "none")
#: Errors for which the smallest adapter is looked for.
AIMS = (0.2, 0.05)
_RULES = {"same share": "peft, energy", "largest values": "PARA"}
# Common multipliers, of which the texts for choosing take the best.
_GAINS = np.linspace(0.8, 1.8, 6)
# The part of the way from the tuned to the adapted weights over which derivatives are taken.
_STEP = 0.05


class Example(sweeps.Record):
    """An example, and how many of its texts serve to plan; as many others are held out."""

    seed: int = 0
    sentences: int = 120


class Adapted(sweeps.Record):
    """A way to an adapter, and the rank or the error that is ``asked``; 0 for neither."""

    problem: Example
    way: str
    asked: float = 0.0


class Lost(sweeps.Results):
    """What an adapter loses, as parts of the effect.

    On held-out texts it loses ``along`` the effect and ``across`` it, and has an ``agreement`` of
    decisions. An adapter by module loses ``chosen`` on the texts for choosing, where one
    ``derivative`` and a sum over modules (``apart``) predict it. ``kept`` is the share of the
    squared norm of the changes, and ``gain`` a common multiplier.
    """

    along: float
    across: float
    parameters: int
    ranks: tuple[int, ...]
    agreement: float
    gain: float = math.nan
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
        self.pair.fill(self.planner.network, "tuned")
        self.tuned = self._outputs()
        self.pair.fill(self.planner.network, "base")
        self.effect = self.tuned - self._outputs()

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

    def vary(self, varied: str, number: int) -> tuple[Adapter, float]:
        """Make one of the `VARIED`, and find its common multiplier."""
        way, _, change = varied.partition(", ")
        adapter = self.make(way, number)
        if change == "multiplied":
            tried = {float(gain): _multiplied(adapter, gain) for gain in _GAINS}
            gain = min(tried, key=lambda gain: self.planner.error(tried[gain]))
            return tried[gain], gain
        if change == "multipliers 1":
            adapter = self.corrected(self._directions(adapter))
        elif change == "biases corrected":
            adapter = self.corrected(adapter.factors)
        else:
            adapter = Adapter(adapter.factors, {})
        return adapter, math.nan

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

    def _directions(self, adapter: Adapter) -> dict[str, LowRank]:
        """The directions that an adapter by effect keeps, without multipliers."""
        factors = {}
        for name, kept in adapter.factors.items():
            found = self.planner.weighted[name].update
            left, right = found.left.double(), found.right.double()
            products = (left.mT @ left) * (right.mT @ right)
            sides = left.mT @ kept.left.double(), right.mT @ kept.right.double()
            wanted = (sides[0] * sides[1]).sum(1, keepdim=True)
            solved = torch.linalg.lstsq(products, wanted, rcond=1e-8, driver="gelsd")[0]
            taken = solved[:, 0].abs() > 0.01
            factors[name] = LowRank(*(side[:, taken].float() for side in (left, right)))
        return factors

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        """Outputs on the held-out texts, with the weights that are in place."""
        planner = self.planner
        rows = [planner.readout.states(planner.network, one) for one in planner.test.batches]
        return planner.readout.rows(torch.cat(rows)).double()

    def measure(self) -> dict[str, float]:
        """Measure what the weights in place lose: the fields of `Lost` that all adapters have."""
        found = self._outputs()
        missed, whole = self.tuned - found, self.effect.square().sum()
        along = (missed * self.effect).sum() / whole
        across = (missed - along * self.effect).norm() / whole.sqrt()
        equal = found.argmax(-1) == self.tuned.argmax(-1)
        return {
            "along": float(along),
            "across": float(across),
            "agreement": float(equal.double().mean()),
        }

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
    way, planner, more = setting.way, example.planner, {}
    if way in HALVES:
        adapter = Adapter({}, {})
        planner.only(way)
    elif way == "least":
        adapter = planner.smallest(setting.asked)
        planner.put(adapter)
    else:
        number = planner.parameters(int(setting.asked))
        if way in VARIED:
            adapter, more["gain"] = example.vary(way, number)
        else:
            adapter = example.make(way, number)
        if way == "by module":
            more |= example.predict(adapter)
        if way == "same rank":
            more["kept"] = example.kept(int(setting.asked))
        planner.put(adapter)
    ranks = tuple(adapter.ranks.get(name, 0) for name in example.modules)
    return Lost(parameters=adapter.parameters, ranks=ranks, **example.measure(), **more)


def _multiplied(adapter: Adapter, gain: float) -> Adapter:
    """The adapter with one multiplier on all it keeps."""
    factors = {n: LowRank(gain * up.left, up.right) for n, up in adapter.factors.items()}
    return Adapter(factors, adapter.biases)


def sweep(settings: list[Adapted], results: Path | None, profile: str) -> pd.DataFrame:
    """Give the runs of a page, with the ``error`` that an adapter has on held-out texts."""
    # One without factors and one with; those that need derivatives take long.
    ways = [setting.way for setting in settings]
    repeat = [ways.index(way) for way in ("attention", "same share") if way in ways]
    table = records.sweep(
        "planning-tunings",
        settings,
        measure,
        results,
        profile,
        protocol=PROTOCOL,
        repeat=repeat if pairs.is_recorded(0) else (),
    )
    return table.assign(error=np.hypot(table.along, table.across))


def every(seeds: int, ranks: Sequence[int], sentences: int = 120) -> list[Adapted]:
    """List all that is compared of the examples of so many seeds, at the sizes of some ranks."""
    asked = [*map(float, ranks)]
    settings = []
    for problem in sweeps.grid(Example, seed=range(seeds), sentences=sentences):
        settings += sweeps.grid(Adapted, problem=problem, way=[*HALVES])
        settings += sweeps.grid(Adapted, problem=problem, way=[*WAYS], asked=asked)
        settings += sweeps.grid(Adapted, problem=problem, way=[*VARIED], asked=asked[:1])
        settings += sweeps.grid(Adapted, problem=problem, way="least", asked=[*AIMS])
    return settings
