"""A pair and its texts, prepared: candidates for any number of parameters, and their errors."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from .. import _checks, randomness
from ..errors import InputError
from ..lowrank import LowRank
from . import metrics
from ._effect import Pool, choose, predict, predict_least, sketch
from ._measuring import Measured, Readout, Reference, ratio, watch
from ._models import require_device
from ._texts import TOKENS, Texts, prepare
from .metrics import Directions
from .pair import KINDS, Adapter, Module, Pair

#: Ways to choose ranks and factors, and what each does. All but ``effect`` (`Planner.candidate`)
#: keep the largest singular values of each change: ``plain`` those of the largest gain for cost
#: (`metrics.allocate`), ``uniform`` as many of each, at least 1, and ``energy`` the fewest, at
#: least 1, with an equal share of each ``‖ΔW‖²``, as ``peft.convert_to_lora`` does.
METHODS = {
    "effect": "by effect on outputs",
    "uniform": "same rank everywhere",
    "energy": "same share of the norm",
    "plain": "largest singular values",
}
#: Methods of which the better is taken for a number of parameters.
PATHS = ("effect", "plain")
#: Receives progress: the stage in words, the steps done, and their number.
Report: TypeAlias = Callable[[str, int, int], None]


class Planner:
    """A pair of checkpoints and texts to plan adapters with.

    Its methods replace the weights of its ``network``, of transformers. Candidates are selected by
    their errors on the texts of ``select``; errors are stated on those of ``test``.

    Parameters
    ----------
    pair, texts, held_out
        The base and what was tuned from it; at least 120 texts, or 60 and as many others, held out,
        to state errors with.
    modules : str
        The modules that get factors: ``"all"``, ``"attention"``, ``"mlp"``, or a regular expression
        that is searched for in names. Other linear ones stay the base's, and other ``words`` of the
        pair are carried row by row.
    leave : collection of str
        Kinds of `Other` that stay the base's.
    tokens : int
        Texts are cut off after so many.
    max_rank, bucket : int
        Ranks are at most ``max_rank``, and multiples of ``bucket`` or the highest that a module can
        have.
    seed : int
        Draws texts and probes.
    device, report
        Where the network is, and what receives progress.

    Raises
    ------
    InputError
        For too few texts, for unknown kinds and modules, and for ranks out of range.

    Attributes
    ----------
    modules : dict
        The modules that get factors, by name.
    directions : dict
        The leading singular `Directions` of each module's change.
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
        report: Report | None = None,
    ) -> None:
        """Pass texts through both networks, and find the directions of all changes."""
        if unknown := [kind for kind in leave if kind not in KINDS]:
            raise InputError("leave", allowed=f"among {', '.join(KINDS)}", value=unknown[0])
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
        self.device = require_device(device)
        self.seed, self.report = seed, report or (lambda *_: None)
        pair = replace(pair, leave=frozenset(leave))
        self.modules = _choose_modules(pair, modules)
        self.pair = pair = pair.with_words(self.modules)
        self.texts: Texts = prepare(pair, texts, held_out, tokens=tokens, seed=seed)
        self.network = pair.network().to(self.device)
        self.readout = Readout(self.network, pair.task)
        self.fit, self.select, self.test = (
            Reference(batches, self.readout)
            for batches in (self.texts.fit, self.texts.select, self.texts.test)
        )
        self.directions = self._decompose(self._pass_texts())
        self._by_effect: dict[int, Adapter] = {}

    @property
    def equal(self) -> bool:
        """Whether both checkpoints have equal outputs on all texts for selecting and stating."""
        return not (self.select.effect.any() or self.test.effect.any())

    @property
    def most(self) -> int:
        """How many numbers the highest ranks take."""
        return self.parameters(self.max_rank)

    def parameters(self, rank: int) -> int:
        """Count the numbers that one rank for all modules takes."""
        return metrics.cost(_uniform(self.modules, rank), self.modules)

    def candidate(self, method: str, parameters: int) -> Adapter:
        """Make a method's adapter of at most so many parameters.

        With ``effect`` directions of all modules' changes are taken by what they add to the effect
        for their cost, and gains are fitted to all of them at once [prop-coherent]. Other
        ``METHODS`` cut singular directions off; ``uniform`` and ``energy`` give at least rank 1,
        however few the parameters are. Raises `InputError` for an unknown method.
        """
        _checks.choice("method", method, [*METHODS])
        if method != "effect":
            return self._truncate(self._ranks(method, parameters))
        if parameters not in self._by_effect:
            choice = choose(self._pool, *self._sketches, parameters)
            self._by_effect[parameters] = self._with_gains(choice.gains(parameters))
        return self._by_effect[parameters]

    def best(self, parameters: int) -> tuple[str, Adapter]:
        """Find the method of ``PATHS`` of least error on texts for selection, and its adapter."""
        adapters = {method: self.candidate(method, parameters) for method in PATHS}
        method = min(PATHS, key=lambda method: self.error(adapters[method]))
        return method, adapters[method]

    def least(self, error: float) -> Adapter | None:
        """Find the smallest adapter with at most an error on the texts for selection.

        It is looked for by bisection, to a twentieth of its parameters, along the order in which
        directions are taken by ``effect``; ``None`` where the highest ranks do not reach the error.
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
        while high > 1.05 * low + self.parameters(1) // 50:
            remaining = math.log2(math.log(high / low) / math.log(1.05)) if low else 6
            tell(done, done + max(1, math.ceil(remaining)))
            done += 1
            middle = round(math.sqrt(low * high)) if low else high // 2
            smaller = self._with_gains(choice.gains(middle))
            if self.error(smaller) <= error:
                adapter, high = smaller, middle
            else:
                low = middle
        tell(done, done)
        self._by_effect[adapter.parameters] = adapter
        return adapter

    def smallest(self, error: float) -> tuple[str, Adapter]:
        """Find the smallest adapter with at most an error on texts for selection, or the largest.

        The method that it is from comes first.
        """
        found = self.least(error)
        return self.best(self.most) if found is None else ("effect", found)

    def put(self, adapter: Adapter) -> None:
        """Give the network the base's weights with this adapter."""
        self.pair.put(self.network, adapter)

    def error(self, adapter: Adapter) -> float:
        """Measure ``η`` on the texts for selection."""
        self.put(adapter)
        return self.select.error(self.network)

    def measure(self, adapter: Adapter) -> Measured:
        """Measure what an adapter loses on the texts for stating."""
        self.put(adapter)
        return self.test.measure(self.network, seed=self.seed)

    def predicted(self, adapter: Adapter, step: float = 0.05) -> float:
        """Predict ``η`` on the texts for selection, to first order.

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
        """Predict for each module the part of the effect that its missing directions would cost.

        Each is taken alone, to first order at the tuned network, on texts for selection, with the
        directions of `directions`.
        """
        _, held = self._sketches
        whole = float(self.select.effect.mean())
        lost = {}
        for name, place in self._pool.places.items():
            found = self.directions[name].update
            gains = torch.zeros(found.rank)
            if name in adapter.factors:
                kept = adapter.factors[name]
                gains = (found.left.mT @ kept.left * (found.right.mT @ kept.right)).sum(1)
                gains /= found.right.square().sum(0).clamp(min=1e-30)
            part = predict(held[:, place], gains.double())
            lost[name] = math.sqrt(part / whole) if whole else 0.0
        return lost

    def only(self, kind: str) -> float:
        """Measure ``η`` on texts for stating with only the modules of one kind as tuned."""
        updates: dict[str, Callable[[], Tensor]] = {
            f"{name}.weight": functools.partial(self.pair.tuned.read, f"{name}.weight")
            for name, module in self.pair.modules.items()
            if module.kind == kind
        }
        self.pair.fill(self.network, "adapted", updates=updates)
        return self.test.error(self.network)

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
                self.fit.record_batch(self.network, i)
                number = int(batch.attention_mask.sum())
                tokens += number
                for name, (inputs, _) in seen.items():
                    # A pooling layer takes in one row for a text.
                    rows = inputs[batch.is_token] if inputs.ndim == 3 else inputs
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
    def _pool(self) -> Pool:
        return Pool(self.directions, self.modules, self.bucket)

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

    def _ranks(self, method: str, parameters: int) -> dict[str, int]:
        """Ranks for at most so many parameters, by a method that cuts singular directions off."""
        if method == "uniform":
            fitting = [r for r in range(1, self.max_rank + 1) if self.parameters(r) <= parameters]
            return _uniform(self.modules, max(fitting, default=1))
        if method == "energy":
            return _by_energy(self.directions, self.modules, parameters)
        values = {name: found.values for name, found in self.directions.items()}
        return metrics.allocate(values, self.modules, self.bucket).ranks(parameters)

    def _truncate(self, ranks: Mapping[str, int]) -> Adapter:
        """The adapter of the leading singular directions, of these ranks."""
        factors = {
            name: _balance(found.update.leading(ranks[name]))
            for name, found in self.directions.items()
            if ranks.get(name)
        }
        return Adapter(factors, {})

    def _with_gains(self, gains: Tensor) -> Adapter:
        """The adapter that takes directions of all changes with these gains."""
        factors, biases = {}, {}
        for name, place in self._pool.places.items():
            found, parts = self.directions[name], gains[place].float()
            kept = parts != 0
            left, right = found.update.left[:, kept] * parts[kept], found.update.right[:, kept]
            if kept.any():
                factors[name] = _balance(LowRank(left.double(), right.double()))
            if self.pair.frees_bias(self.modules[name]):
                tuned = self.pair.tuned.read(f"{name}.bias")
                biases[name] = (tuned + found.shift - left @ (right.mT @ found.mean)).float()
        return Adapter(factors, biases)


def _balance(update: LowRank) -> LowRank:
    """The same update in float32, with factors of equal singular values, ``UΣ^{1/2}, VΣ^{1/2}``."""
    Q, S = torch.linalg.qr(update.left)
    P, T = torch.linalg.qr(update.right)
    U, values, Vh = torch.linalg.svd(S @ T.mT)
    half = values.sqrt()
    return LowRank((Q @ U * half).float(), (P @ Vh.mT * half).float())


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


def _choose_modules(pair: Pair, modules: str) -> dict[str, Module]:
    """The modules of a pair that ``"all"``, a kind or a regular expression names."""
    words = {name: word for name, word in pair.words.items() if word.kind not in pair.leave}
    candidates = pair.modules | words
    if modules in ("all", "attention", "mlp"):
        kinds = {module.kind for module in candidates.values()} if modules == "all" else {modules}
        chosen = {name: module for name, module in candidates.items() if module.kind in kinds}
    else:
        try:
            chosen = {n: module for n, module in candidates.items() if re.search(modules, n)}
        except re.error:
            chosen = {}
    if not chosen:
        allowed = "all, attention, mlp, or a regular expression for at least one of"
        raise InputError("modules", allowed=f"{allowed} {', '.join(candidates)}", value=modules)
    return chosen
