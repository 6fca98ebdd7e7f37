"""A pair and its texts, prepared: candidates for any number of parameters, and their errors."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .. import _checks, randomness
from ..errors import InputError
from ..lowrank import LowRank
from . import _metrics
from ._effect import PROBES, Pool, choose, predict, predict_least, sketch
from ._limits import are_alike, quantile, ratio
from ._measuring import Compared, Measured, Readout, Reference
from ._metrics import Directions, Moments
from ._models import listed, require_device, require_memory
from ._reading import Text
from ._texts import LOAD, TOKENS, count_tokens, prepare
from .pair import KINDS, Adapter, Module, Pair

#: Types of weights in which errors can be stated.
DTYPES = "float32", "bfloat16"
#: Receives progress: the stage in words, the steps done, and their number.
Report: TypeAlias = Callable[[str, int, int], None]
# Sizes that are tried first, in units of the smallest one that should be certified; each later one
# has this part of the size before.
_FIRST, _STEP = (4, 2, 1), 0.8
# The part of the aim that this smallest one loses on texts for selection.
_SAFE = 0.6
# And about the error over all texts, in units of what nine of ten lose at most.
_TYPICAL = 0.75
# About how often texts for selecting, for stating and for moments are passed, or what takes as
# long; and what one more random output costs of a pass. Measured on a language model.
_SELECTED, _STATED, _MOMENTS, _BACK = 27, 14, 7, 0.7
# Many random outputs of each text, for a thorough plan.
_THOROUGH = 16


class Planner:
    """A pair of checkpoints and texts to plan adapters with.

    Its methods replace the weights of its ``network``, of transformers. Candidates are made with
    the texts of ``fit`` and ``select``, and certified by those of ``test``. Raises `InputError` for
    too few texts, for unknown kinds and modules, and for ranks out of range.

    Parameters
    ----------
    pair, texts, held_out
        The base and what was tuned from it; at least 122 texts, or 61 and as many others, held out,
        to certify with. Of texts in groups (`Text`) as many groups.
    modules : str
        The modules that get factors: ``"all"``, ``"attention"``, ``"mlp"``, or a regular expression
        that is searched for in names. Other linear ones stay the base's, and other ``words`` of the
        pair are carried row by row.
    leave : collection of str
        Kinds of other parameters (``others`` of a `Pair`) that stay the base's.
    tokens, seed : int
        Texts are cut off after so many tokens. The seed draws texts and probes.
    thorough : bool
        Whether 256 texts are planned with and 251 certify, and twice as many random outputs are
        differentiated; otherwise either have about 3,072 tokens, or as many as 61 texts have.
    max_rank : int
        The highest rank of a module.
    serving : bool
        Whether all factors of `candidate` have the rank ``max_rank``, where need be by zeros, and
        modules that servers compute as one (`Module.fused`) get them together.
    dtype : str
        ``"bfloat16"`` for errors with weights in that too (`rounded`), or ``"float32"``.
    device, report
        Where the network is, and what receives progress: the stage, the steps done, their number.

    Attributes
    ----------
    modules : dict
        The modules that get factors, by name.
    weighted : dict
        The leading `Directions` of their changes of which `candidate` chooses: those in the metrics
        of inputs and outputs, and singular ones for embeddings and heads.
    """

    def __init__(
        self,
        pair: Pair,
        texts: Sequence[str | Text],
        *,
        held_out: Sequence[str | Text] | None = None,
        modules: str = "all",
        leave: Collection[str] = (),
        tokens: int = TOKENS,
        thorough: bool = False,
        max_rank: int = 64,
        serving: bool = False,
        seed: int = 0,
        dtype: str = "float32",
        device: str = "cpu",
        report: Report | None = None,
    ) -> None:
        """Pass texts through both networks."""
        _require_leave(pair, leave)
        _checks.choice("dtype", dtype, DTYPES)
        self.options = {
            "modules": modules,
            "leave": sorted(leave),
            "tokens": tokens,
            "thorough": thorough,
            "max_rank": max_rank,
            "serving": serving,
            "seed": seed,
            "dtype": dtype,
        }
        self.serving, self.max_rank = serving, _checks.integer("max_rank", max_rank, 1)
        self.device = require_device(device)
        self.seed, self.report = seed, report or (lambda *_: None)
        pair = replace(pair, leave=frozenset(leave))
        self.modules = _choose_modules(pair, modules)
        if serving:
            together = {module.fused for module in self.modules.values()}
            self.modules = {n: m for n, m in pair.modules.items() if m.fused in together}
        self.pair = pair = pair.with_words(self.modules)
        self.texts = prepare(pair, texts, held_out, tokens=tokens, thorough=thorough, seed=seed)
        self.probes = _THOROUGH if thorough else PROBES
        kept = LOAD + min(_metrics.size(self._linear, self.texts.fit), _metrics.KEPT)
        said = require_memory(pair.memory + 4 * kept)
        self.network = pair.network().to(self.device)
        self.readout = Readout(self.network, pair.task)
        # Squared distances of the tuned network in bfloat16, if they are asked for.
        self._floor = np.full(1, math.nan)
        parts = self.texts[:3]
        self.fit, self.select, self.test = (Reference(part, self.readout) for part in parts)
        self._pass_texts(f"passing texts ({said})")
        # Of other texts than those that certify, so that the losses of these are independent.
        self.test.typical = math.sqrt(self.select.effect.mean())

    @property
    def equal(self) -> bool:
        """Whether both checkpoints have equal outputs on all texts for selecting and stating."""
        return not (self.select.effect.any() or self.test.effect.any())

    @property
    def most(self) -> int:
        """How many numbers the highest ranks take."""
        return max(self.parameters(self.max_rank), int(self._pool.costs.sum()))

    def parameters(self, rank: int) -> int:
        """Count the numbers that one rank for all modules, at most their smaller side, takes."""
        return sum(module.cost * min(rank, *module.shape) for module in self.modules.values())

    def moments(self) -> Iterator[tuple[str, Moments]]:
        """Take `Moments` of inputs and outputs at the tuned network, of one module after another.

        Embeddings and heads have none.
        """
        self.pair.fill(self.network, "tuned")
        return _metrics.collect_moments(
            self.network,
            self._linear,
            self.fit.batches,
            self.readout,
            seed=self.seed,
            report=functools.partial(self.report, "directions of changes"),
        )

    @functools.cached_property
    def weighted(self) -> dict[str, Directions]:
        """The leading directions of all changes, in the metrics of inputs and outputs."""
        found = {name: self._decompose(name, known) for name, known in self.moments()}
        return {name: found.get(name) or self._decompose(name) for name in self.modules}

    def candidate(self, parameters: int) -> Adapter:
        """Make an adapter with at most so many parameters, chosen by its effect on outputs.

        Weighted directions of all modules' changes are taken by what they add to the effect for
        their cost, and gains are fitted to all of them at once [prop-sketch].
        """
        choice = choose(self._pool, *self._sketches, parameters)
        return self._with_gains(choice.gains(parameters))

    def uniform(self, parameters: int) -> Adapter:
        """Make the adapter of one rank for all modules, at least 1, for at most so many numbers.

        It has the leading singular directions of each change.
        """
        fitting = [r for r in range(1, self.max_rank + 1) if self.parameters(r) <= parameters]
        rank = max(fitting, default=1)
        factors = {n: _balance(self._decompose(n, most=rank).update) for n in self.modules}
        return Adapter(factors, {})

    def smallest(self, error: float, lost: Callable[[Adapter], float] | None = None) -> Adapter:
        """Find the smallest adapter that loses at most ``error``.

        What it loses is what ``lost`` says, by default its `error` on the texts for selection.
        It is looked for by bisection, to a twentieth of its parameters, along the order in which
        `candidate` takes directions. Where the highest ranks do not reach the error, theirs is
        returned.
        """
        lost, sketches = lost or self.error, self._sketches
        self.report("searching the smallest adapter", 0, 7)
        numbers = [self.parameters(1) * 2**k // 16 for k in range(13)]
        numbers = [number for number in numbers if number < self.most] + [self.most]
        square = (_TYPICAL * error) ** 2 * float(self.select.effect.mean())
        high = predict_least(self._pool, *sketches, square, numbers)
        choice = choose(self._pool, *sketches, high)
        low = done = 0
        while lost(adapter := self._with_gains(choice.gains(high))) > error:
            if high == self.most:
                return adapter
            low, high = high, min(2 * high, self.most)
            choice = choose(self._pool, *sketches, high)
        while high > 1.05 * low + self.parameters(1) // 50:
            remaining = math.log2(math.log(high / low) / math.log(1.05)) if low else 6
            total = done + max(1, math.ceil(remaining))
            self.report("searching the smallest adapter", done, total)
            done += 1
            middle = round(math.sqrt(low * high)) if low else high // 2
            smaller = self._with_gains(choice.gains(middle))
            if lost(smaller) <= error:
                adapter, high = smaller, middle
            else:
                low = middle
        self.report("searching the smallest adapter", done, done)
        return adapter

    def descend(self, aim: float, *, estimate: bool = False) -> Iterator[Adapter]:
        """Make adapters from large to small, along the order in which `candidate` takes directions.

        The first have four times and twice the parameters of the smallest one that loses 0.6 times
        the aim on the texts for selection: in all and, but for an ``estimate``, on nine of ten
        texts. Later ones have 20% fewer parameters each, and the last none. None of this looks at
        the texts for stating.
        """
        lost = self.error if estimate else self._lost
        low = self.smallest(_SAFE * aim, lost).parameters
        sizes = [min(times * low, self.most) for times in _FIRST]
        while sizes[-1] > self.parameters(1) // 50:
            sizes.append(math.floor(_STEP * sizes[-1]))
        choice, before = choose(self._pool, *self._sketches, sizes[0]), -1
        for size in [*sizes, 0]:
            adapter = self._with_gains(choice.gains(size))
            if adapter.parameters != before:
                yield adapter
            before = adapter.parameters

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
        return self.test.summarize(self.compare(adapter))

    def rounded(self, adapter: Adapter) -> tuple[float, float]:
        """Measure ``η`` in bfloat16 on the texts for stating, merged, and of the tuned network.

        NaN unless the planner has this ``dtype``.
        """
        if self.options["dtype"] == "float32":
            return math.nan, math.nan
        self.put(adapter)
        squares = self.test.rounded(self.network), self._floor
        return ratio(squares[0], self.test.effect), ratio(squares[1], self.test.effect)

    def neighbours_alike(self, adapter: Adapter) -> bool:
        """Whether neighbouring texts for planning lose so alike that they may be of one group.

        Always false for texts in groups. It is true for one plan in 100 if texts are independent.
        """
        if self.texts.grouped:
            return False
        self.put(adapter)
        parts = self.fit, self.select
        places = torch.cat([batch.places for part in parts for batch in part.batches])
        squares = np.concatenate([part.squares(self.network) for part in parts])
        return are_alike(squares[places.argsort()])

    def losses(self, adapter: Adapter) -> dict[str, float]:
        """Predict for each module the part of the effect that its missing directions would cost.

        Each is taken alone, to first order at the tuned network, on texts for selection, with the
        directions of `weighted`.
        """
        _, held = self._sketches
        whole = float(self.select.effect.mean())
        lost = {}
        for name, place in self._pool.places.items():
            update = self.weighted[name].update
            gains = torch.zeros(update.rank, dtype=torch.float64)
            if name in adapter.factors:
                # The nearest matrix that is made of the directions, but for those so small that
                # factors in single precision say nothing of them.
                kept = adapter.factors[name]
                left, right = update.left.double(), update.right.double()
                products = (left.mT @ left) * (right.mT @ right)
                wanted = ((left.mT @ kept.left.double()) * (right.mT @ kept.right.double())).sum(1)
                options: dict[str, Any] = {"rcond": 1e-8, "driver": "gelsd"}
                gains = torch.linalg.lstsq(products, wanted[:, None], **options).solution[:, 0]
            part = predict(held[:, place], gains)
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

    @property
    def _linear(self) -> list[Module]:
        return [module for name, module in self.modules.items() if name not in self.pair.words]

    def _lost(self, adapter: Adapter) -> float:
        """The error on texts for selection, or what nine of ten of them lose at most if more."""
        self.put(adapter)
        squares = self.select.squares(self.network)
        return max(ratio(squares, self.select.effect), quantile(self.select.losses(squares)))

    def _pass_texts(self, stage: str) -> None:
        """Record both networks on the texts, the base not to fit to; say how long all may take."""
        start = time.perf_counter()
        self.report(stage, 0, 4)
        self.select.record_tuned(self.network)
        seconds = time.perf_counter() - start
        fit, select, stated = map(count_tokens, self.texts[:3])
        passes = (
            2 * fit
            + _SELECTED * select
            + _STATED * stated
            + _MOMENTS * min(fit, _metrics.TOKENS)
            + _BACK * self.probes * (fit + select)
        )
        stage = f"passing texts, of about {passes * seconds / select:.0f} s in all"
        self.report(stage, 1, 4)
        self.fit.record_tuned(self.network)
        self.test.record_tuned(self.network)
        if self.options["dtype"] == "bfloat16":
            self._floor = self.test.rounded(self.network)
        self.report(stage, 2, 4)
        self.network = self.pair.to_base(self.network)
        for done, reference in enumerate((self.select, self.test), 3):
            reference.record_base(self.network)
            self.report(stage, done, 4)

    @functools.cached_property
    def _pool(self) -> Pool:
        return Pool(self.weighted, self.modules, self.max_rank if self.serving else None)

    @functools.cached_property
    def _sketches(self) -> tuple[Tensor, Tensor]:
        """Derivatives at the tuned network, for fitting and for selection."""
        pool = self._pool
        self.pair.fill(self.network, "tuned")

        def derive(which: str, reference: Reference) -> Tensor:
            tell = functools.partial(self.report, f"derivatives, to {which}")
            seed = randomness.number(self.seed, f"sketch to {which}")
            return sketch(self.network, pool, reference, probes=self.probes, seed=seed, report=tell)

        return derive("fit", self.fit), derive("select", self.select)

    def _decompose(
        self, name: str, about: Moments | None = None, most: int | None = None
    ) -> Directions:
        """The leading directions of a change, at most so many, or ``max_rank``."""
        update, most = self.pair.update(name), self.max_rank if most is None else most
        if update is not None and update.rank:
            # Others of an adapter's change are rounding.
            most = min(most, update.rank)
        bias = self.pair.frees_bias(self.modules[name])
        return _metrics.find_directions(self.pair.change(name), about, most, bias=bias)

    def _with_gains(self, gains: Tensor) -> Adapter:
        """The adapter that takes directions of all changes with these gains."""
        factors, biases = {}, {}
        for name, place in self._pool.places.items():
            found, parts = self.weighted[name], gains[place].float()
            kept = parts != 0
            left, right = found.update.left[:, kept] * parts[kept], found.update.right[:, kept]
            if kept.any():
                update = _balance(LowRank(left.double(), right.double()))
                if self.serving:
                    zeros = (0, self.max_rank - update.rank)
                    sides = update.left, update.right
                    update = LowRank(*(nn.functional.pad(side, zeros) for side in sides))
                factors[name] = update
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


def _require_leave(pair: Pair, leave: Collection[str]) -> None:
    """Refuse to leave out what is no kind, or a head that the base lacks."""
    if unknown := [kind for kind in leave if kind not in KINDS]:
        raise InputError("leave", allowed=f"among {', '.join(KINDS)}", value=unknown[0])
    lacking = [o.name for o in pair.others if o.kind == "head" and not pair.base.has(o.name)]
    if lacking and "head" in leave:
        raise InputError(
            "base",
            allowed="one with a head, where adapters leave it alone (leave, --format serving)",
            given=f"one without {listed(lacking)}",
            remedy="save it with the tuned model's head and name that, to plan with and to serve, "
            "or write the head too (--format peft, no --leave head)",
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
