"""A pair and its texts, made ready: candidates for any number of parameters, and their errors."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import _checks
from ..errors import InputError, brief
from ..lowrank import LowRank
from . import metrics, planning, repair, scratch
from .adapter import Adapter, balanced, put, towards
from .measuring import Measured, Reference, ratio
from .metrics import Moments
from .pair import KINDS, Module, Pair
from .planning import METRICS, Directions, Metric
from .texts import TOKENS, Texts, prepared

#: Ways to choose ranks, and the metric in which their factors are best. ``uniform``: one rank for
#: all; ``energy``: an equal share of ``‖ΔW‖²`` (`planning.by_energy`); ``inputs``: by the variance
#: of inputs (`planning.by_inputs`); `PATHS`: by gain for cost (`planning.path`).
METHODS: dict[str, Metric] = {
    "uniform": "plain",
    "energy": "plain",
    "inputs": "plain",
    "plain": "plain",
    "input metric": "input",
    "two metrics": "both",
}
PATHS = ("plain", "input metric", "two metrics")
#: Of repair by gradient.
STEPS = 80


#: Is told what is done, and how much of it: the stage in words, the steps done, and all of them.
Report: TypeAlias = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


class Planner:
    """A pair of checkpoints and texts to plan adapters with.

    Attributes
    ----------
    pair : Pair
        The checkpoints.
    modules : str
        Those that adapters are put on.
    texts : sequence of str
        In three parts.
    options
        What else was asked for, by name.
    fitting, choosing, held_out : sequence of str or None
        Outputs on the three parts of the texts; errors are stated on the last.
    values, totals
        By metric and module the leading ``σ_d``, and ``Σσ_d²`` over all of them.
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
        report: Report | None = None,
    ) -> None:
        """Pass texts through both networks, and take the directions of all changes.

        Raises `InputError` for texts that are too few or in both parts, and for modules, kinds and
        sizes that there are not.

        Parameters
        ----------
        pair : Pair
            The checkpoints.
        texts, held_out
            For planning, and for what is stated; without the second, half of the first are held
            out.
        modules : str
            ``"all"``, ``"attention"``, ``"mlp"``, or a regular expression that is searched for in
            their names. The others stay the base's.
        leave : Collection
            Kinds of what low rank cannot carry (`Other`) that stay the base's too.
        tokens : int
            To which texts are cut off.
        max_rank : int
            Of any module.
        bucket : int
            Ranks are multiples of it, up to the highest that a module can have.
        seed : int
            Draws texts, probes and the order of repair.
        report : Report, optional
            Is told of progress.
        """
        leave = _checks.items("leave", leave, what=f"kinds among {KINDS}")
        self.pair, self.seed, self.report = pair, seed, report or silent
        self.options = {
            "modules": modules,
            "leave": sorted(leave),
            "tokens": tokens,
            "max_rank": max_rank,
            "bucket": bucket,
            "seed": seed,
        }
        self.max_rank = _checks.integer("max_rank", max_rank, 1)
        self.bucket = _checks.integer("bucket", bucket, 1, self.max_rank, limit="max_rank")
        self.modules = chosen(pair, modules)
        self.leave = frozenset(leave)
        if strange := self.leave - set(KINDS):
            raise InputError("leave", allowed=f"among {', '.join(KINDS)}", given=min(strange))
        self.texts: Texts = prepared(
            texts, held_out, pair.words, pair.tuned.config, tokens=tokens, seed=seed
        )
        self.network = pair.network()
        task = pair.family.task
        self.fitting, self.choosing, self.held_out = (
            Reference(batches, task)
            for batches in (self.texts.fitting, self.texts.choosing, self.texts.held_out)
        )
        self._folder = scratch.folder(self)
        self.values: dict[Metric, dict[str, Tensor]] = {metric: {} for metric in METRICS}
        self.totals: dict[Metric, dict[str, float]] = {metric: {} for metric in METRICS}
        self._spread: dict[str, Tensor] = {}
        for reference in (self.fitting, self.choosing, self.held_out):
            reference.tuned(self.network)
        self._decompose()
        pair.fill(self.network, "base")
        for reference in (self.choosing, self.held_out):
            reference.base(self.network)
        self._paths = {
            metric: planning.path(found, self.modules, self.bucket)
            for metric, found in self.values.items()
        }

    @property
    def equal(self) -> bool:
        """Whether both checkpoints give the same on all texts for choosing and stating."""
        return not (self.choosing.effect.any() or self.held_out.effect.any())

    def parameters(self, rank: int) -> int:
        """Numbers that one rank for all modules takes."""
        return planning.cost(planning.uniform(self.modules, rank), self.modules)

    @property
    def most(self) -> int:
        """Numbers of the highest ranks."""
        return self.parameters(self.max_rank)

    def ranks(self, method: str, parameters: int) -> dict[str, int]:
        """What a method of `METHODS` makes of at most so many parameters."""
        metric = self._metric(method)
        if method in PATHS:
            return self._paths[metric].ranks(parameters)
        rank = self._uniform_rank(parameters)
        if method == "uniform":
            return {n: r for n, r in planning.uniform(self.modules, rank).items() if r}
        if method == "energy":
            values, totals = self.values["plain"], self.totals["plain"]
            return planning.by_energy(values, totals, self.modules, parameters)
        return planning.by_inputs(self._spread, self.modules, parameters, self.max_rank)

    def adapter(self, method: str, ranks: Mapping[str, int]) -> Adapter:
        """The factors and biases of these ranks, best in the method's metric."""
        metric = self._metric(method)
        factors: dict[str, LowRank] = {}
        biases: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            rank = ranks.get(name, 0)
            if not rank and metric == "plain":
                continue
            one = self._directions(metric, name)
            if rank:
                factors[name] = balanced(one.left[:, :rank], one.right[:, :rank])
            if metric != "plain" and module.bias and "bias" not in self.leave:
                tuned = self.pair.tuned.read(f"{name}.bias")
                biases[name] = (tuned + one.bias(rank)).float()
        return Adapter(factors, biases)

    def candidate(self, method: str, parameters: int) -> Adapter:
        """The adapter of a method for at most so many parameters."""
        return self.adapter(method, self.ranks(method, parameters))

    def put(self, adapter: Adapter) -> None:
        """Give the network the base's weights with this adapter."""
        put(self.pair, self.network, adapter, leave=self.leave)

    def error(self, adapter: Adapter) -> float:
        """``η`` on the texts for choosing."""
        self.put(adapter)
        return self.choosing.error(self.network)

    def measure(self, adapter: Adapter) -> Measured:
        """What is lost on held-out texts."""
        self.put(adapter)
        return self.held_out.measure(self.network, seed=self.seed)

    def predicted(self, adapter: Adapter, step: float = 0.05) -> float:
        """``η`` to first order, on the texts for choosing.

        ``‖f(s) − f(−s)‖ / 2s`` against the effect, where ``f(s)`` has the tuned weights and ``s``
        times what the adapted network lacks of them: one derivative along all that is missing, so
        that cross terms of modules are in it and curvature is not.
        """
        ahead = Reference(self.choosing.batches, self.choosing.task)
        towards(self.pair, self.network, adapter, step, leave=self.leave)
        ahead.tuned(self.network)
        towards(self.pair, self.network, adapter, -step, leave=self.leave)
        ahead.base(self.network)
        return ratio(ahead.effect, self.choosing.effect) / (2 * step)

    def shares(self, method: str, adapter: Adapter) -> dict[str, tuple[float, float]]:
        """Of each module the part of the effect that its missing directions cost alone.

        First as the method's metric predicts it (of ``two metrics``; NaN of others), then as it is
        measured on the texts for choosing, the other modules being as tuned.
        """
        whole = float(self.choosing.effect.mean())
        found = {}
        for done, (name, values) in enumerate(self.values["both"].items(), 1):
            rank = adapter.factors[name].rank if name in adapter.factors else 0
            predicted = math.nan
            if method == "two metrics":
                lost = self.totals["both"][name] - float(values[:rank].square().sum())
                predicted = math.sqrt(max(lost, 0.0) / whole)
            put(self.pair, self.network, adapter, only=name)
            found[name] = predicted, self.choosing.error(self.network)
            self.report("each module alone", done, len(self.modules))
        return found

    def only(self, kind: str) -> float:
        """``η`` on held-out texts with the modules of a kind as tuned, the others as the base's."""
        updates: dict[str, Callable[[], Tensor]] = {
            f"{name}.weight": functools.partial(self.pair.tuned.read, f"{name}.weight")
            for name, module in self.pair.modules.items()
            if module.kind == kind
        }
        self.pair.fill(self.network, "adapted", leave=self.leave, updates=updates)
        return self.held_out.error(self.network)

    def least(self, error: float, method: str) -> int | None:
        """The least number of parameters with at most an error on the texts for choosing.

        By bisection of the method's path, as if the error fell along it; nothing where all of it
        does not do.
        """
        path = self._paths[self._metric(method)]

        def enough(steps: int) -> bool:
            return self.error(self.adapter(method, path.after(steps))) <= error

        high = len(path.modules)
        if not enough(high):
            return None
        low, step = -1, max(1, len(self.modules) // 2)
        while step < high:
            if enough(step):
                high = step
                break
            low, step = step, 2 * step
        while high - low > max(1, high // 50):
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return int(path.costs[high - 1]) if high else 0

    def repaired(self, adapter: Adapter, *, steps: int = STEPS) -> Adapter:
        """The adapter fitted to the tuned network, ranks as they are; see `repair`."""
        kept, least = adapter, self.error(adapter)
        fitted = repair.blocks(
            self.pair,
            self.network,
            adapter,
            self.texts.fitting,
            self._root,
            leave=self.leave,
            report=lambda done, total: self.report("repairing blocks", done, total),
        )
        if (error := self.error(fitted)) < least:
            kept, least = fitted, error
        return repair.polish(
            self.pair,
            self.network,
            kept,
            self.fitting,
            self.choosing,
            steps=steps,
            seed=self.seed,
            leave=self.leave,
            report=lambda done, total: self.report("polishing", done, total),
        )[0]

    def _decompose(self) -> None:
        """Directions of all changes in all metrics, kept in files, a group of modules at a time."""
        samples = sum(int(batch.attention_mask.sum()) for batch in self.texts.fitting)
        memory = max(2**28, self.pair.tuned.bytes() // 4)
        done = 0
        for group in metrics.groups(self.modules.values(), samples, memory):
            about = metrics.moments(
                self.network,
                group,
                self.texts.fitting,
                self.pair.family.task,
                centred="bias" not in self.leave,
                seed=self.seed,
            )
            for module in group:
                self._keep(module, about.pop(module.name))
                done += 1
                self.report("directions of changes", done, len(self.modules))

    def _keep(self, module: Module, about: Moments) -> None:
        change = self.pair.change(module.name)
        self._spread[module.name] = torch.linalg.svdvals(about.inputs)[: self.max_rank]
        save_file({"outputs": about.outputs.contiguous()}, self._file("outputs", module.name))
        for metric in self.values:
            one = planning.directions(change, about, metric, self.max_rank)
            self.values[metric][module.name] = one.values
            self.totals[metric][module.name] = one.total
            tensors = {
                field: value.float().contiguous()
                for field, value in one._asdict().items()
                if isinstance(value, Tensor)
            }
            save_file(tensors, self._file(metric, module.name))

    def _directions(self, metric: Metric, name: str) -> Directions:
        parts = load_file(self._file(metric, name))
        return Directions(**parts, total=self.totals[metric][name])

    def _root(self, name: str) -> Tensor | None:
        return planning.root(load_file(self._file("outputs", name))["outputs"])

    def _file(self, kind: str, name: str) -> Path:
        return self._folder / f"{kind}-{name}.safetensors"

    def _uniform_rank(self, parameters: int) -> int:
        rank = 0
        while rank < self.max_rank and self.parameters(rank + 1) <= parameters:
            rank += 1
        return rank

    def _metric(self, method: str) -> Metric:
        if method not in METHODS:
            raise InputError("method", allowed=f"among {', '.join(METHODS)}", given=brief(method))
        return METHODS[method]


def chosen(pair: Pair, modules: str) -> dict[str, Module]:
    """The modules of a pair that ``"all"``, a kind or a regular expression names.

    Raises `InputError` for one that names none.
    """
    if modules in ("all", "attention", "mlp"):
        found = {n: m for n, m in pair.modules.items() if modules in ("all", m.kind)}
    else:
        try:
            pattern = re.compile(modules)
        except (re.error, TypeError) as error:
            raise InputError(
                "modules",
                allowed="all, attention, mlp or a regular expression",
                given=f"{modules!r} ({error})",
            ) from error
        found = {n: m for n, m in pair.modules.items() if pattern.search(n)}
    if not found:
        raise InputError(
            "modules",
            allowed="words or an expression that name at least one module",
            given=f"{modules!r}, where there are {brief(list(pair.modules))}",
        )
    return found
