"""A pair and its texts, prepared: candidates for any number of parameters, and their errors."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import _checks, randomness
from ..errors import InputError
from ..lowrank import LowRank
from ._effect import PROBES, Pool, Slopes, choose, draw_rows, predict, predict_least
from ._limits import are_alike, quantile
from ._measuring import Measured, Readout, Reference, Trial, run_trials
from ._metrics import TOKENS as MOMENT_TOKENS
from ._metrics import Directions, Moments, find_directions
from ._models import Rows, has_bfloat16, listed, require_device, require_memory
from ._reading import Text
from ._streams import Network, Pass, advance, stream
from ._texts import TOKENS, count_tokens, prepare
from ._work import Work, digest
from .pair import KINDS, LARGE, Adapter, Module, Pair

#: Types of weights in which errors can be stated.
DTYPES = "float32", "bfloat16"
#: Receives progress: the stage in words, the steps done, and their number.
Report: TypeAlias = Callable[[str, int, int], None]
# Sizes that are tried first, in units of the smallest one that should be certified; each later one
# has this part of the size before.
_FIRST, _STEP = (4, 2.8, 2, 1.4, 1), 0.8
# Bytes of memory that a process takes with all libraries.
_LIBRARIES = 0.5e9
# About how many candidates are passed.
_CANDIDATES = 14
# The part of the aim that this smallest one loses on texts for selection.
_SAFE = 0.6
# And about the error over all texts, in units of what nine of ten lose at most.
_TYPICAL = 0.75
# About how often texts for selecting and for stating are passed, or what takes as long, and what
# one more random output costs of a pass. Measured on a language model.
_SELECTED, _STATED, _BACK = 27, 14, 0.7
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
    serving : bool
        Whether all factors of `candidate` have the rank ``max_rank``, where need be by zeros, and
        modules that servers compute as one (`Module.fused`) get them together.
    dtype : str
        ``"bfloat16"`` for errors with weights in that too (`rounded`), or ``"float32"``. On a
        device that multiplies it candidates are then selected in bfloat16 as well, unless its
        rounding alone loses more than a fifth of the error that is asked for.
    device, report
        Where texts pass, and what receives progress: the stage, the steps done, their number.
    work : Path or str, optional
        A folder for the results of stages that are finished, from which the same call goes on
        after it was interrupted.

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
        work: Path | str | None = None,
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
        said = f"{require_memory(self._memory)}, {self._reading / 1e9:.1f} GB to read"
        given = (x for part in self.texts[:3] for batch in part for x in batch)
        about = {"texts": digest(given), "pair": pair.fingerprint, "device": self.device.type}
        self._work = Work(work, about | self.options)
        self.readout = Readout(stream(pair, "tuned", self.device))
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

    def moments(self, names: Collection[str]) -> dict[str, Moments]:
        """Take `Moments` of inputs and outputs of linear modules at the tuned network."""
        found: dict[str, Moments] = {}

        def keep(name: str, about: Moments | None) -> None:
            if about is not None:
                found[name] = about

        self._slopes({name: self.modules[name] for name in names}).take(keep, None, seed=self.seed)
        return found

    @property
    def weighted(self) -> dict[str, Directions]:
        """The leading directions of all changes, in the metrics of inputs and outputs."""
        return self._differentiated[0]

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

    def smallest(
        self, error: float, lost: Callable[[NDArray[np.float64]], float] | None = None
    ) -> Adapter:
        """Find the smallest adapter that loses at most ``error``.

        What it loses is what ``lost`` says of squared distances on the texts for selection, by
        default its `error`. It is looked for by bisection, to a twentieth of its parameters, along
        the order in which `candidate` takes directions. Where the highest ranks do not reach the
        error, theirs is returned.
        """
        lost, sketches = lost or self.select.error, self._sketches
        self.report("searching the smallest adapter", 0, 7)
        numbers = [self.parameters(1) * 2**k // 16 for k in range(13)]
        numbers = [number for number in numbers if number < self.most] + [self.most]
        square = (_TYPICAL * error) ** 2 * float(self.select.effect.mean())
        high = predict_least(self._pool, *sketches, square, numbers)
        choice = choose(self._pool, *sketches, high)
        low = done = 0
        while True:
            adapter = self._with_gains(choice.gains(high))
            if lost(self.run((adapter, self.select))[0].squares) <= error:
                break
            if high == self.most:
                return adapter
            low, high = high, min(2 * high, self.most)
            choice = choose(self._pool, *sketches, high)
        while high > 1.05 * low + self.parameters(1) // 50:
            steps = math.log(high / low) / math.log(1.05) if low else 2**6
            total = done + max(1, math.ceil(math.log(steps, 1 + self._together)))
            self.report("searching the smallest adapter", done, total)
            done += 1
            parts = [part / (1 + self._together) for part in range(1, 1 + self._together)]
            sizes = [round(low ** (1 - x) * high**x if low else x * high) for x in parts]
            tried = [self._with_gains(choice.gains(size)) for size in sizes]
            ran = self.run(*((smaller, self.select) for smaller in tried))
            for size, smaller, trial in reversed([*zip(sizes, tried, ran, strict=True)]):
                if lost(trial.squares) > error:
                    low = size
                    break
                adapter, high = smaller, size
        self.report("searching the smallest adapter", done, done)
        return adapter

    def descend(self, aim: float, *, estimate: bool = False) -> Iterator[Adapter]:
        """Make adapters from large to small, along the order in which `candidate` takes directions.

        The first have 4, 2.8, 2 and 1.4 times the parameters of the smallest one that loses 0.6
        times the aim on the texts for selection: in all and, but for an ``estimate``, on nine of
        ten texts. Later ones have 20% fewer parameters each, and the last none. None of this looks
        at the texts for stating.
        """
        if self._rounds:
            self._require_little_noise(aim)
        lost = self.select.error if estimate else self._lost
        low = self.smallest(_SAFE * aim, lost).parameters
        sizes = [min(round(times * low), self.most) for times in _FIRST]
        while sizes[-1] > self.parameters(1) // 50:
            sizes.append(math.floor(_STEP * sizes[-1]))
        choice, before = choose(self._pool, *self._sketches, sizes[0]), -1
        for size in [*sizes, 0]:
            adapter = self._with_gains(choice.gains(size))
            if adapter.parameters != before:
                yield adapter
            before = adapter.parameters

    def run(self, *trials: tuple[Adapter, Reference]) -> list[Trial]:
        """Pass texts through the base with an adapter; all of these together, block by block."""
        names = [self._name(*trial) for trial in trials]
        found = [self._work.find(name) for name in names]
        networks = [(self._stream(*trial), trial[1]) for trial in trials]
        again = [i for i, states in enumerate(found) if states is None]
        for i, trial in zip(again, run_trials([networks[i] for i in again]), strict=True):
            found[i] = trial.states
            self._work.save(names[i], trial.states)
        each = zip(networks, found, strict=True)
        return [Trial(part, network, states) for (network, part), states in each]

    def _stream(self, which: Adapter | str, reference: Reference) -> Network:
        """A network for a part of the texts: that to select by may be passed in bfloat16."""
        rounded = reference is self.select and self._rounds
        dtype = torch.bfloat16 if rounded else torch.float32
        return stream(self.pair, which, self.device, dtype)

    @property
    def _rounds(self) -> bool:
        """Whether candidates are selected in bfloat16, where the device multiplies that."""
        return self.options["dtype"] == "bfloat16" and has_bfloat16(self.device.type)

    def _require_little_noise(self, aim: float) -> None:
        """Refuse to select in bfloat16 where its own rounding loses a fifth of the error."""
        (tuned,) = run_trials([(self._stream("tuned", self.select), self.select)])
        noise = self.select.error(tuned.squares)
        if noise > aim / 5:
            given = f"bfloat16, whose rounding alone loses {noise:.1%}"
            allowed = f"float32 for an error of {aim:.1%}, or a type that loses a fifth of it"
            raise InputError("dtype", allowed=allowed, given=given, remedy="leave --dtype out")

    def _name(self, adapter: Adapter, reference: Reference) -> str:
        """Name the result of an adapter on a part of the texts."""
        sides = (side for each in adapter.factors.values() for side in (each.left, each.right))
        part = {id(self.select): "select", id(self.test): "test"}.get(id(reference), "planned")
        return f"{part}-{digest([*sides, *adapter.biases.values()])}"

    def error(self, adapter: Adapter) -> float:
        """Measure ``η`` on the texts for selection."""
        return self.select.error(self.run((adapter, self.select))[0].squares)

    def measure(self, adapter: Adapter) -> Measured:
        """Measure what an adapter loses on the texts for stating."""
        return self.test.summarize(self.run((adapter, self.test))[0].compare())

    def rounded(self, adapter: Adapter) -> tuple[float, float]:
        """Measure ``η`` in bfloat16 on the texts for stating, merged, and of the tuned network.

        NaN unless the planner has this ``dtype``.
        """
        if self.options["dtype"] == "float32":
            return math.nan, math.nan
        networks = [stream(self.pair, x, self.device, torch.bfloat16) for x in (adapter, "tuned")]
        trials = run_trials([(network, self.test) for network in networks])
        merged, floor = (self.test.error(trial.squares) for trial in trials)
        return merged, floor

    def neighbours_alike(self, squares: NDArray[np.float64]) -> bool:
        """Whether neighbouring texts for planning lose so alike that they may be of one group.

        Always false for texts in groups. It is true for one plan in 100 if texts are independent.
        """
        places = torch.cat([batch.places for batch in self.planned.batches])
        return not self.texts.grouped and are_alike(squares[places.argsort()])

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
        names = {f"{n}.weight" for n, module in self.pair.modules.items() if module.kind == kind}

        def read(name: str, rows: Rows = None) -> Tensor:
            return self.pair.read("tuned" if name in names else "adapted", name, rows)

        network = stream(self.pair, Adapter({}, {}), self.device, read=read)
        return self.test.error(run_trials([(network, self.test)])[0].squares)

    @property
    def _memory(self) -> float:
        """About how many bytes of memory the work takes: those of a block count, not of all."""
        skeleton = self.pair.skeleton()
        blocks = skeleton.get_submodule(self.pair.blocks)
        width, linear = skeleton.config.hidden_size, self.modules.values()
        sides = sum(module.cost for module in linear)
        block = sum(value.numel() for value in blocks[0].parameters())
        largest = max(math.prod(module.shape) for module in linear)
        tokens = count_tokens(self.texts.fit) + count_tokens(self.texts.select)
        numbers = (
            block
            + 3 * min(largest, LARGE)
            + tokens * width * (len(blocks) + self.probes)
            # Inputs and outputs of a block's modules, twice.
            + 2 * min(tokens, MOMENT_TOKENS) * sides // len(blocks)
            + self.max_rank * sides
            + 8 * width**2
            # Logits of some rows and words, and what is computed of them.
            + 2**26 * (self.pair.task == "language")
        )
        return _LIBRARIES + 4 * numbers

    @property
    def _reading(self) -> float:
        """About how many bytes are read, of files that the machine may keep in memory."""
        # Each is read when it is checked, when texts pass, and for directions in metrics (the tuned
        # one twice) and singular ones.
        base, tuned = self.pair.base.size, self.pair.tuned.size
        return 4 * base + 5 * tuned + _CANDIDATES * base

    @property
    def _together(self) -> int:
        """How many candidates of a search are passed together, as reading weights takes time."""
        return 1 if self.device.type == "cpu" else 4

    def _lost(self, squares: NDArray[np.float64]) -> float:
        """The error on texts for selection, or what nine of ten of them lose at most if more."""
        return max(self.select.error(squares), quantile(self.select.losses(squares)))

    def _pass_texts(self, stage: str) -> None:
        """Record both networks on the texts, the base not to fit to; say how long all may take."""
        start, said = time.perf_counter(), ""
        fit, select, stated = self.texts[:3]
        self._tuned = Pass(self.readout.network, [*fit, *select, *stated], len(fit) + len(select))
        base = Pass(stream(self.pair, "base", self.device), [*select, *stated])

        def report(done: int, total: int) -> None:
            nonlocal said
            if done >= 4 and not said:
                seconds = (time.perf_counter() - start) * total / done
                said = f", about {seconds * self._passes:.0f} s in all"
            self.report(stage + said, done, total)

        def passed() -> list[Any]:
            advance([self._tuned, base], report)
            return [(each.hidden, each.kept, each.states) for each in (self._tuned, base)]

        for each, found in zip((self._tuned, base), self._work.keep("passed", passed), strict=True):
            each.hidden, each.kept, each.states = found
        parts = [*fit, *select], select, stated
        ends = slice(len(parts[0])), slice(len(fit), len(parts[0])), slice(len(parts[0]), None)
        states = (self._tuned.states[end] for end in ends)
        self.planned, self.select, self.test = map(Reference, parts, 3 * [self.readout], states)
        self.select.record(base.network, base.states[: len(select)])
        self.test.record(base.network, base.states[len(select) :])

    @property
    def _passes(self) -> float:
        """About how often as long as passing the texts all takes."""
        fit, select, stated = map(count_tokens, self.texts[:3])
        passed = fit + 2 * select + 2 * stated
        more = (
            (_SELECTED - 2) * select
            + (_STATED - 2) * stated
            + (1 + _BACK * self.probes) * (fit + select)
            + _BACK * min(fit, MOMENT_TOKENS)
        )
        return 1 + more / passed

    @functools.cached_property
    def _pool(self) -> Pool:
        return Pool(self.weighted, self.modules, self.max_rank if self.serving else None)

    @property
    def _sketches(self) -> tuple[Tensor, Tensor]:
        """Derivatives at the tuned network, for fitting and for selection."""
        return self._differentiated[1:]

    @functools.cached_property
    def _differentiated(self) -> tuple[dict[str, Directions], Tensor, Tensor]:
        """Directions of all modules, and sketches of their effect to fit to and to select by."""
        seeds = (randomness.number(self.seed, f"sketch to {part}") for part in ("fit", "select"))
        draws = [randomness.generator(seed, "sketch") for seed in seeds]
        fit = len(self.texts.fit)

        def draw(i: int, values: Tensor) -> list[Tensor]:
            texts = len(self._tuned.batches[i].places)
            return draw_rows(draws[i >= fit], values, texts, self.probes)

        slopes = self._slopes(self.modules)
        tell = functools.partial(self.report, "directions of changes and their derivatives")
        rows = slopes.take(self._decompose, draw, seed=self.seed, work=self._work, report=tell)
        weighted = {name: slopes.directions[name] for name in self.modules}
        # They take much memory, and a later look at moments can have them again.
        self._tuned.kept = []
        return weighted, torch.cat(rows[:fit]), torch.cat(rows[fit:])

    def _slopes(self, modules: Mapping[str, Module]) -> Slopes:
        """Derivatives of the tuned network's outputs on the texts for planning."""
        if not self._tuned.kept:
            self._tuned = Pass(
                self.readout.network, self.planned.batches, len(self.planned.batches)
            )
            advance([self._tuned])
        # Texts of all lengths, of about as many tokens as moments are taken over.
        number = len(self.texts.fit)
        step = min(max(1, round(count_tokens(self.texts.fit) / MOMENT_TOKENS)), number)
        taking = range(number)[step // 2 :: step]
        known = {name: self._decompose(name) for name in modules if name in self.pair.words}
        return Slopes(self._tuned, self.readout, modules, known, taking)

    def _decompose(
        self, name: str, about: Moments | None = None, most: int | None = None
    ) -> Directions:
        """The leading directions of a change, at most so many, or ``max_rank``."""
        bias = self.pair.frees_bias(self.modules[name])
        most = self.max_rank if most is None else most
        return find_directions(self.pair.multiplier(name), about, most, bias=bias)

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
