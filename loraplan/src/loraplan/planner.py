"""A pair and its texts, prepared: candidates for any number of parameters, and their errors."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from . import _checks, _effect, _randomness
from ._effect import Directions, GreedySelection, Moments
from ._errors import InputError
from ._limits import are_alike, quantile
from ._lowrank import LowRank
from ._measuring import Measurement, Readout, TunedOutputs, measure_networks
from ._models import listed, require_device, require_memory
from ._streams import TextStates, advance, stream
from ._texts import TOKENS, Text, count_tokens, prepare
from .pair import KINDS, LARGE, Adapter, Module, Pair

#: Receives progress: the stage in words, the steps done, and their number.
Report: TypeAlias = Callable[[str, int, int], None]
# Texts that pass adapted networks, by their names in a `Planner`.
Part: TypeAlias = Literal["planned", "select", "test"]
# Sizes that are tried first, in units of the smallest one that should be certified; each later one
# has this part of the size before.
_FIRST, _STEP = (4, 2.8, 2, 1.4, 1), 0.8
# Bytes of memory that a process takes with all libraries.
_LIBRARIES = 0.5e9
# The part of the aim that this smallest one loses on texts for selection.
_SAFE = 0.6
# And about the error over all texts, in units of what nine of ten lose at most.
_TYPICAL = 0.75
# Many random outputs of each text, for a thorough plan.
_THOROUGH = 16


class Planner:
    """A pair of checkpoints and texts to plan adapters with.

    Candidates are made with some of the ``texts``, selected by others (``select``), and certified
    by the rest (``test``). All pass networks block by block, of which memory holds one. Raises
    `InputError` for too few texts, for unknown kinds and modules, and for ranks out of range.

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
        differentiated; otherwise either have about 4,096 tokens, or as many as 61 texts have.
    max_rank : int
        The highest rank of a module.
    device, report
        Where texts pass, and what receives progress: the stage, the steps done, their number.

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
        seed: int = 0,
        device: str = "cpu",
        report: Report | None = None,
    ) -> None:
        """Pass texts through both networks."""
        thorough = _checks.flag("thorough", thorough)
        self.max_rank = _checks.integer("max_rank", max_rank, 1)
        self.device = require_device(device)
        self.seed, self.report = seed, report or (lambda *_: None)
        self.modules = _choose_modules(pair, modules, leave)
        self.options = {"modules": modules, "leave": sorted(leave), "tokens": tokens}
        self.options |= {"thorough": thorough, "max_rank": max_rank, "seed": seed}
        self.pair = pair = replace(pair, leave=frozenset(leave)).with_words(self.modules)
        self.texts = prepare(pair, texts, held_out, tokens=tokens, thorough=thorough, seed=seed)
        self.probes = _THOROUGH if thorough else _effect.PROBES
        memory = require_memory(self._memory())
        self.readout = Readout(stream(pair, "tuned", self.device))
        # The largest size so far, and the directions for it.
        self._selection: tuple[int, GreedySelection] | None = None
        self._pass_texts(f"passing texts ({memory})")
        # Of other texts than those that certify, so that the losses of these are independent.
        self.test.typical = math.sqrt(self.select.effect.mean())

    @property
    def equal(self) -> bool:
        """Whether both checkpoints have equal outputs on all texts for selecting and stating."""
        return not (self.select.effect.any() or self.test.effect.any())

    @property
    def most(self) -> int:
        """How many numbers the highest ranks take."""
        return self.parameters(self.max_rank)

    def parameters(self, rank: int) -> int:
        """Count the numbers that one rank for all modules, at most their smaller side, takes."""
        return sum(module.cost * min(rank, *module.shape) for module in self.modules.values())

    @property
    def weighted(self) -> dict[str, Directions]:
        """The leading directions of all changes, in the metrics of inputs and outputs."""
        return self._differentiated[0]

    def candidate(self, parameters: int) -> Adapter:
        """Make an adapter with at most so many parameters, chosen by its effect on outputs.

        Weighted directions of all modules' changes are taken by what they add to the effect for
        their cost, and gains are fitted to all of them at once [prop-sketch].
        """
        choice = _effect.choose(self.candidates, *self.sketches, parameters)
        return self.with_gains(choice.gains(parameters))

    def no_worse(self, adapter: Adapter) -> Adapter:
        """Take an adapter or, if its `error` is less, the one of rank 0 everywhere.

        That differs from the base by what adapters carry beside factors, and derivatives at the
        tuned network say little of so large a step.
        """
        nothing = self.with_gains(torch.zeros_like(self.candidates.costs))
        return min(nothing, adapter, key=self.error) if adapter.factors else adapter

    def uniform(self, parameters: int) -> Adapter:
        """Make the adapter of one rank for all modules, at least 1, for at most so many numbers.

        It has the leading singular directions of each change.
        """
        ranks = range(1, self.max_rank + 1)
        rank = max((r for r in ranks if self.parameters(r) <= parameters), default=1)
        factors = {n: _balance(self._decompose(n, most=rank).update) for n in self.modules}
        return Adapter(factors, {})

    def smallest(
        self, error: float, lost: Callable[[NDArray[np.float64]], float] | None = None
    ) -> Adapter:
        """Find the smallest adapter that loses at most ``error``.

        What it loses is what ``lost`` says of squared distances on the texts for selection, by
        default its `error`. It is looked for by bisection, to a twentieth of its parameters, along
        the order in which `candidate` takes directions. Where the highest ranks do not reach the
        error, theirs is returned or, if that loses less, the adapter of rank 0 everywhere.
        """
        lost, sketches = lost or self.select.error, self.sketches
        self.report("searching the smallest adapter", 0, 7)
        numbers = [self.parameters(1) * 2**k // 16 for k in range(13)]
        numbers = [number for number in numbers if number < self.most] + [self.most]
        square = (_TYPICAL * error) ** 2 * float(self.select.effect.mean())
        high = _effect.predict_least(self.candidates, *sketches, square, numbers)
        # The same is found whatever was asked before.
        self._selection = None
        low = done = 0
        while True:
            adapter = self.at(high)
            if lost(self.run((adapter, "select"))[0].squares) <= error:
                break
            if high == self.most:
                return self.no_worse(adapter)
            low, high = high, min(2 * high, self.most)
        while high > 1.05 * low + self.parameters(1) // 50:
            steps = math.log(high / low) / math.log(1.05) if low else 2**6
            total = done + max(1, math.ceil(math.log2(steps)))
            self.report("searching the smallest adapter", done, total)
            done += 1
            size = round(low**0.5 * high**0.5 if low else high / 2)
            if size in (low, high):
                break
            smaller = self.at(size)
            if lost(self.run((smaller, "select"))[0].squares) > error:
                low = size
            else:
                adapter, high = smaller, size
        self.report("searching the smallest adapter", done, done)
        return adapter

    def sizes(self, aim: float, *, estimate: bool = False) -> tuple[list[int], int]:
        """List sizes of adapters, from large to small, and the place to begin at.

        To certify, begin with 4, 2.8, 2 and 1.4 times the parameters of the smallest adapter that
        loses 0.6 times the aim on the texts for selection: in all and on nine of ten texts. To
        ``estimate``, begin with the smallest that loses the aim there. Later ones have 20% fewer
        parameters each, and the last none. None of this looks at the texts for stating.
        """
        select = self.select

        def lost(squares: NDArray[np.float64]) -> float:
            """The error, or what nine of ten texts lose at most if that is more."""
            return max(select.error(squares), quantile(select.losses(squares)))

        if estimate:
            # From nothing no step leads to more.
            low = max(self.smallest(aim).parameters, self.parameters(1) // 16)
            times = [_STEP**-k for k in range(60)]
        else:
            low, times = self.smallest(_SAFE * aim, lost).parameters, [*_FIRST]
        sizes = sorted({min(round(each * low), self.most) for each in times}, reverse=True)
        start = sizes.index(min(low, self.most)) if estimate else 0
        while sizes[-1] > self.parameters(1) // 50:
            sizes.append(math.floor(_STEP * sizes[-1]))
        return [*sizes, 0], start

    def at(self, parameters: int) -> Adapter:
        """Make an adapter along the order of directions for the largest size asked for so far."""
        if self._selection is None or parameters > self._selection[0]:
            self._selection = (
                parameters,
                _effect.choose(self.candidates, *self.sketches, parameters),
            )
        return self.with_gains(self._selection[1].gains(parameters))

    def run(self, *adapters: tuple[Adapter, Part]) -> list[Measurement]:
        """Pass texts through the base with an adapter; all of these together, block by block."""
        networks = ((stream(self.pair, adapter, self.device), part) for adapter, part in adapters)
        return measure_networks([(network, getattr(self, part)) for network, part in networks])

    def error(self, adapter: Adapter) -> float:
        """Measure ``η`` on the texts for selection."""
        return self.select.error(self.run((adapter, "select"))[0].squares)

    def neighbours_alike(self, squares: NDArray[np.float64]) -> bool:
        """Whether neighbouring texts for planning lose so alike that they may be of one group.

        Always false for texts in groups. It is true for one plan in 100 if texts are independent.
        """
        places = torch.cat([batch.places for batch in self.planned.batches])
        return not self.texts.grouped and are_alike(squares[places.argsort()])

    def losses(self, gains: Float[Tensor, " directions"]) -> dict[str, float]:
        """Predict for each module the part of the effect that its missing directions would cost.

        These are of all `candidates`, with gains as those of an `Adapter`. Each module is taken
        alone, to first order at the tuned network, on texts for selection.
        """
        _, held = self.sketches
        whole = float(self.select.effect.mean())
        places = self.candidates.places.items()
        parts = {n: _effect.predict(held[:, place], gains[place]) for n, place in places}
        return {n: math.sqrt(part / whole) if whole else 0.0 for n, part in parts.items()}

    def _memory(self) -> float:
        """About how many bytes of memory the work takes: it holds a block's weights, not all."""
        skeleton = self.pair.skeleton()
        blocks = skeleton.get_submodule(self.pair.blocks)
        tokens = count_tokens([*self.texts.fit, *self.texts.select])
        numbers = (
            sum(value.numel() for value in blocks[0].parameters())
            + 3 * min(max(math.prod(module.shape) for module in self.modules.values()), LARGE)
            + tokens * skeleton.config.hidden_size * (len(blocks) + self.probes)
            + self.max_rank * sum(module.cost for module in self.modules.values())
            # Logits of some rows and words, and what is computed of them.
            + 2**26 * (self.pair.task == "language")
        )
        return _LIBRARIES + 4 * numbers

    def _pass_texts(self, stage: str) -> None:
        """Record both networks on the texts, the base not to fit to."""
        fit, select, stated = self.texts[:3]
        self._tuned = TextStates(
            self.readout.network, [*fit, *select, *stated], len(fit) + len(select)
        )
        base = TextStates(stream(self.pair, "base", self.device), [*select, *stated])
        advance([self._tuned, base], functools.partial(self.report, stage))
        parts = [*fit, *select], select, stated
        ends = slice(len(parts[0])), slice(len(fit), len(parts[0])), slice(len(parts[0]), None)
        states = (self._tuned.states[end] for end in ends)
        self.planned, self.select, self.test = map(TunedOutputs, parts, 3 * [self.readout], states)
        self.select.record(base.network, base.states[: len(select)])
        self.test.record(base.network, base.states[len(select) :])

    @functools.cached_property
    def candidates(self) -> _effect.Candidates:
        """Directions of all changes, side by side."""
        return _effect.Candidates(self.weighted, self.modules)

    @property
    def sketches(self) -> tuple[Tensor, Tensor]:
        """Derivatives at the tuned network, for fitting and for selection."""
        return self._differentiated[1:]

    @functools.cached_property
    def _differentiated(self) -> tuple[dict[str, Directions], Tensor, Tensor]:
        """Directions of all modules, and sketches of their effect to fit to and to select by."""
        seeds = (_randomness.number(self.seed, f"sketch to {part}") for part in ("fit", "select"))
        draws = [_randomness.generator(seed, "sketch") for seed in seeds]
        fit = len(self.texts.fit)

        def draw(i: int, values: Tensor) -> list[Tensor]:
            texts = len(self._tuned.batches[i].places)
            return _effect.draw_rows(draws[i >= fit], values, texts, self.probes)

        slopes = self.slopes(self.modules)
        tell = functools.partial(self.report, "directions of changes and their derivatives")
        rows = slopes.collect_derivatives(self._decompose, draw, seed=self.seed, report=tell)
        weighted = {name: slopes.directions[name] for name in self.modules}
        # They take much memory, and a later look at moments can have them again.
        self._tuned.kept = []
        return weighted, torch.cat(rows[:fit]), torch.cat(rows[fit:])

    def slopes(self, modules: Mapping[str, Module]) -> _effect.Slopes:
        """Derivatives of the tuned network's outputs on the texts for planning."""
        if not self._tuned.kept:
            batches = self.planned.batches
            self._tuned = TextStates(self.readout.network, batches, len(batches))
            advance([self._tuned])
        # Texts of all lengths, of about as many tokens as moments are taken over.
        number = len(self.texts.fit)
        step = min(max(1, round(count_tokens(self.texts.fit) / _effect.MOMENT_TOKENS)), number)
        taking = range(number)[step // 2 :: step]
        known = {name: self._decompose(name) for name in modules if name in self.pair.words}
        return _effect.Slopes(self._tuned, self.readout, modules, known, taking)

    def _decompose(self, name: str, about: Moments | None = None, most: int = 0) -> Directions:
        """The leading directions of a change, at most so many, or ``max_rank``."""
        change, bias = self.pair.multiplier(name), self.pair.frees_bias(self.modules[name])
        return _effect.find_directions(change, about, most or self.max_rank, bias=bias)

    def with_gains(self, gains: Tensor) -> Adapter:
        """The adapter that takes directions of all changes with these gains."""
        factors, biases = {}, {}
        for name, place in self.candidates.places.items():
            found, parts = self.weighted[name], gains[place].float()
            kept = parts != 0
            left, right = found.update.left[:, kept] * parts[kept], found.update.right[:, kept]
            if kept.any():
                factors[name] = _balance(LowRank(left.double(), right.double()))
            if self.pair.frees_bias(self.modules[name]):
                tuned = self.pair.tuned.read(f"{name}.bias")
                biases[name] = (tuned + found.shift - left @ (right.mT @ found.mean)).float()
        return Adapter(factors, biases, gains)


def _balance(update: LowRank) -> LowRank:
    """The same update in float32, with factors of equal singular values, ``UΣ^{1/2}, VΣ^{1/2}``."""
    Q, S = torch.linalg.qr(update.left)
    P, T = torch.linalg.qr(update.right)
    U, values, Vh = torch.linalg.svd(S @ T.mT)
    half = values.sqrt()
    return LowRank((Q @ U * half).float(), (P @ Vh.mT * half).float())


def _choose_modules(pair: Pair, modules: str, leave: Collection[str]) -> dict[str, Module]:
    """The modules of a pair that get factors, of those that do not ``leave`` the base."""
    if isinstance(leave, str) or not isinstance(leave, Collection):
        raise InputError("leave", f"a list of kinds among {', '.join(KINDS)}", value=leave)
    if unknown := [kind for kind in leave if kind not in KINDS]:
        raise InputError("leave", f"among {', '.join(KINDS)}", value=unknown[0])
    lacking = [o.name for o in pair.others if o.kind == "head" and not pair.base.has(o.name)]
    if lacking and "head" in leave:
        allowed = "one with a head, where adapters leave it alone (leave, --format serving)"
        remedy = "save it with the tuned model's head and name that, to plan with and to serve, "
        remedy += "or write the head too (--format peft, no --leave head)"
        raise InputError("base", allowed, f"one without {listed(lacking)}", remedy)
    words = {name: word for name, word in pair.words.items() if word.kind not in leave}
    candidates, chosen = pair.modules | words, dict[str, Module]()
    # Of a wrong expression, or none, there are none.
    with contextlib.suppress(re.error, TypeError):
        for name, module in candidates.items():
            kinds = modules in ("attention", "mlp")
            if modules == "all" or (module.kind == modules if kinds else re.search(modules, name)):
                chosen[name] = module
    if not chosen:
        allowed = "all, attention, mlp, or a regular expression for at least one of"
        raise InputError("modules", f"{allowed} {', '.join(candidates)}", value=modules)
    return chosen
