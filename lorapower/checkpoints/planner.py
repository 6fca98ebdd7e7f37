"""A pair and its texts, prepared: candidates for any number of parameters, and their errors."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .. import _checks, randomness
from ..errors import InputError
from ..lowrank import LowRank
from . import metrics
from ._effect import Pool, choose, predict, predict_least, sketch
from ._measuring import TOKENS, Compared, Measured, Readout, Reference, prepare, ratio, watch
from ._models import listed, require_device
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
#: Receives progress: the stage in words, the steps done, and their number.
Report: TypeAlias = Callable[[str, int, int], None]


class Planner:
    """A pair of checkpoints and texts to plan adapters with.

    Its methods replace the weights of its ``network``, of transformers. Candidates are selected by
    their errors on the texts of ``select``; errors are stated on those of ``test``. Raises
    `InputError` for too few texts, for unknown kinds and modules, and for ranks out of range.

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
        Kinds of other parameters (``others`` of a `Pair`) that stay the base's.
    tokens, seed : int
        Texts are cut off after so many tokens; the seed draws texts and probes.
    max_rank, bucket : int
        Ranks are at most ``max_rank``, and multiples of ``bucket`` or the highest that a module can
        have.
    serving : bool
        Whether all factors of ``effect`` have the rank ``max_rank``, where need be by zeros, and
        modules that servers compute as one (`Module.fused`) get them together.
    device, report
        Where the network is, and what receives progress.

    Attributes
    ----------
    modules, directions : dict
        The modules that get factors, by name; the leading singular `Directions` of their changes.
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
        serving: bool = False,
        seed: int = 0,
        device: str = "cpu",
        report: Report | None = None,
    ) -> None:
        """Pass texts through both networks, and find the directions of all changes."""
        _require_leave(pair, leave)
        bucket = max_rank if serving else bucket
        self.options = {"modules": modules, "leave": sorted(leave), "tokens": tokens}
        self.options |= {"max_rank": max_rank, "bucket": bucket, "seed": seed, "serving": serving}
        self.serving, self.max_rank = serving, _checks.integer("max_rank", max_rank, 1)
        self.bucket = _checks.integer("bucket", bucket, 1, self.max_rank, limit="max_rank")
        self.device = require_device(device)
        self.seed, self.report = seed, report or (lambda *_: None)
        pair = replace(pair, leave=frozenset(leave))
        self.modules = _choose_modules(pair, modules)
        if serving:
            together = {module.fused for module in self.modules.values()}
            self.modules = {n: m for n, m in pair.modules.items() if m.fused in together}
        self.pair = pair = pair.with_words(self.modules)
        self.texts = prepare(pair, texts, held_out, tokens=tokens, seed=seed)
        self.network = pair.network().to(self.device)
        self.readout = Readout(self.network, pair.task)
        parts = self.texts.fit, self.texts.select, self.texts.test
        self.fit, self.select, self.test = (Reference(part, self.readout) for part in parts)
        means = self._pass_texts()
        # Of other texts than those for stating, so that their losses are independent.
        self.test.typical = math.sqrt(self.select.effect.mean())
        self.directions: dict[str, Directions] = {}
        for done, name in enumerate(self.modules):
            self.report("directions of changes", done, len(self.modules))
            self.directions[name] = _decompose(pair, name, self.max_rank, means.get(name))
        self.report("directions of changes", len(self.modules), len(self.modules))
        self._by_effect: dict[int, Adapter] = {}

    @property
    def equal(self) -> bool:
        """Whether both checkpoints have equal outputs on all texts for selecting and stating."""
        return not (self.select.effect.any() or self.test.effect.any())

    @property
    def most(self) -> int:
        """How many numbers the highest ranks take."""
        return max(self.parameters(self.max_rank), int(self._pool.costs.sum()))

    def parameters(self, rank: int) -> int:
        """Count the numbers that one rank for all modules takes."""
        return _cost(_uniform(self.modules, rank), self.modules)

    def candidate(self, method: str, parameters: int) -> Adapter:
        """Make an adapter with at most so many parameters, by one of ``METHODS``.

        With ``effect`` directions of all modules' changes are taken by what they add to the effect
        for their cost, and gains are fitted to all of them at once [prop-coherent]. Other methods
        cut singular directions off; ``uniform`` and ``energy`` give at least rank 1, however few
        the parameters are. Raises `InputError` for an unknown method.
        """
        _checks.choice("method", method, [*METHODS])
        if method != "effect":
            return self._truncate(method, parameters)
        if parameters not in self._by_effect:
            choice = choose(self._pool, *self._sketches, parameters)
            self._by_effect[parameters] = self._with_gains(choice.gains(parameters))
        return self._by_effect[parameters]

    def best(self, parameters: int) -> tuple[str, Adapter]:
        """Find the better of ``effect`` and ``plain`` on texts for selection, and its adapter.

        For ``serving`` it is ``effect``, as ``plain`` does not keep modules together.
        """
        methods = ("effect",) if self.serving else ("effect", "plain")
        adapters = {method: self.candidate(method, parameters) for method in methods}
        method = min(adapters, key=lambda method: self.error(adapters[method]))
        return method, adapters[method]

    def least(self, error: float) -> Adapter | None:
        """Find the smallest adapter with at most an error on the texts for selection.

        It is looked for by bisection, to a twentieth of its parameters, along the order in which
        directions are taken by ``effect``; ``None`` where the highest ranks do not reach the error.
        """
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
            total = done + max(1, math.ceil(remaining))
            self.report("searching the smallest adapter", done, total)
            done += 1
            middle = round(math.sqrt(low * high)) if low else high // 2
            smaller = self._with_gains(choice.gains(middle))
            if self.error(smaller) <= error:
                adapter, high = smaller, middle
            else:
                low = middle
        self.report("searching the smallest adapter", done, done)
        return adapter

    def descend(self, error: float) -> Iterator[Adapter]:
        """Make adapters from large to small, along the order in which ``effect`` takes directions.

        The first have four times and twice the parameters of the smallest one with a third of an
        error on the texts for selection, as far as the highest ranks allow. Later ones have 15%
        fewer parameters each, and the last none. None of this looks at the texts for stating.
        """
        found = self.least(error / 3)
        low = self.most if found is None else found.parameters
        sizes = [min(4 * low, self.most), min(2 * low, self.most), low]
        while sizes[-1] > self.parameters(1) // 50:
            sizes.append(math.floor(0.85 * sizes[-1]))
        choice, before = choose(self._pool, *self._sketches, sizes[0]), -1
        for size in [*sizes, 0]:
            adapter = self._with_gains(choice.gains(size))
            if adapter.parameters != before:
                yield adapter
            before = adapter.parameters

    def smallest(self, error: float) -> tuple[str, Adapter]:
        """Return ``"effect"`` and what `least` finds, or else `best` at the highest ranks."""
        found = self.least(error)
        return self.best(self.most) if found is None else ("effect", found)

    def put(self, adapter: Adapter) -> None:
        """Give the network the base's weights with this adapter."""
        self.pair.put(self.network, adapter)

    def error(self, adapter: Adapter) -> float:
        """Measure ``η`` on the texts for selection."""
        self.put(adapter)
        return self.select.error(self.network)

    def compare(self, adapter: Adapter) -> Compared:
        """Compare an adapter with the tuned network on the texts on which errors are stated."""
        self.put(adapter)
        return self.test.compare(self.network)

    def measure(self, adapter: Adapter) -> Measured:
        """Measure what an adapter loses on the texts for stating."""
        return self.test.summarize(self.compare(adapter), seed=self.seed)

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

    @torch.no_grad()
    def _pass_texts(self) -> dict[str, Tensor]:
        """Record both networks on texts; the mean inputs of modules whose biases are free."""
        free = [name for name, module in self.modules.items() if self.pair.frees_bias(module)]
        sums = {name: torch.zeros(self.modules[name].shape[1]) for name in free}
        fit, stated = self.fit.batches if free else (), (self.select, self.test)
        passes = len(fit) + 2 * sum(len(each.batches) for each in stated)
        tokens = done = 0
        self.report("passing texts", done, passes)
        with watch(self.network, free) as seen:
            for batch in fit:
                self.readout.states(self.network, batch)
                number = int(batch.attention_mask.sum())
                tokens += number
                for name, (inputs, _) in seen.items():
                    sums[name] += number * batch.rows(inputs).mean(0).cpu()
                self.report("passing texts", done := done + 1, passes)
        for reference in stated:
            reference.record_tuned(self.network)
            self.report("passing texts", done := done + len(reference.batches), passes)
        self.pair.fill(self.network, "base")
        for reference in stated:
            reference.record_base(self.network)
            self.report("passing texts", done := done + len(reference.batches), passes)
        return {name: summed / tokens for name, summed in sums.items()}

    @functools.cached_property
    def _pool(self) -> Pool:
        return Pool(self.directions, self.modules, self.bucket, serving=self.serving)

    @functools.cached_property
    def _sketches(self) -> tuple[Tensor, Tensor]:
        """Derivatives at the tuned network, for fitting and for selection."""
        self.pair.fill(self.network, "tuned")
        tell = functools.partial(self.report, "derivatives at the tuned model")
        draws = (randomness.number(self.seed, f"sketch to {which}") for which in ("fit", "select"))
        fit, select = (
            sketch(self.network, self._pool, reference, seed=seed, report=tell)
            for reference, seed in zip((self.fit, self.select), draws, strict=True)
        )
        return fit, select

    def _truncate(self, method: str, parameters: int) -> Adapter:
        """The adapter of the leading singular directions, of ranks by a method."""
        if method == "uniform":
            fitting = [r for r in range(1, self.max_rank + 1) if self.parameters(r) <= parameters]
            ranks = _uniform(self.modules, max(fitting, default=1))
        elif method == "energy":
            ranks = _by_energy(self.directions, self.modules, parameters)
        else:
            values = {name: found.values for name, found in self.directions.items()}
            ranks = metrics.allocate(values, self.modules, self.bucket).ranks(parameters)
        factors = {
            name: _balance(found.update.leading(ranks[name]))
            for name, found in self.directions.items()
            if name in ranks
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
            if self.serving and kept.any():
                factors[name] = _pad(factors[name], self.max_rank)
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


def _pad(update: LowRank, rank: int) -> LowRank:
    """The same update with columns of zeros up to a rank."""
    zeros = (0, rank - update.rank)
    return LowRank(*(nn.functional.pad(side, zeros) for side in (update.left, update.right)))


def _decompose(pair: Pair, name: str, most: int, mean: Tensor | None) -> Directions:
    """The leading singular directions of a change, about a mean input, in float32."""
    update = pair.update(name)
    if update is None or not update.rank:
        found = metrics.directions(pair.change(name), None, most)
    else:
        Q, left = torch.linalg.qr(update.left.double())
        P, right = torch.linalg.qr(update.right.double())
        core = metrics.directions(left @ right.mT, None, most)
        found = core._replace(update=LowRank(Q @ core.update.left, P @ core.update.right))
    out, into = pair.modules[name].shape
    shift = torch.zeros(out) if mean is None else pair.change(name) @ mean
    return found._replace(mean=torch.zeros(into) if mean is None else mean, shift=shift).single()


def _cost(ranks: Mapping[str, int], modules: Mapping[str, Module]) -> int:
    """Numbers in factors of these ranks: ``Σ_m r_m (out_m + in_m)``."""
    return sum(modules[name].cost * rank for name, rank in ranks.items())


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
    low, high = 0.0, 1.0
    ranks = dict.fromkeys(shares, 1)
    for _ in range(40):
        middle = (low + high) / 2
        trial = {n: min(int((s < middle).sum()) + 1, len(s)) for n, s in shares.items()}
        if _cost(trial, modules) <= parameters:
            low, ranks = middle, trial
        else:
            high = middle
    return ranks


def _require_leave(pair: Pair, leave: Collection[str]) -> None:
    """Refuse to leave out what is no kind, or a head that the base lacks."""
    if unknown := [kind for kind in leave if kind not in KINDS]:
        raise InputError("leave", allowed=f"among {', '.join(KINDS)}", value=unknown[0])
    lacking = [o.name for o in pair.others if o.kind == "head" and not pair.base.has(o.name)]
    if lacking and "head" in leave:
        raise InputError(
            "leave",
            allowed="without head, as the base has none",
            given=f"head, which is {listed(lacking)} of the tuned model",
            remedy="name a base with this head, or ask for a format that has a place for it",
        )


def _choose_modules(pair: Pair, modules: str) -> dict[str, Module]:
    """The modules of a pair that ``"all"``, a kind or a regular expression names."""
    words = {name: word for name, word in pair.words.items() if word.kind not in pair.leave}
    candidates = pair.modules | words
    if modules == "all":
        return candidates
    chosen = {}
    if modules in ("attention", "mlp"):
        chosen = {n: module for n, module in candidates.items() if module.kind == modules}
    else:
        with contextlib.suppress(re.error):
            chosen = {n: module for n, module in candidates.items() if re.search(modules, n)}
    if not chosen:
        allowed = "all, attention, mlp, or a regular expression for at least one of"
        raise InputError("modules", allowed=f"{allowed} {', '.join(candidates)}", value=modules)
    return chosen
