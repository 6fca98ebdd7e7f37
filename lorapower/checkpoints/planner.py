"""A pair and its texts, prepared: candidates for any number of parameters, and their errors."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import _checks, randomness
from ..errors import InputError
from ..lowrank import LowRank
from . import _repair, metrics
from ._effect import (
    INTENSITIES,
    Choice,
    Pool,
    predict,
    sketch,
)
from ._measuring import (
    TOKENS,
    Measured,
    Readout,
    Reference,
    Texts,
    free_memory,
    prepare,
    ratio,
    scratch_folder,
    watch,
)
from .metrics import Directions, Metric, Moments
from .pair import KINDS, Adapter, Module, Pair

if TYPE_CHECKING:
    import pandas as pd

#: Ways to choose ranks, and the metric in which their factors are best. ``effect``: directions and
#: their gains in function space (`Planner.candidate`); ``uniform``: one rank for all, at least 1;
#: ``energy``: the least ranks that keep an equal share of each ``‖ΔW‖²``, at least 1, as
#: ``peft.convert_to_lora`` has them; ``inputs``: by the variance of inputs, as EVA has them before
#: training (Paischer et al., 2024); the others: by gain for cost (`metrics.allocate`).
METHODS: dict[str, Metric] = {
    "effect": "plain",
    "uniform": "plain",
    "energy": "plain",
    "inputs": "plain",
    "plain": "plain",
    "input metric": "input",
    "two metrics": "both",
}
# Methods whose ranks are those of an allocation by gain for cost.
ALLOCATED = ("plain", "input metric", "two metrics")
#: Methods that are tried for the smallest adapter.
PATHS = ("effect", "plain")
#: Steps of repair by gradient.
STEPS = 80
#: Receives progress: the stage in words, the steps done, and their number.
Report: TypeAlias = Callable[[str, int, int], None]


class Planner:
    """A pair of checkpoints and texts to plan adapters with.

    Its methods replace the weights of its ``network``, of transformers. Candidates are selected by
    their errors on the texts of ``select``; errors are stated on those of ``test``.
    """

    def __init__(
        self,
        pair: Pair,
        texts: Sequence[str],
        *,
        held_out: Sequence[str] | None = None,
        modules: str = "all",
        leave: Collection[str] = (),
        tokens: int = TOKENS,
        max_rank: int = 64,
        bucket: int = 1,
        seed: int = 0,
        device: str = "cpu",
        memory: float | None = None,
        report: Report | None = None,
    ) -> None:
        """Pass texts through both networks, and find the directions of all changes.

        Texts to state errors with are ``held_out``, by default half of ``texts``; ``seed`` draws
        texts, probes and the order of repair. Texts are cut off after ``tokens``. Ranks are at most
        ``max_rank``, and multiples of ``bucket`` or the highest that a module can have. ``modules``
        are ``"all"``, ``"attention"``, ``"mlp"``, or a regular expression, searched for in their
        names; the others stay the base's, as do kinds of `Other` in ``leave``. The network is on
        ``device``; statistics of modules may take so many bytes of ``memory`` at once, by default
        half of what is free. ``report`` receives progress: the stage, the steps done, and their
        number.
        """
        kinds = _checks.items("leave", leave, what=f"kinds among {KINDS}")
        if strange := [kind for kind in kinds if kind not in KINDS]:
            raise InputError("leave", allowed=f"among {', '.join(KINDS)}", value=strange[0])
        self.options = {
            "modules": modules,
            "leave": sorted(kinds),
            "tokens": tokens,
            "max_rank": max_rank,
            "bucket": bucket,
            "seed": seed,
        }
        self.device = _checks.device(device)
        self._memory = free_memory() / 2 if memory is None else _checks.positive("memory", memory)
        self.max_rank = _checks.integer("max_rank", max_rank, 1)
        bucket = _checks.integer("bucket", bucket, 1, self.max_rank, limit="max_rank")
        self.pair = pair = replace(pair, leave=frozenset(kinds))
        self.seed, self.report = seed, report or (lambda *_: None)
        self.modules = _choose(pair, modules)
        self.texts: Texts = prepare(pair, texts, held_out, tokens=tokens, seed=seed)
        self.bucket = bucket
        self.network = pair.network().to(self.device)
        self.readout = Readout(self.network, pair.task)
        self.fit, self.select, self.test = (
            Reference(batches, self.readout)
            for batches in (self.texts.fit, self.texts.select, self.texts.test)
        )
        self._folder = scratch_folder(self)
        self._values: dict[Metric, dict[str, Tensor]] = {}
        self._totals: dict[Metric, dict[str, float]] = {}
        self._spread: dict[str, Tensor] = {}
        self._plain: dict[str, Directions] = {}
        self._decompose(self._pass_texts())
        self._chosen: dict[int, Adapter] = {}

    def values(self, metric: Metric) -> dict[str, Tensor]:
        """The leading ``σ_d`` of each module's change in a metric."""
        self._measure_in(metric)
        return self._values[metric]

    def totals(self, metric: Metric) -> dict[str, float]:
        """``Σσ_d²`` over all directions of each module's change in a metric."""
        self._measure_in(metric)
        return self._totals[metric]

    @property
    def equal(self) -> bool:
        """Whether both checkpoints have equal outputs on all texts for selecting and stating."""
        return not (self.select.effect.any() or self.test.effect.any())

    @property
    def most(self) -> int:
        """How many numbers the highest ranks take."""
        return self.parameters(self.max_rank)

    def parameters(self, rank: int) -> int:
        """How many numbers one rank for all modules takes."""
        return metrics.cost(_uniform(self.modules, rank), self.modules)

    def ranks(self, method: str, parameters: int) -> dict[str, int]:
        """Ranks that a method of `METHODS` gives for at most so many parameters.

        ``uniform`` and ``energy`` give at least rank 1, however few the parameters are.
        """
        metric = _metric(method)
        if method == "effect":
            return self.candidate(method, parameters).ranks
        if method in ALLOCATED:
            return metrics.allocate(self.values(metric), self.modules, self.bucket).ranks(
                parameters
            )
        if method == "uniform":
            fitting = [r for r in range(1, self.max_rank + 1) if self.parameters(r) <= parameters]
            return _uniform(self.modules, max(fitting, default=1))
        if method == "energy":
            values, totals = self.values("plain"), self.totals("plain")
            return _by_energy(values, totals, self.modules, parameters)
        self._measure_in("both")
        return _by_inputs(self._spread, self.modules, parameters, self.max_rank)

    def adapter(self, method: str, ranks: Mapping[str, int]) -> Adapter:
        """The adapter of these ranks that is best in the method's metric."""
        metric = _metric(method)
        factors: dict[str, LowRank] = {}
        biases: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            rank = ranks.get(name, 0)
            if not rank and metric == "plain":
                continue
            directions = self._directions(metric, name)
            if rank:
                factors[name] = _repair.balance(directions.update.leading(rank))
            if metric != "plain" and self.pair.frees_bias(module):
                tuned = self.pair.tuned.read(f"{name}.bias")
                biases[name] = (tuned + directions.bias(rank)).float()
        return Adapter(factors, biases)

    def candidate(self, method: str, parameters: int) -> Adapter:
        """A method's adapter of at most so many parameters; see `ranks`.

        With ``effect`` directions of all modules' changes are taken by what they add to the effect
        for their cost, and gains are fitted to all of them at once [prop-coherent].
        """
        if method != "effect":
            return self.adapter(method, self.ranks(method, parameters))
        if parameters not in self._chosen:
            gains = self._choice(parameters).gains(parameters)
            self._chosen[parameters] = self._with_gains(gains)
        return self._chosen[parameters]

    def best(self, parameters: int) -> tuple[str, Adapter, float]:
        """The method of ``PATHS`` of least error on texts for selection, its adapter, the error."""
        adapters = {method: self.candidate(method, parameters) for method in PATHS}
        errors = {method: self.error(adapter) for method, adapter in adapters.items()}
        method = min(PATHS, key=errors.__getitem__)
        return method, adapters[method], errors[method]

    def put(self, adapter: Adapter) -> None:
        """Give the network the base's weights with this adapter."""
        self.pair.put(self.network, adapter)

    def error(self, adapter: Adapter) -> float:
        """``η`` on the texts for selection."""
        self.put(adapter)
        return self.select.error(self.network)

    def measure(self, adapter: Adapter) -> Measured:
        """What an adapter loses on the texts for stating."""
        self.put(adapter)
        return self.test.measure(self.network, seed=self.seed)

    def predicted(self, adapter: Adapter, step: float = 0.05) -> float:
        """``η`` on the texts for selection, to first order.

        It is ``‖f(s) − f(−s)‖ / 2s`` over the effect, where ``f(s)`` are the outputs with weights
        ``tuned + s · (adapted − tuned)``; it has cross terms of modules and no curvature.
        """
        ahead = Reference(self.select.batches, self.readout)
        self.pair.interpolate(self.network, adapter, step)
        ahead.record_tuned(self.network)
        self.pair.interpolate(self.network, adapter, -step)
        ahead.record_base(self.network)
        return ratio(ahead.effect, self.select.effect) / (2 * step)

    def losses(self, adapter: Adapter) -> dict[str, float]:
        """For each module the part of the effect that its missing directions alone would cost.

        To first order at the tuned network, on texts for selection, for directions of the pool.
        """
        _, held = self._sketches
        whole = float(held.sum(1).square().mean())
        lost = {}
        for name, place in self._pool.places.items():
            found = self._plain[name]
            gains = torch.zeros(len(found.values))
            if name in adapter.factors:
                left, right = found.update.left.mT, found.update.right.mT
                kept = adapter.factors[name]
                gains = (left @ kept.left * (right @ kept.right)).sum(1)
                gains /= right.square().sum(1).clamp(min=1e-30)
            part = predict(held[:, place], gains.double())
            lost[name] = math.sqrt(part / whole) if whole else 0.0
        return lost

    def shares(self, method: str, adapter: Adapter) -> dict[str, tuple[float, float]]:
        """For each module the part of the effect that its missing directions cost alone.

        It is predicted by the method's metric (NaN except for ``two metrics``), and measured on the
        texts for selection with all other modules tuned.
        """
        whole = float(self.select.effect.mean())
        shares = {}
        for done, (name, values) in enumerate(self.values("both").items(), 1):
            predicted = math.nan
            if method == "two metrics":
                rank = adapter.ranks.get(name, 0)
                lost = self.totals("both")[name] - float(values[:rank].square().sum())
                predicted = math.sqrt(max(lost, 0.0) / whole)
            self.pair.put(self.network, adapter, only=name)
            shares[name] = predicted, self.select.error(self.network)
            self.report("each module alone", done, len(self.modules))
        return shares

    def only(self, kind: str) -> float:
        """``η`` on texts for stating with the tuned modules of one kind and the base's others."""
        updates: dict[str, Callable[[], Tensor]] = {
            f"{name}.weight": functools.partial(self.pair.tuned.read, f"{name}.weight")
            for name, module in self.pair.modules.items()
            if module.kind == kind
        }
        self.pair.fill(self.network, "adapted", updates=updates)
        return self.test.error(self.network)

    def least(self, error: float, method: str) -> int | None:
        """The least number of parameters with at most an error on the texts for selection.

        Found by bisection along the directions of a method in their order, as if more parameters
        always lowered the error; ``None`` where the highest ranks do not reach it.
        """
        if method == "effect":
            found = self._least_effect(error)
            if found is None:
                return None
            self._chosen[found.parameters] = found
            return found.parameters
        order = metrics.allocate(self.values(_metric(method)), self.modules, self.bucket)

        def reaches(steps: int) -> bool:
            return self.error(self.adapter(method, order.after(steps))) <= error

        high = len(order.modules)
        if not reaches(high):
            return None
        low, step = -1, max(1, len(self.modules) // 2)
        while step < high:
            if reaches(step):
                high = step
                break
            low, step = step, 2 * step
        while high - low > max(1, high // 50):
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle, high)
        return int(order.costs[high - 1]) if high else 0

    def smallest(self, error: float) -> tuple[str, Adapter]:
        """The smallest adapter with at most an error on texts for selection, or the largest one."""
        found = self._least_effect(error)
        if found is not None:
            return "effect", found
        method, adapter, _ = self.best(self.most)
        return method, adapter

    def repair(self, adapter: Adapter, *, steps: int = STEPS) -> Adapter:
        """Fit an adapter to the tuned network, with its ranks as they are.

        It is fitted block by block in closed form [prop-repair], then by ``steps`` of gradient
        descent on the outputs. Its error on the texts for selection, which are not fitted to, never
        rises.
        """
        least = self.error(adapter)
        report = functools.partial(self.report, "repairing blocks")
        fitted = _repair.fit_blocks(
            self.pair, self.network, adapter, self.texts.fit, self._root, report
        )
        best = fitted if self.error(fitted) < least else adapter
        return _repair.polish(
            self.pair,
            self.network,
            best,
            self.fit,
            self.select,
            steps=steps,
            seed=self.seed,
            report=functools.partial(self.report, "polishing"),
        )

    def smallest_repaired(
        self, error: float, method: str, adapter: Adapter, steps: int
    ) -> tuple[Adapter, Adapter]:
        """A smaller adapter that has at most an error once repaired, before and after repair."""
        low, high = self.parameters(1) // 8, adapter.parameters
        best: tuple[Adapter, Adapter] | None = None
        for _ in range(4):
            if high <= 1.2 * low:
                break
            middle = round(math.sqrt(low * high))
            start = self.candidate(method, middle)
            fitted = self.repair(start, steps=steps)
            if self.error(fitted) <= error:
                best, high = (start, fitted), middle
            else:
                low = middle
        return best or (adapter, self.repair(adapter, steps=steps))

    def _pass_texts(self) -> dict[str, Tensor]:
        """Record both networks on all texts; the mean inputs of modules whose biases are free."""
        free = [name for name, module in self.modules.items() if self.pair.frees_bias(module)]
        sums = {name: torch.zeros(self.modules[name].shape[1]) for name in free}
        tokens = done = 0
        stated = self.select, self.test
        total = len(self.fit.batches) + 2 * sum(len(each.batches) for each in stated)

        def tell(done: int) -> None:
            self.report("passing texts", done, total)

        tell(0)
        with watch(self.network, free) as seen:
            for i, batch in enumerate(self.fit.batches):
                self.fit.record_tuned(self.network, i)
                number = int(batch.attention_mask.sum())
                tokens += number
                for name, (inputs, _) in seen.items():
                    # A pooling layer takes in one row for a text.
                    rows = inputs[batch.there] if inputs.ndim == 3 else inputs
                    sums[name] += number * rows.mean(0).cpu()
                tell(done := i + 1)
        for reference in stated:
            reference.record_tuned(self.network)
            tell(done := done + len(reference.batches))
        self.pair.fill(self.network, "base")
        for reference in stated:
            reference.record_base(self.network)
            tell(done := done + len(reference.batches))
        return {name: total / tokens for name, total in sums.items()}

    def _decompose(self, means: dict[str, Tensor]) -> None:
        """Find the leading singular directions of all changes."""
        self.report("directions of changes", 0, len(self.modules))
        for done, module in enumerate(self.modules.values(), 1):
            found = _singular(self.pair, module.name, self.max_rank)
            update = LowRank(found.update.left.float(), found.update.right.float())
            found = found._replace(
                update=update, mean=found.mean.float(), shift=found.shift.float()
            )
            if module.name in means:
                mean = means[module.name]
                found = found._replace(mean=mean, shift=self.pair.change(module.name) @ mean)
            self._plain[module.name] = found
            self.report("directions of changes", done, len(self.modules))
        self._values["plain"] = {name: found.values for name, found in self._plain.items()}
        self._totals["plain"] = {name: found.total for name, found in self._plain.items()}

    def _measure_in(self, metric: Metric) -> None:
        """Find directions in metrics of inputs and outputs, some modules at a time, in files."""
        if metric in self._values:
            return
        self.pair.fill(self.network, "tuned")
        for each in ("input", "both"):
            self._values[each], self._totals[each] = {}, {}
        samples = sum(int(batch.attention_mask.sum()) for batch in self.texts.fit)
        done = 0
        for group in _group([*self.modules.values()], samples, self._memory):
            about = metrics.moments(
                self.network,
                group,
                self.texts.fit,
                self.readout,
                centred="bias" not in self.pair.leave,
                seed=self.seed,
            )
            for module in group:
                self._keep(module, about.pop(module.name))
                done += 1
                self.report("two metrics", done, len(self.modules))

    def _keep(self, module: Module, about: Moments) -> None:
        name, change = module.name, self.pair.change(module.name)
        self._spread[name] = torch.linalg.svdvals(about.inputs)[: self.max_rank]
        save_file({"outputs": about.outputs.contiguous()}, self._file("outputs", name))
        for metric in ("input", "both"):
            directions = metrics.directions(change, about, metric, self.max_rank)
            self._values[metric][name] = directions.values
            self._totals[metric][name] = directions.total
            update, shift, mean = directions.update, directions.shift, directions.mean
            parts = {"left": update.left, "right": update.right, "shift": shift, "mean": mean}
            kept = {part: tensor.float().contiguous() for part, tensor in parts.items()}
            save_file(kept, self._file(metric, name))

    @functools.cached_property
    def _pool(self) -> Pool:
        return Pool(self._plain, self.modules, self.bucket)

    @functools.cached_property
    def _sketches(self) -> tuple[Tensor, Tensor]:
        """Derivatives at the tuned network, for fitting and for selection."""
        self.pair.fill(self.network, "tuned")
        fit, select = (
            sketch(
                self.network,
                self._pool,
                reference,
                seed=randomness.number(self.seed, f"sketch to {purpose}"),
                report=functools.partial(self.report, "derivatives at the tuned model"),
            )
            for purpose, reference in (("fit", self.fit), ("select", self.select))
        )
        return fit, select

    def _choice(self, parameters: int) -> Choice:
        """Directions for so many parameters, with the intensity that texts for selection choose."""
        fit, held = self._sketches
        choices = [Choice(self._pool, fit, each, parameters) for each in INTENSITIES]
        return min(choices, key=lambda choice: predict(held, choice.gains(parameters)))

    def _least_effect(self, error: float) -> Adapter | None:
        """The smallest adapter in function space with at most an error on texts for selection."""
        tell = functools.partial(self.report, "searching the smallest adapter")
        number = self._predict_least(error)
        choice = self._choice(number)
        while self.error(self._with_gains(choice.gains(number))) > error and number < self.most:
            number = min(math.ceil(1.4 * number), self.most)
            choice = self._choice(number)
        adapter = self._with_gains(choice.gains(number))
        if self.error(adapter) > error:
            return None
        low, high, done = 0, number, 0
        # To a twentieth, along the order in which directions were taken.
        while high > 1.05 * low + self.parameters(1) // 50:
            left = math.log2(math.log(high / low) / math.log(1.05)) if low else 6
            tell(done, done + max(1, math.ceil(left)))
            done += 1
            middle = round(math.sqrt(low * high)) if low else high // 2
            smaller = self._with_gains(choice.gains(middle))
            if self.error(smaller) <= error:
                adapter, high = smaller, middle
            else:
                low = middle
        tell(done, done)
        return adapter

    def _predict_least(self, error: float) -> int:
        """How many parameters have at most an error to first order, on texts for selection."""
        fit, held = self._sketches
        path = Choice(self._pool, fit, INTENSITIES[len(INTENSITIES) // 2], self.most)
        aim = error**2 * float(held.sum(1).square().mean())
        numbers = [self.parameters(1) * 2**k // 16 for k in range(13)]
        reached = (n for n in numbers if predict(held, path.gains(n)) <= aim)
        return min(next(reached, self.most), self.most)

    def _with_gains(self, gains: Tensor) -> Adapter:
        """The adapter that takes directions of all changes with these gains."""
        factors, biases = {}, {}
        for name, place in self._pool.places.items():
            found, parts = self._plain[name], gains[place].float()
            kept = parts != 0
            left, right = found.update.left[:, kept] * parts[kept], found.update.right[:, kept]
            if kept.any():
                factors[name] = _repair.balance(LowRank(left.double(), right.double()))
            if self.pair.frees_bias(self.modules[name]):
                tuned = self.pair.tuned.read(f"{name}.bias")
                biases[name] = (tuned + found.shift - left @ (right.mT @ found.mean)).float()
        return Adapter(factors, biases)

    def _directions(self, metric: Metric, name: str) -> Directions:
        self._measure_in(metric)
        if metric == "plain":
            return self._plain[name]
        parts = load_file(self._file(metric, name))
        update = LowRank(parts.pop("left"), parts.pop("right"))
        return Directions(update, self._values[metric][name], self._totals[metric][name], **parts)

    def _root(self, name: str) -> Tensor | None:
        self._measure_in("both")
        return metrics.root(load_file(self._file("outputs", name))["outputs"])

    def _file(self, kind: str, name: str) -> Path:
        return self._folder / f"{kind}-{name}.safetensors"


@_checks.flushing()
def compare(
    planner: Planner,
    parameters: Sequence[int],
    *,
    methods: Sequence[str] = tuple(METHODS),
    repaired: Collection[int] = (),
    steps: int = STEPS,
) -> pd.DataFrame:
    """Measure the errors of methods at equal numbers of parameters.

    At numbers in ``repaired`` the best method by gain for cost (`Planner.best`) is also repaired,
    with so many ``steps`` by gradient. The table has a row for each adapter: the columns of
    `Measured`, ``ranks`` by module, and ``used``, the parameters that they take.
    """
    import pandas as pd

    rows = []
    for asked in parameters:
        adapters = {method: planner.candidate(method, asked) for method in methods}
        if asked in repaired:
            adapters["repaired"] = planner.repair(planner.best(asked)[1], steps=steps)
        for method, adapter in adapters.items():
            measured = planner.measure(adapter)._asdict()
            row = {"method": method, "parameters": asked, "used": adapter.parameters, **measured}
            rows.append(row | {"ranks": adapter.ranks})
    return pd.DataFrame(rows)


def _singular(pair: Pair, name: str, most: int) -> Directions:
    """The leading singular directions of a change, of its factors where it has some."""
    update = pair.update(name)
    if update is None or not update.rank:
        return metrics.directions(pair.change(name), None, "plain", most)
    Q, left = torch.linalg.qr(update.left.double())
    P, right = torch.linalg.qr(update.right.double())
    core = metrics.directions(left @ right.mT, None, "plain", most)
    nothing = torch.zeros(len(Q)), torch.zeros(len(P))
    found = LowRank(Q @ core.update.left, P @ core.update.right)
    return Directions(found, core.values, core.total, *nothing)


def _uniform(modules: Mapping[str, Module], rank: int) -> dict[str, int]:
    """One rank for all modules, or the highest that a small one can have."""
    return {name: min(rank, *module.shape) for name, module in modules.items()}


def _by_energy(
    values: Mapping[str, Tensor],
    totals: Mapping[str, float],
    modules: Mapping[str, Module],
    parameters: int,
) -> dict[str, int]:
    """The largest share of ``‖ΔW‖²``, the same for all changed modules, that parameters pay for."""
    shares = {
        name: (sigma.double().square().cumsum(0) / totals[name]).numpy()
        for name, sigma in values.items()
        if totals[name]
    }

    def ranks(least: float) -> dict[str, int]:
        return {
            name: min(int((share < least).sum()) + 1, len(share)) for name, share in shares.items()
        }

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = metrics.cost(ranks(middle), modules) <= parameters
        low, high = (middle, high) if fits else (low, middle)
    return ranks(low)


def _by_inputs(
    spread: Mapping[str, Tensor], modules: Mapping[str, Module], parameters: int, most: int
) -> dict[str, int]:
    """Directions of all modules by their part of the inputs' variance, the largest first."""
    parts = sorted(
        (-float(part), order, name)
        for order, (name, sigma) in enumerate(spread.items())
        for part in sigma.double().square() / sigma.double().square().sum()
    )
    ranks: dict[str, int] = {}
    for _, _, name in parts:
        rank = ranks.get(name, 0) + 1
        if rank > min(most, *modules[name].shape):
            continue
        if (parameters := parameters - modules[name].cost) < 0:
            break
        ranks[name] = rank
    return ranks


def _metric(method: str) -> Metric:
    if method not in METHODS:
        raise InputError("method", allowed=f"among {', '.join(METHODS)}", value=method)
    return METHODS[method]


def _choose(pair: Pair, modules: str) -> dict[str, Module]:
    """The modules of a pair that ``"all"``, a kind or a regular expression names."""
    kinds = ("all", "attention", "mlp")
    try:
        pattern = re.compile("" if modules in kinds else modules)
    except (re.error, TypeError):
        chosen = {}
    else:
        chosen = {
            name: module
            for name, module in pair.modules.items()
            if pattern.search(name) and (modules not in kinds or modules in ("all", module.kind))
        }
    if not chosen:
        allowed = "all, attention, mlp, or a regular expression for at least one of"
        raise InputError("modules", allowed=f"{allowed} {', '.join(pair.modules)}", value=modules)
    return chosen


def _group(modules: Sequence[Module], samples: int, memory: float) -> Iterator[list[Module]]:
    """Modules in groups whose moments over so many tokens take at most so many bytes, or alone."""
    group: list[Module] = []
    taken = 0
    for module in modules:
        out, into = module.shape
        # While rows are added there are up to five times as many as columns.
        size = 4 * into * min(samples, 5 * into) + 4 * out * min(samples, out)
        if group and taken + size > memory:
            yield group
            group, taken = [], 0
        group.append(module)
        taken += size
    if group:
        yield group
