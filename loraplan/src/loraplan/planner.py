"""A pair and its texts, prepared: candidates for any number of parameters, and their errors."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from . import _checks, _effect, _randomness
from ._effect import Directions, GreedySelection, Moments
from ._errors import InputError
from ._lowrank import LowRank
from ._measuring import Measurement, Readout, TunedOutputs, measure_networks, sum_by_text
from ._models import Rows, listed, require_device, require_memory
from ._streams import TextStates, advance, stream
from ._texts import TOKENS, Text, count_tokens, prepare
from .pair import KINDS, LARGE, Adapter, Module, Pair, Reader

#: Receives progress: the stage in words, the steps done, and their number.
Report: TypeAlias = Callable[[str, int, int], None]
# Texts that pass adapted networks, by their names in a `Planner`.
Part: TypeAlias = Literal["planned", "select", "test"]
# Sizes that are tried first, in units of the smallest one that should do; each later one has this
# part of the size before.
_FIRST, _STEP = (4, 2.8, 2, 1.4, 1), 0.8
# Bytes of memory that a process takes with all libraries.
_LIBRARIES = 0.5e9
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
        to certify with. Of texts in groups (`Text`) as many groups. Digests of texts divide them.
    modules : str
        The modules that get factors: ``"all"``, ``"attention"``, ``"mlp"``, or a regular expression
        that is searched for in names. Other linear ones stay the base's, and other ``words`` of the
        pair are rows of embeddings or heads.
    carry : {"chosen", "all", "none"}
        Which other parameters that tuning changed (``others`` of a `Pair`) adapters carry. Biases,
        norms, rows of embeddings and heads are ``"chosen"`` like directions, each kind by what it
        adds to the effect for its numbers; a head that is no module is always carried.
    tokens : int
        Texts are cut off after so many tokens.
    answers : bool
        Whether prompts without an ``answer`` get the tuned model's own (`Pair.respond`).
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
        carry: str = "chosen",
        tokens: int = TOKENS,
        answers: bool = False,
        thorough: bool = False,
        max_rank: int = 64,
        device: str = "cpu",
        report: Report | None = None,
    ) -> None:
        """Pass texts through both networks."""
        thorough = _checks.flag("thorough", thorough)
        _checks.choice("carry", carry, ["chosen", "all", "none"])
        self.max_rank = _checks.integer("max_rank", max_rank, 1)
        self.device = require_device(device)
        self.carry, self.report = carry, report or (lambda *_: None)
        self.modules = _choose_modules(pair, modules, carry)
        self.options = {"modules": modules, "carry": carry, "tokens": tokens}
        self.options |= {"thorough": thorough, "max_rank": max_rank}
        self.pair = pair = pair.with_words(self.modules)
        tell = functools.partial(self.report, "answering prompts")
        respond = functools.partial(pair.respond, report=tell)
        self.texts = prepare(
            pair,
            texts,
            held_out,
            tokens=tokens,
            thorough=thorough,
            respond=respond if _checks.flag("answers", answers) else None,
        )
        self.probes = _THOROUGH if thorough else _effect.PROBES
        memory = require_memory(self._memory())
        self.readout = Readout(stream(pair, "tuned", self.device))
        # The largest size so far, and the directions for it.
        self._selection: tuple[int, GreedySelection] | None = None
        self._pass_texts(f"passing texts ({memory})")

    @property
    def equal(self) -> bool:
        """Whether both checkpoints have equal outputs on all texts for selection."""
        return not self.select.effect.any()

    @property
    def most(self) -> int:
        """How many numbers the highest ranks take, with all else that is chosen."""
        return self.parameters(self.max_rank) + sum(self.costs.values())

    @functools.cached_property
    def carried(self) -> tuple[str, ...]:
        """Kinds that are always carried, such as heads, which states say nothing of."""
        pair = self.pair
        heads = {o.kind for o in pair.others if o.name in pair.head or not pair.base.has(o.name)}
        return {"all": KINDS, "none": (), "chosen": tuple(sorted(heads))}[self.carry]

    @functools.cached_property
    def costs(self) -> dict[str, int]:
        """How many numbers a file has of each kind of other parameters that is to be chosen.

        Biases are written all together, and of norms and heads whole modules.
        """
        if self.carry != "chosen":
            return {}
        network = self.pair.skeleton("base")
        sizes = {name: value.numel() for name, value in network.named_parameters()}
        kinds = dict[str, dict[str, int]]()
        for other in self.pair.others:
            if other.kind in self.carried:
                continue
            owner, parts = other.name.rpartition(".")[0], kinds.setdefault(other.kind, {})
            if other.kind in ("norm", "head"):
                names = (name for name in sizes if name.startswith(f"{owner}."))
                parts |= {name: sizes[name] for name in names}
            else:
                parts[other.name] = other.size
        if "bias" in kinds or any(module.bias for module in self.modules.values()):
            kinds["bias"] = {name: sizes[name] for name in sizes if name.endswith(".bias")}
        return {kind: sum(parts.values()) for kind, parts in kinds.items()}

    def parameters(self, rank: int) -> int:
        """Count the numbers that one rank for all modules, at most their smaller side, takes."""
        return sum(module.cost * min(rank, *module.shape) for module in self.modules.values())

    @property
    def weighted(self) -> dict[str, Directions]:
        """The leading directions of all changes, in the metrics of inputs and outputs."""
        return self._differentiated[0]

    def candidate(self, parameters: int) -> Adapter:
        """Make an adapter with at most so many numbers, chosen by its effect on outputs.

        Weighted directions of all modules' changes, and what is carried beside them, are taken by
        what they add to the effect for their cost, and gains are fitted to all of them at once
        [prop-sketch].
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

    def smallest(self, error: float) -> Adapter:
        """Find the smallest adapter whose `error` is at most this.

        It is looked for by bisection, to a twentieth of its numbers, along the order in which
        `candidate` takes directions. Where the highest ranks do not reach the error, theirs is
        returned or, if that loses less, the adapter of rank 0 everywhere.
        """
        number = self._least(lambda found: self.select.error(found.squares) / error, error)
        return self.no_worse(self.at(number)) if number == self.most else self.at(number)

    def _least(self, lost: Callable[[Measurement], float], error: float) -> int:
        """Find the fewest numbers, or the most, that lose at most 1 on texts for selection.

        An ``error`` that this may need is where the search begins.
        """
        self.report("searching the smallest adapter", 0, 7)
        numbers = [self.parameters(1) * 2**k // 16 for k in range(13)]
        numbers = [number for number in numbers if number < self.most] + [self.most]
        square = error**2 * float(self.select.effect.mean())
        high = _effect.predict_least(self.candidates, *self.sketches, square, numbers)
        # The same is found whatever was asked before.
        self._selection = None
        low = done = 0

        def holds(number: int) -> bool:
            return lost(self.run((self.at(number), "select"))[0]) <= 1

        while high < self.most and not holds(high):
            low, high = high, min(2 * high, self.most)
        while high > 1.05 * low + self.parameters(1) // 50:
            steps = math.log(high / low) / math.log(1.05) if low else 2**6
            total = done + max(1, math.ceil(math.log2(steps)))
            self.report("searching the smallest adapter", done, total)
            done += 1
            size = round(low**0.5 * high**0.5 if low else high / 2)
            if size in (low, high):
                break
            low, high = (low, size) if holds(size) else (size, high)
        self.report("searching the smallest adapter", done, done)
        return high

    def sizes(self, lost: Callable[[Measurement], float], error: float) -> list[int]:
        """List numbers of adapters to try, from large to small [prop-certificate].

        They begin with 4, 2.8, 2 and 1.4 times those of the smallest adapter that loses at most 1
        on the texts for selection, by a measure that an ``error`` about suffices for. Later ones
        have 20% fewer each, and the last none. None of this looks at the texts to certify with.
        """
        low = self._least(lost, error)
        sizes = sorted({min(round(each * low), self.most) for each in _FIRST}, reverse=True)
        while sizes[-1] > self.parameters(1) // 50:
            sizes.append(math.floor(_STEP * sizes[-1]))
        return [*sizes, 0]

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
        """Directions of all changes, side by side, and then what may be carried."""
        return _effect.Candidates(self.weighted, self.modules, [*self.costs.values()])

    @property
    def sketches(self) -> tuple[Tensor, Tensor]:
        """Derivatives at the tuned network, for fitting and for selection."""
        return self._differentiated[1:]

    @functools.cached_property
    def _differentiated(self) -> tuple[dict[str, Directions], Tensor, Tensor]:
        """Directions of all modules, and sketches of their effect to fit to and to select by."""
        draws = [_randomness.generator(0, f"sketch to {part}") for part in ("fit", "select")]
        fit = len(self.texts.fit)
        drawn: dict[int, list[Tensor]] = {}

        def draw(i: int, values: Tensor) -> list[Tensor]:
            texts = len(self._tuned.batches[i].places)
            drawn[i] = _effect.draw_rows(draws[i >= fit], values, texts, self.probes)
            return drawn[i]

        slopes = self.slopes(self.modules)
        tell = functools.partial(self.report, "directions of changes and their derivatives")
        rows = slopes.collect_derivatives(self._decompose, draw, report=tell)
        weighted = {name: slopes.directions[name] for name in self.modules}
        # They take much memory, and a later look at moments can have them again.
        self._tuned.kept = []
        with torch.no_grad():
            more = self._kinds(slopes, drawn)
            rows = [torch.cat(each, 1) for each in zip(rows, *more, strict=True)]
        return weighted, torch.cat(rows[:fit]), torch.cat(rows[fit:])

    def _kinds(
        self, slopes: _effect.Slopes, drawn: Mapping[int, Sequence[Tensor]]
    ) -> Iterator[list[Float[Tensor, "rows 1"]]]:
        """Products of random outputs with what each kind of other parameters adds to the outputs.

        It is what is lost if that kind alone is the base's.
        """
        readers = {kind: self._without(kind, slopes.directions) for kind in self.costs}
        networks = (stream(self.pair, "tuned", self.device, r) for r in readers.values())
        passes = [TextStates(network, self.planned.batches) for network in networks]
        advance(passes)
        for passed in passes:
            products = []
            for i, batch in enumerate(passed.batches):
                states = (
                    each.to(self.device) for each in (self._tuned.states[i], passed.states[i])
                )
                tuned, without = (slopes.rows(each)[0] for each in states)
                added = [((tuned - without) * r.to(tuned)).sum(1, keepdim=True) for r in drawn[i]]
                parts = [sum_by_text(each.double().cpu(), batch, self.pair.task) for each in added]
                products.append(torch.cat(parts))
            yield products

    def _without(self, kind: str, directions: Mapping[str, Directions]) -> Reader:
        """Find what reads the tuned network but for one kind; biases make up for no mean inputs."""
        names = {other.name for other in self.pair.others if other.kind == kind}
        shifts = {f"{name}.bias": found.shift for name, found in directions.items()}

        def read(name: str, rows: Rows = None) -> Tensor:
            value = self.pair.read("base" if name in names else "tuned", name, rows)
            return value - shifts[name] if kind == "bias" and name in shifts else value

        return read

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
        change, bias = self.pair.multiplier(name), self.frees_bias(self.modules[name])
        return _effect.find_directions(change, about, most or self.max_rank, bias=bias)

    def frees_bias(self, module: Module) -> bool:
        """Whether adapters may change a module's bias."""
        return module.bias and self.carry != "none"

    def with_gains(self, gains: Float[Tensor, " candidates"]) -> Adapter:
        """The adapter that takes all `candidates` with these gains."""
        factors, biases = {}, {}
        own = gains[len(gains) - len(self.costs) :] != 0
        carried = [kind for kind, taken in zip(self.costs, own, strict=True) if taken]
        carried += self.carried
        for name, place in self.candidates.places.items():
            found, parts = self.weighted[name], gains[place].float()
            kept = parts != 0
            left, right = found.update.left[:, kept] * parts[kept], found.update.right[:, kept]
            if kept.any():
                factors[name] = _balance(LowRank(left.double(), right.double()))
            if "bias" in carried and self.frees_bias(self.modules[name]):
                tuned = self.pair.tuned.read(f"{name}.bias")
                biases[name] = (tuned + found.shift - left @ (right.mT @ found.mean)).float()
        return Adapter(factors, biases, carried, gains)


def _balance(update: LowRank) -> LowRank:
    """The same update in float32, with factors of equal singular values, ``UΣ^{1/2}, VΣ^{1/2}``."""
    Q, S = torch.linalg.qr(update.left)
    P, T = torch.linalg.qr(update.right)
    U, values, Vh = torch.linalg.svd(S @ T.mT)
    half = values.sqrt()
    return LowRank((Q @ U * half).float(), (P @ Vh.mT * half).float())


def _choose_modules(pair: Pair, modules: str, carry: str) -> dict[str, Module]:
    """The modules of a pair that get factors."""
    lacking = [o.name for o in pair.others if o.kind == "head" and not pair.base.has(o.name)]
    if lacking and carry == "none":
        allowed = "one with a head, where adapters are factors alone (--one-rank)"
        remedy = "save it with the tuned model's head and name that, to plan with and to serve, "
        remedy += "or write the head too (without --one-rank)"
        raise InputError("base", allowed, f"one without {listed(lacking)}", remedy)
    words = {} if carry == "none" else pair.words
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
