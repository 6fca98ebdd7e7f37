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
from ._effect import Pool, choose, predict, predict_least, sketch
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
from .metrics import Directions
from .pair import KINDS, Adapter, Module, Pair

if TYPE_CHECKING:
    import pandas as pd

#: Ways to choose ranks and factors. ``effect``: directions and their gains in function space
#: (`Planner.candidate`). Singular directions of changes, with ``uniform``: one rank for all, at
#: least 1; ``energy``: the least ranks that keep an equal share of each ``‖ΔW‖²``, at least 1, as
#: ``peft.convert_to_lora`` has them; ``plain``: by gain for cost (`metrics.allocate`). And by gain
#: for cost with directions, factors and biases in ``two metrics``.
METHODS = ("effect", "uniform", "energy", "plain", "two metrics")
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
        names; other linear ones stay the base's, as do kinds of `Other` in ``leave``, and other
        ``words`` of the pair are carried row by row. The network is on
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
        pair = replace(pair, leave=frozenset(kinds))
        self.seed, self.report = seed, report or (lambda *_: None)
        self.modules = _choose(pair, modules)
        self.pair = pair = pair.with_words(self.modules)
        self.texts: Texts = prepare(pair, texts, held_out, tokens=tokens, seed=seed)
        self.bucket = bucket
        self.network = pair.network().to(self.device)
        self.readout = Readout(self.network, pair.task)
        self.fit, self.select, self.test = (
            Reference(batches, self.readout)
            for batches in (self.texts.fit, self.texts.select, self.texts.test)
        )
        self._folder = scratch_folder(self)
        self._plain = self._decompose(self._pass_texts())
        self._chosen: dict[int, Adapter] = {}

    def directions(self, method: str) -> dict[str, Directions]:
        """The leading directions of each module's change that a method of `METHODS` chooses from.

        They are singular ones, or those of ``two metrics``, which texts are passed for when these
        are first asked for.
        """
        if method not in METHODS:
            raise InputError("method", allowed=f"among {', '.join(METHODS)}", value=method)
        return self._both if method == "two metrics" else self._plain

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
        directions = self.directions(method)
        if method == "effect":
            return self.candidate(method, parameters).ranks
        if method == "uniform":
            fitting = [r for r in range(1, self.max_rank + 1) if self.parameters(r) <= parameters]
            return _uniform(self.modules, max(fitting, default=1))
        if method == "energy":
            return _by_energy(directions, self.modules, parameters)
        return self._allocate(method).ranks(parameters)

    def adapter(self, method: str, ranks: Mapping[str, int]) -> Adapter:
        """The adapter that has the leading directions of a method, of these ranks."""
        factors: dict[str, LowRank] = {}
        biases: dict[str, Tensor] = {}
        for name, found in self.directions(method).items():
            rank = ranks.get(name, 0)
            if rank:
                factors[name] = _repair.balance(found.update.leading(rank))
            if method == "two metrics" and self.pair.frees_bias(self.modules[name]):
                tuned = self.pair.tuned.read(f"{name}.bias")
                biases[name] = (tuned + found.bias(rank)).float()
        return Adapter(factors, biases)

    def candidate(self, method: str, parameters: int) -> Adapter:
        """A method's adapter of at most so many parameters; see `ranks`.

        With ``effect`` directions of all modules' changes are taken by what they add to the effect
        for their cost, and gains are fitted to all of them at once [prop-coherent].
        """
        if method != "effect":
            return self.adapter(method, self.ranks(method, parameters))
        if parameters not in self._chosen:
            choice = choose(self._pool, *self._sketches, parameters)
            self._chosen[parameters] = self._with_gains(choice.gains(parameters))
        return self._chosen[parameters]

    def best(self, parameters: int) -> tuple[str, Adapter]:
        """The method of ``PATHS`` of least error on texts for selection, and its adapter."""
        adapters = {method: self.candidate(method, parameters) for method in PATHS}
        method = min(PATHS, key=lambda method: self.error(adapters[method]))
        return method, adapters[method]

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
        self.pair.interpolate(self.network, adapter, step)
        # With the head that this network has.
        ahead = Reference(self.select.batches, Readout(self.network, self.pair.task))
        ahead.record_tuned(self.network)
        self.pair.interpolate(self.network, adapter, -step)
        ahead.record_base(self.network)
        return ratio(ahead.effect, self.select.effect) / (2 * step)

    def losses(self, adapter: Adapter) -> dict[str, float]:
        """For each module the part of the effect that its missing directions alone would cost.

        To first order at the tuned network, on texts for selection, for directions of the pool.
        """
        _, held = self._sketches
        whole = float(self.select.effect.mean())
        lost = {}
        for name, place in self._pool.places.items():
            found = self._plain[name].update
            gains = torch.zeros(found.rank)
            if name in adapter.factors:
                kept = adapter.factors[name]
                gains = (found.left.mT @ kept.left * (found.right.mT @ kept.right)).sum(1)
                gains /= found.right.square().sum(0).clamp(min=1e-30)
            part = predict(held[:, place], gains.double())
            lost[name] = math.sqrt(part / whole) if whole else 0.0
        return lost

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
            return None if found is None else found.parameters
        order = self._allocate(method)

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
        return self.best(self.most) if found is None else ("effect", found)

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
        stated = self.select, self.test
        passes = len(self.fit.batches) + 2 * sum(len(each.batches) for each in stated)
        tokens = done = 0

        def tell(done: int) -> None:
            self.report("passing texts", done, passes)

        tell(done)
        with watch(self.network, free) as seen:
            for i, batch in enumerate(self.fit.batches):
                self.fit.record_tuned(self.network, i)
                number = int(batch.attention_mask.sum())
                tokens += number
                for name, (inputs, _) in seen.items():
                    # A pooling layer takes in one row for a text.
                    rows = inputs[batch.there] if inputs.ndim == 3 else inputs
                    sums[name] += number * rows.mean(0).cpu()
                tell(done := done + 1)
        for reference in stated:
            reference.record_tuned(self.network)
            tell(done := done + len(reference.batches))
        self.pair.fill(self.network, "base")
        for reference in stated:
            reference.record_base(self.network)
            tell(done := done + len(reference.batches))
        return {name: summed / tokens for name, summed in sums.items()}

    def _decompose(self, means: Mapping[str, Tensor]) -> dict[str, Directions]:
        """Find the leading singular directions of all changes, about mean inputs."""
        found: dict[str, Directions] = {}
        self.report("directions of changes", 0, len(self.modules))
        for name in self.modules:
            directions = _singular(self.pair, name, self.max_rank).single()
            if name in means:
                shift = self.pair.change(name) @ means[name]
                directions = directions._replace(mean=means[name], shift=shift)
            found[name] = directions
            self.report("directions of changes", len(found), len(self.modules))
        return found

    @functools.cached_property
    def _both(self) -> dict[str, Directions]:
        """Directions in two metrics, some modules at a time; outputs' moments are kept in files.

        Those of embeddings and heads are singular, with values from derivatives of the outputs.
        """
        self.pair.fill(self.network, "tuned")
        samples = sum(int(batch.attention_mask.sum()) for batch in self.texts.fit)
        found: dict[str, Directions] = {}
        words = self.modules.keys() & self.pair.words.keys()
        for name in words:
            found[name] = self._by_derivatives(name)
        linear = [module for name, module in self.modules.items() if name not in words]
        for group in _group(linear, samples, self._memory):
            about = metrics.moments(
                self.network,
                group,
                self.texts.fit,
                self.readout,
                centred="bias" not in self.pair.leave,
                seed=self.seed,
            )
            for name in [module.name for module in group]:
                moments = about.pop(name)
                save_file({"outputs": moments.outputs.contiguous()}, self._file(name))
                directions = metrics.directions(self.pair.change(name), moments, self.max_rank)
                found[name] = directions.single()
                self.report("two metrics", len(found), len(self.modules))
        return {name: found[name] for name in self.modules}

    def _by_derivatives(self, name: str) -> Directions:
        """Singular directions of a change, ordered by what each alone adds to the effect."""
        plain = self._plain[name]
        values = self._sketches[0][:, self._pool.places[name]].square().mean(0).sqrt()
        order = values.argsort(descending=True)
        update = LowRank(plain.update.left[:, order], plain.update.right[:, order])
        total = float(values.square().sum())
        return plain._replace(update=update, values=values[order].float(), total=total)

    def _allocate(self, method: str) -> metrics._Allocation:
        """The order of a method's directions by gain for cost."""
        values = {name: found.values for name, found in self.directions(method).items()}
        return metrics.allocate(values, self.modules, self.bucket)

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

    def _least_effect(self, error: float) -> Adapter | None:
        """The smallest adapter in function space with at most an error on texts for selection.

        It becomes the candidate of its size.
        """
        tell = functools.partial(self.report, "searching the smallest adapter")
        numbers = [self.parameters(1) * 2**k // 16 for k in range(13)]
        numbers = [number for number in numbers if number < self.most] + [self.most]
        aim = error**2 * float(self.select.effect.mean())
        high = predict_least(self._pool, *self._sketches, aim, numbers)
        while True:
            choice = choose(self._pool, *self._sketches, high)
            adapter = self._with_gains(choice.gains(high))
            if self.error(adapter) <= error:
                break
            if high == self.most:
                return None
            high = min(math.ceil(1.4 * high), self.most)
        low = done = 0
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
        self._chosen[adapter.parameters] = adapter
        return adapter

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

    def _root(self, name: str) -> Tensor | None:
        # Which takes the moments and writes them.
        self.directions("two metrics")
        return metrics.root(load_file(self._file(name))["outputs"])

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


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

    At numbers in ``repaired`` the best method of ``PATHS`` (`Planner.best`) is also repaired, with
    so many ``steps`` by gradient. The table has a row for each adapter: the columns of
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
        return metrics.directions(pair.change(name), None, most)
    Q, left = torch.linalg.qr(update.left.double())
    P, right = torch.linalg.qr(update.right.double())
    core = metrics.directions(left @ right.mT, None, most)
    update = LowRank(Q @ core.update.left, P @ core.update.right)
    return core._replace(update=update, shift=Q.new_zeros(len(Q)), mean=P.new_zeros(len(P)))


def _uniform(modules: Mapping[str, Module], rank: int) -> dict[str, int]:
    """One rank for all modules, or the highest that a small one can have."""
    return {name: min(rank, *module.shape) for name, module in modules.items()}


def _by_energy(
    directions: Mapping[str, Directions], modules: Mapping[str, Module], parameters: int
) -> dict[str, int]:
    """The largest share of ``‖ΔW‖²``, the same for all changed modules, that parameters pay for."""
    shares = {
        name: (found.values.double().square().cumsum(0) / found.total).numpy()
        for name, found in directions.items()
        if found.total
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


def _choose(pair: Pair, modules: str) -> dict[str, Module]:
    """The modules of a pair that ``"all"``, a kind or a regular expression names."""
    kinds = ("all", "attention", "mlp")
    left = pair.leave
    words = {name: module for name, module in pair.words.items() if module.kind not in left}
    candidates = pair.modules | words
    try:
        pattern = re.compile("" if modules in kinds else modules)
    except (re.error, TypeError):
        chosen = {}
    else:
        chosen = {
            name: module
            for name, module in candidates.items()
            if pattern.search(name) and (modules not in kinds or modules in ("all", module.kind))
        }
    if not chosen:
        allowed = "all, attention, mlp, or a regular expression for at least one of"
        raise InputError("modules", allowed=f"{allowed} {', '.join(candidates)}", value=modules)
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
