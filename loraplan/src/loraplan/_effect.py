"""Directions of changes, in metrics and chosen in function space: what each adds to the effect.

Let ``J_d`` be the derivative of the network's outputs along direction ``d`` of a module's change,
which an adapter takes with gain ``c_d``. To first order it loses ``Σ_d (1 − c_d) J_d`` of the
effect ``Σ_d J_d``. Products with random outputs sketch all ``J_d`` at once: for a text and a normal
``r``, ``φ_d = ⟨r, J_d⟩`` has ``E φ_d φ_k = ⟨J_d, J_k⟩`` [prop-sketch].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import _randomness
from ._lowrank import LowRank
from ._measuring import Readout, sum_by_text
from ._models import has_bfloat16
from ._streams import TextStates
from .pair import Module, Sliced

#: Random combinations of a text's outputs that are differentiated.
PROBES = 8
#: Intensities of the shrinkage of second moments to their diagonal, of which texts choose one.
INTENSITIES = (0.03, 0.1, 0.3, 0.6, 0.9)
# Gains of directions that texts say nothing of stay near 1: a part of the mean square.
_FLOOR = 0.01
# Gains are fitted again when the cost has grown by this part: coarsely to choose an intensity.
_GROWTH, _COARSE = 0.05, 0.25
#: Moments are taken over about so many tokens.
MOMENT_TOKENS = 2048
# Columns beyond the wanted ones, and rounds of multiplication, to find leading directions.
_EXTRA, _ROUNDS = 16, 4


@dataclass(frozen=True, eq=False)
class Moments:
    """Rows whose second moments are metrics of a module's inputs and outputs.

    A row of ``inputs`` is what the module takes in at one token. A row of ``outputs`` is the
    derivative, by what it gives there, of a random combination of the network's outputs with
    independent standard normal weights: to first order a change ``v`` at this token changes them by
    ``vᵀGv`` in the mean square, where ``G`` is the second moment.
    """

    inputs: Float[Tensor, "rows in"]
    outputs: Float[Tensor, "rows out"]
    #: As few texts determine metrics, this part ``ρ`` of their mean is added in every direction.
    ridge: ClassVar[float] = 0.1


class Directions(NamedTuple):
    """The leading part of a module's change ``E``, ordered by a metric [prop-two-metrics].

    The ``leading`` ``r`` columns of ``update`` are the best ``K_r`` of rank ``r``. Direction ``d``
    takes ``σ_d²`` off the squared error, where ``values`` are ``σ_1 ≥ σ_2 ≥ …``. ``mean`` is the
    mean input ``μ``, and ``shift`` is ``Eμ``.
    """

    update: LowRank
    values: Float[Tensor, " k"]
    shift: Float[Tensor, " out"]
    mean: Float[Tensor, " in"]


class _Metric(NamedTuple):
    """The metric ``G = RᵀR`` of the rows of ``root``: their second moment, and a ridge."""

    rows: Float[Tensor, "rows width"]
    ridge: Tensor

    def times(self, columns: Float[Tensor, "width k"]) -> Float[Tensor, "width k"]:
        """``G X``."""
        return self.rows.mT @ (self.rows @ columns) + self.ridge * columns

    def root(self, columns: Float[Tensor, "width k"]) -> Float[Tensor, "all k"]:
        """``R X``, for one of the roots ``R``."""
        return torch.cat([self.rows @ columns, self.ridge.sqrt() * columns])


def _metric(rows: Float[Tensor, "rows width"]) -> _Metric:
    """The metric of rows; without any that are not 0 no direction counts more than another."""
    level = Moments.ridge * rows.square().mean()
    return _Metric(rows / len(rows) ** 0.5, torch.where(level > 0, level, 1))


def find_directions(
    change: Float[Tensor, "out in"] | LowRank | Sliced,
    about: Moments | None,
    most: int,
    *,
    bias: bool = False,
) -> Directions:
    """Find at most ``most`` leading directions of a change ``E`` [prop-two-metrics].

    ``σ_d`` are the singular values of ``R E Z``, where ``Z Zᵀ`` is the second moment ``C`` of the
    inputs, about their mean if the ``bias`` is free and else about 0, and ``RᵀR = G`` that of the
    outputs, both with a ridge (`Moments`); without moments (``about``) both are the identity. A
    module that no output depends on has no direction in two metrics.

    Only products with samples are formed, in time proportional to the entries of ``E``: rounds of
    ``L ← E C Eᵀ G L`` find the leading subspace (Halko, Martinsson and Tropp, 2011), where
    ``K_r = L_r L_rᵀ G E`` for columns with ``LᵀGL = I``. So ``E`` may be what `Pair.multiplier`
    finds.
    """
    out, into = change.shape
    known, about = about is not None, about or Moments(torch.zeros(1, into), torch.zeros(1, out))
    device, outputs = about.inputs.device, about.outputs.float()
    if isinstance(change, Tensor):
        change = change.to(device)
    mean = about.inputs.float().mean(0) if bias else torch.zeros(into, device=device)
    inputs = about.inputs.float() - mean
    shift = (change @ mean[:, None])[:, 0]
    if known and not outputs.any():
        nothing = LowRank(torch.zeros(out, 0), torch.zeros(into, 0))
        return Directions(nothing, torch.zeros(0), shift.cpu(), mean.cpu())
    size = min(most + _EXTRA, out, into)
    if isinstance(change, LowRank) and change.rank:
        # Others of an adapter's change are rounding.
        size = min(size, change.rank)
    C, G = _metric(inputs), _metric(outputs)
    draw = _randomness.generator(0, "subspace")
    L = _randomness.normal(draw, out, size, dtype=torch.float32).to(device)
    for _ in range(_ROUNDS):
        L = torch.linalg.qr(change @ C.times(change.mT @ G.times(L))).Q
    L = torch.linalg.solve_triangular(torch.linalg.qr(G.root(L)).R, L, upper=True, left=False)
    right = change.mT @ G.times(L)
    U, values, _ = torch.linalg.svd(C.root(right).mT, full_matrices=False)
    kept = min(most, size)
    sides = (each @ U[:, :kept] for each in (L, right))
    found = (*sides, values[:kept], shift, mean)
    left, right, *others = (each.cpu() for each in found)
    return Directions(LowRank(left, right), *others)


class Candidates:
    """Directions of modules to choose from, side by side in the order of the modules.

    A direction is a column of the factors of the module's change, and ``costs`` as many numbers as
    that has. ``places`` are those of each module's directions. After these come others, of which
    each costs so much.
    """

    def __init__(
        self,
        directions: Mapping[str, Directions],
        modules: Mapping[str, Module],
        others: Sequence[int] = (),
    ) -> None:
        costs: list[int] = []
        self.places: dict[str, slice] = {}
        for name, leading in directions.items():
            number = len(leading.values)
            self.places[name] = slice(len(costs), len(costs) + number)
            costs += [modules[name].cost] * number
        self.costs = torch.tensor([*costs, *others], dtype=torch.float64)


def autocast_bfloat16(readout: Readout) -> AbstractContextManager[Any]:
    """Make products of a language model in bfloat16, where the processor has it."""
    kind = readout.network.device.type
    half = readout.task == "language" and has_bfloat16(kind)
    return torch.autocast(kind, torch.bfloat16, enabled=half)


class _Run(NamedTuple):
    """A stage computed for a batch: what its outputs depend on, and modules' inputs and outputs.

    ``rows`` are the outputs of a stage but, after the blocks, with what the head's directions add;
    ``of_states`` is what these take in.
    """

    leaves: list[Tensor]
    outputs: Tensor
    rows: Tensor
    of_states: Tensor | None
    seen: dict[str, tuple[Tensor, Tensor]]

    def slopes(self, values: Tensor, along: Tensor) -> list[Tensor]:
        """Differentiate a combination of values by all leaves, and by all that modules give."""
        after = [*self.leaves, *(given for _, given in self.seen.values())]
        options = {"retain_graph": True, "materialize_grads": True}
        return [*torch.autograd.grad(values, after, along.to(values), **options)]


def draw_rows(
    draw: torch.Generator, values: Float[Tensor, "rows columns"], texts: int, probes: int
) -> list[Float[Tensor, "rows columns"]]:
    """Draw random combinations ``r`` of a batch's outputs.

    Rows ``φ`` of their products with ``J_d``, one for each text, have ``E φφᵀ`` the products
    ``⟨J_d, J_k⟩``.
    """
    if values.shape[-1] <= probes and len(values) == texts:
        # So few outputs of each text need no sketch.
        unit = torch.eye(values.shape[-1]) * values.shape[-1] ** 0.5
        return [row.expand(len(values), -1) for row in unit]
    return [_randomness.normal(draw, *values.shape) for _ in range(probes)]


class Slopes:
    """Outputs of the tuned network, differentiated stage by stage from the last to the first.

    A stage is a block, all that comes after the blocks, or all before them. It is computed again
    from the hidden states that ``passed`` has kept. A language model's head may be a module, or
    share the weight of embeddings that are one. Logits, before any cap, are linear in states and in
    what directions take in of these; of both at once there are rows with the distances of logits,
    as those of a read-out are of states alone.

    Moments are taken over the batches ``taking``. Directions of ``modules`` are looked for or, of
    ``words`` of a `Pair`, known (``known``).
    """

    def __init__(
        self,
        passed: TextStates,
        readout: Readout,
        modules: Mapping[str, Module],
        known: Mapping[str, Directions],
        taking: Sequence[int],
    ) -> None:
        self._passed, self._readout, self._modules = passed, readout, modules
        self._network, self._taking, self._known = passed.network, taking, known
        #: Directions of all modules whose stage has been passed.
        self.directions: dict[str, Directions] = {**known}
        # Of the head: its name, what its directions take in, and the joint metric.
        self._head: tuple[str, Tensor, Tensor] | None = None
        for name, found in known.items():
            if self._network.has_head_of(name):
                taken, given = found.update.right, found.update.left
                if modules[name].kind == "embedding":
                    # Which are the transpose of a head.
                    taken, given = given, taken
                self._head = name, taken, readout.logit_metric_with(given)

    def collect_derivatives(
        self,
        find: Callable[[str, Moments | None], Directions | None],
        draw: Callable[[int, Tensor], Sequence[Tensor]] | None,
        *,
        report: Callable[[int, int], None] = lambda *_: None,
    ) -> list[Float[Tensor, "rows directions"]]:
        """Take moments, find directions, and differentiate along them: one pass over all stages.

        ``find`` makes directions of a module from its moments. ``draw`` makes some ``r``, each as
        long as the outputs of a batch of this number; the result has for each batch ``⟨r, J_d⟩`` of
        all directions, with a row for each ``r`` and text.
        """
        network, probes = self._network, _randomness.generator(0, "probes")
        batches = self._passed.batches
        # Derivatives of random outputs by what a stage gives, to take moments and along ``draw``.
        once: dict[int, Tensor] = {}
        many: dict[int, list[Tensor]] = {}
        products: dict[str, dict[int, Tensor]] = {name: {} for name in self._modules}
        stages: dict[int, list[str]] = {k: [] for k in range(len(network.blocks), -1, -1)}
        for name in self._modules:
            stages.setdefault(network.stage(name), []).append(name)
        report(0, len(stages))
        for done, k in enumerate(stages, 1):
            weights = network.stage_weights(k)
            runs: dict[int, _Run] = {}
            rows: dict[str, list[Any]] = {n: [] for n in stages[k] if n not in self._known}
            for i in self._taking if k >= 0 else ():
                run = self._run(k, i, weights, stages[k])
                if i not in once:
                    once[i] = _randomness.normal(probes, *run.outputs.shape)
                once[i], *slopes = run.slopes(run.outputs, once[i])
                after = slopes[len(slopes) - len(run.seen) :]
                for (name, (given, _)), slope in zip(run.seen.items(), after, strict=True):
                    rows[name].append((batches[i].tokens(given), batches[i].tokens(slope)))
                if stages[k]:
                    runs[i] = run
            for name in [*rows]:
                # One after the other, as they may take much memory.
                parts = rows.pop(name)
                moments = Moments(*map(torch.cat, zip(*parts, strict=True))) if parts else None
                if found := find(name, moments):
                    self.directions[name] = found
            for i in range(self._passed.keep if draw else 0):
                run = runs.pop(i) if i in runs else self._run(k, i, weights, stages[k])
                if draw and i not in many:
                    many[i] = [*draw(i, run.rows.detach())]
                for name, product in self._products(i, run, many[i]).items():
                    # Of embeddings that are a head, too, both count.
                    products[name][i] = products[name].get(i, 0.0) + product
            report(done, len(stages))
        joined = []
        for i, along in sorted(many.items()):
            shape = len(along), len(batches[i].places)
            # No text passes some modules.
            none = {n: torch.zeros(*shape, len(self.directions[n].values)) for n in products}
            parts = [found.get(i, none[name]) for name, found in products.items()]
            joined.append(torch.cat(parts, -1).flatten(0, 1).double())
        return joined

    def _products(
        self, i: int, run: _Run, along: list[Tensor]
    ) -> dict[str, Float[Tensor, "rows texts directions"]]:
        """Products of a batch's derivatives with the directions of a stage's modules.

        The rows ``along`` what the stage gives are replaced by those along what it is given.
        """
        taken, batch = {}, self._passed.batches[i]
        for name, (given, _) in run.seen.items():
            found = self.directions[name]
            right = found.update.right.to(given.device)
            if self._modules[name].kind == "embedding":
                # Gemma multiplies what it looks up.
                scale = getattr(self._network.skeleton.get_submodule(name), "embed_scale", 1)
                taken[name] = right[batch.input_ids.to(right.device)] * scale
            else:
                taken[name] = (given.float() - found.mean.to(right)) @ right
        parts: dict[str, list[Tensor]] = {}
        for j, row in enumerate(along):
            along[j], *slopes = run.slopes(run.rows, row)
            if run.of_states is not None and self._head:
                both = slopes.pop(0).float() * run.of_states
                parts.setdefault(self._head[0], []).append(sum_by_text(both, batch, "language"))
            # Before all blocks there is nothing but what embeddings give.
            after = slopes if run.leaves else [along[j]]
            for (name, inputs), slope in zip(taken.items(), after, strict=True):
                both = (slope.float() @ self.directions[name].update.left.to(slope.device)) * inputs
                parts.setdefault(name, []).append(both.sum(1) if both.ndim == 3 else both)
        return {name: torch.stack(each).cpu() for name, each in parts.items()}

    def _run(self, k: int, i: int, weights: dict[str, Tensor], names: Sequence[str]) -> _Run:
        """Compute a stage for a batch."""
        network, passed, last = self._network, self._passed, len(self._network.blocks)
        batch, of_states = passed.batches[i], None
        more: list[Tensor] = []
        with torch.enable_grad(), autocast_bfloat16(self._readout), network.watch(names) as seen:
            if k < 0:
                outputs, _ = network.begin(batch, passed.outer)
                return _Run([], outputs, outputs, None, seen)
            hidden = (passed.kept[k] if k < last else passed.hidden)[i]
            leaf = hidden.to(network.device).detach().requires_grad_()
            if k < last:
                outputs = rows = network.run_block(k, weights, leaf, passed.given[i])
            else:
                states = network.end(batch, passed.outer, leaf)
                outputs = self._readout.rows(states)
                rows, of_states, *more = self.rows(states)
        return _Run([leaf, *more], outputs, rows, of_states, seen)

    def rows(
        self, states: Float[Tensor, "rows columns"]
    ) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:
        """Rows of states with what the head's directions add, nothing here, to differentiate by."""
        if self._head is None:
            return self._readout.rows(states), None
        _, taken, metric = self._head
        of_states = states.detach().float() @ taken.to(states.device)
        added = torch.zeros_like(of_states, requires_grad=True)
        both = torch.cat([states, added.to(states)], -1)
        return self._readout.rows(both, metric), of_states, added


class GreedySelection:
    """Directions in the order in which they are taken, and the gains of any number of them.

    To first order gains ``c`` lose ``(c − 1)ᵀH(c − 1)``, where ``H`` are the products of ``J_d``,
    of which all off the diagonal are shrunk by ``1 − α``; directions that are not taken have the
    gain 0. They are taken by its fall for their cost, in steps after which all gains are fitted
    again.
    """

    def __init__(
        self,
        candidates: Candidates,
        features: Float[Tensor, "rows directions"],
        intensity: float,
        most: float,
        growth: float = _GROWTH,
    ) -> None:
        """Take directions until their cost is at most ``most``; ``intensity`` is ``α``."""
        self._candidates, self._growth = candidates, growth
        squares = features.square().mean(0)
        # A row for each direction, as some of them are taken often.
        self._rows = (features.mT * ((1 - intensity) / len(features)) ** 0.5).contiguous()
        self._whole = self._rows.sum(0)
        self._floor = _FLOOR * float(squares.mean())
        self._weights = intensity * squares + self._floor
        # Where no output depends on a direction, nothing is gained by it.
        self._own = (self._rows.square().sum(1) + self._weights).clamp(min=1e-300)
        self.order = self._pursue(most)

    def gains(self, parameters: float) -> Float[Tensor, " directions"]:
        """Gains of as many directions as this cost pays for; 0 for others."""
        costs = self._candidates.costs[self.order].cumsum(0)
        taken = self.order[: int((costs <= parameters).sum())]
        return self._fit(taken, self._inner(taken))

    def _pursue(self, most: float) -> Int[Tensor, " taken"]:
        costs = self._candidates.costs
        free = torch.ones(len(costs), dtype=torch.bool)
        rest, spent = self._whole, 0.0
        taken: list[Tensor] = []
        inner: Tensor | float = 0.0
        while True:
            slopes = self._rows @ rest
            # What texts say nothing of is not taken for its own sake.
            falls = (slopes + self._weights).square() / self._own - self._floor
            density = falls / costs
            density[~free | (costs > most - spent)] = 0
            ranked = density.argsort(descending=True)
            room = max(self._growth * spent, float(costs[ranked[0]]))
            fits = (costs[ranked].cumsum(0) <= min(room, most - spent)) & (density[ranked] > 0)
            chosen = ranked[: int(fits.long().cumprod(0).sum())]
            if not len(chosen):
                break
            free[chosen] = False
            spent += float(costs[chosen].sum())
            taken.append(chosen)
            # Those taken before have been multiplied.
            inner = inner + self._inner(chosen)
            together = torch.cat(taken)
            rest = self._whole - self._fit(together, inner)[together] @ self._rows[together]
        return torch.cat(taken) if taken else torch.zeros(0, dtype=torch.int64)

    def _inner(self, taken: Int[Tensor, " taken"]) -> Float[Tensor, "rows rows"]:
        """What these directions add to the products of rows, each by its weight."""
        rows = self._rows[taken]
        return rows.mT @ (rows / self._weights[taken, None])

    def _fit(
        self, taken: Int[Tensor, " taken"], inner: Float[Tensor, "rows rows"]
    ) -> Float[Tensor, " directions"]:
        """The best gains of these directions, by the Woodbury identity where they are many."""
        gains = torch.zeros_like(self._own)
        rows, weights = self._rows[taken], self._weights[taken]
        right = rows @ (self._whole - rows.sum(0))
        if len(taken) <= len(inner):
            step = _solve(rows @ rows.mT + weights.diag(), right)
        else:
            right = right / weights
            identity = torch.eye(len(inner), dtype=inner.dtype)
            step = right - rows @ _solve(inner + identity, right @ rows) / weights
        gains[taken] = 1 + step
        return gains


def _solve(matrix: Float[Tensor, "n n"], right: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Solve for a positive definite matrix."""
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(matrix))[:, 0]


def predict(features: Tensor, gains: Tensor) -> float:
    """The mean squared loss of gains, to first order at the tuned network, from a sketch there."""
    return float((features @ (1 - gains)).square().mean())


def choose(candidates: Candidates, fit: Tensor, select: Tensor, parameters: int) -> GreedySelection:
    """Directions for so many parameters, with the intensity that the other sketch chooses."""

    def lost(intensity: float) -> float:
        coarse = GreedySelection(candidates, fit, intensity, parameters, _COARSE)
        return predict(select, coarse.gains(parameters))

    return GreedySelection(candidates, fit, min(INTENSITIES, key=lost), parameters)


def predict_least(
    candidates: Candidates, fit: Tensor, select: Tensor, aim: float, numbers: Sequence[int]
) -> int:
    """The first of rising numbers that is predicted to lose at most ``aim``, or the last."""
    for number in numbers:
        path = GreedySelection(candidates, fit, INTENSITIES[len(INTENSITIES) // 2], number, _COARSE)
        if predict(select, path.gains(number)) <= aim:
            break
    return number
