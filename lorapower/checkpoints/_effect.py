"""Directions of changes chosen in function space: what each adds to the tuning's effect.

Let ``J_d`` be the derivative of the network's outputs along direction ``d`` of a module's change,
which an adapter takes with gain ``c_d``. To first order it loses ``Σ_d (1 − c_d) J_d`` of the
effect ``Σ_d J_d``. Products with random outputs sketch all ``J_d`` at once: for a text and a normal
``r``, ``φ_d = ⟨r, J_d⟩`` has ``E φ_d φ_k = ⟨J_d, J_k⟩`` [prop-sketch].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import randomness
from ._measuring import Readout, Reference, fast, sum_by_text, watch
from ._metrics import Directions
from ._texts import Batch
from .pair import Module

#: Random combinations of a text's outputs that are differentiated.
PROBES = 8
#: Intensities of the shrinkage of second moments to their diagonal, of which texts choose one.
INTENSITIES = (0.03, 0.1, 0.3, 0.6, 0.9)
# Gains of directions that texts say nothing of stay near 1: a part of the mean square.
_FLOOR = 0.01
# Gains are fitted again when the cost has grown by this part: coarsely to choose an intensity.
_GROWTH, _COARSE = 0.05, 0.25


class Pool:
    """Directions of modules to choose from, side by side in the order of the modules.

    A direction is a column of the factors of the module's change. ``bundles`` numbers those that
    are taken together: each alone or, where factors are ``served`` at one rank, which each module
    pays for, all of the modules that are `Module.fused`.
    """

    def __init__(
        self,
        directions: Mapping[str, Directions],
        modules: Mapping[str, Module],
        served: int | None = None,
    ) -> None:
        self.directions, self.modules = directions, modules
        costs: list[int] = []
        bundles: list[int] = []
        numbers: dict[tuple[str, int] | str, int] = {}
        self.places: dict[str, slice] = {}
        for name, found in directions.items():
            module, number = modules[name], len(found.values)
            self.places[name] = slice(len(costs), len(costs) + number)
            costs += [module.cost] * number
            if served and number:
                costs[-1] += module.cost * (served - number)
            keys = (module.fused if served else (name, i) for i in range(number))
            bundles += [numbers.setdefault(key, len(numbers)) for key in keys]
        self.costs = torch.tensor(costs, dtype=torch.float64)
        self.bundles = torch.tensor(bundles, dtype=torch.int64)


def sketch(
    network: Any,
    pool: Pool,
    reference: Reference,
    *,
    probes: int = PROBES,
    seed: int,
    report: Callable[[int, int], None] = lambda *_: None,
) -> Float[Tensor, "rows directions"]:
    """Differentiate random outputs of the tuned network along all directions.

    Rows ``φ``, some for each text, have ``E φφᵀ`` the products ``⟨J_d, J_k⟩``.
    """
    draw = randomness.generator(seed, "sketch")
    derivatives = Derivatives(network, pool, reference.readout)
    parts = []
    for i, batch in enumerate(reference.batches):
        report(i, len(reference.batches))
        values = derivatives.rows(batch)
        if values.shape[-1] <= probes and len(values) == len(batch.input_ids):
            # So few outputs of each text need no sketch.
            unit = torch.eye(values.shape[-1]) * values.shape[-1] ** 0.5
            drawn = [row.expand(len(values), -1) for row in unit]
        else:
            drawn = [randomness.normal(draw, *values.shape) for _ in range(probes)]
        parts += [derivatives.products(each) for each in drawn]
    report(len(reference.batches), len(reference.batches))
    return torch.cat(parts)


class Derivatives:
    """Derivatives of a tuned network's outputs along all directions, one batch at a time.

    A language model's head may be a module of the pool, or share the weight of embeddings that are.
    Logits, before any cap, are linear in states and in what directions take in of these; of both at
    once there are rows with the distances of logits, as `Readout.rows` are of states alone.
    """

    def __init__(self, network: Any, pool: Pool, readout: Readout) -> None:
        self._network, self._pool, self._readout = network, pool, readout
        # Of the head: its name in the pool, what its directions take in, and the joint root.
        self._head: tuple[str, Tensor, Tensor] | None = None
        for name, found in pool.directions.items() if readout.task == "language" else ():
            if network.get_submodule(name).weight is network.get_output_embeddings().weight:
                taken, given = found.update.right, found.update.left
                if pool.modules[name].kind == "embedding":
                    # Which are the transpose of a head.
                    taken, given = given, taken
                self._head = name, taken, readout.root_with(given)

    def rows(self, batch: Batch) -> Float[Tensor, "rows columns"]:
        """The outputs for a batch, whose derivatives `products` takes."""
        self._batch = batch
        with torch.enable_grad():
            with fast(self._network, self._readout), watch(self._network, self._pool.places) as at:
                self._values = self.rows_of(self._readout.states(self._network, batch))
            self._inputs = {name: self._taken(name, given) for name, (given, _) in at.items()}
        self._after = [output for _, output in at.values()]
        return self._values.detach()

    def rows_of(self, states: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Rows of states, with nothing that directions of the head add to them."""
        if self._head is None:
            return self._readout.rows(states)
        _, taken, root = self._head
        self._of_states = states.detach().float() @ taken.to(states.device)
        self._added = torch.zeros_like(self._of_states, requires_grad=True)
        both = torch.cat([states, self._added.to(states)], -1)
        return self._readout.rows(both, root)

    def products(self, along: Float[Tensor, "rows columns"]) -> Float[Tensor, "texts directions"]:
        """``⟨r, J_d⟩`` of each text and direction, for rows ``r`` as long as the outputs."""
        after = [*self._after] if self._head is None else [*self._after, self._added]
        along, options = along.to(self._values), {"retain_graph": True, "materialize_grads": True}
        slopes = [*torch.autograd.grad(self._values, after, along, **options)]
        texts = len(self._batch.input_ids)
        parts = {n: torch.zeros(texts, at.stop - at.start) for n, at in self._pool.places.items()}
        if self._head is not None:
            both = (slopes.pop().float() * self._of_states).cpu()
            parts[self._head[0]] = sum_by_text(both, self._batch, "language")
        for (name, inputs), slope in zip(self._inputs.items(), slopes, strict=True):
            left = self._pool.directions[name].update.left
            both = (slope.float() @ left.to(slope.device)) * inputs
            parts[name] = parts[name] + (both.sum(1) if both.ndim == 3 else both).cpu()
        return torch.cat([*parts.values()], -1).double()

    def _taken(self, name: str, given: Tensor) -> Tensor:
        """What the directions of a module take in."""
        found = self._pool.directions[name]
        right = found.update.right.to(given.device)
        if self._pool.modules[name].kind == "embedding":
            # Gemma multiplies what it looks up.
            return right[given] * getattr(self._network.get_submodule(name), "embed_scale", 1)
        return (given.float() - found.mean.to(given.device)) @ right


class Choice:
    """Directions in the order in which they are taken, and the gains of any number of them.

    To first order gains ``c`` lose ``(c − 1)ᵀH(c − 1)``, where ``H`` are the products of ``J_d``,
    of which all off the diagonal are shrunk by ``1 − α``; directions that are not taken have the
    gain 0. They are taken by its fall for their cost, in steps after which all gains are fitted
    again.
    """

    def __init__(
        self,
        pool: Pool,
        features: Float[Tensor, "rows directions"],
        intensity: float,
        most: float,
        growth: float = _GROWTH,
    ) -> None:
        """Take directions until their cost is at most ``most``; ``intensity`` is ``α``."""
        self._pool, self._growth = pool, growth
        squares = features.square().mean(0)
        self._rows = features * ((1 - intensity) / len(features)) ** 0.5
        self._whole = self._rows.sum(1)
        self._floor = _FLOOR * float(squares.mean())
        self._weights = intensity * squares + self._floor
        # Where no output depends on a direction, nothing is gained by it.
        self._own = (self._rows.square().sum(0) + self._weights).clamp(min=1e-300)
        self.order = self._pursue(most)

    def gains(self, parameters: float) -> Float[Tensor, " directions"]:
        """Gains of as many whole bundles as this cost pays for; 0 for other directions."""
        bundles = self._pool.bundles[self.order]
        costs = self._pool.costs[self.order].cumsum(0)
        ends = torch.cat([bundles[1:] != bundles[:-1], bundles.new_ones(1, dtype=torch.bool)])
        paid = (ends[: len(costs)] & (costs <= parameters)).nonzero().flatten()
        return self._fit(self.order[: int(paid[-1]) + 1 if len(paid) else 0])

    def _pursue(self, most: float) -> Int[Tensor, " taken"]:
        costs, bundles = self._pool.costs, self._pool.bundles
        number = int(bundles.max()) + 1
        price = torch.zeros(number, dtype=costs.dtype).index_add_(0, bundles, costs)
        free = torch.ones(number, dtype=torch.bool)
        gains = torch.zeros_like(costs)
        taken: list[Tensor] = []
        spent = 0.0
        while True:
            slopes = self._rows.mT @ (self._whole - self._rows @ gains)
            # What texts say nothing of is not taken for its own sake.
            falls = (slopes + self._weights).square() / self._own - self._floor
            density = torch.zeros_like(price).index_add_(0, bundles, falls) / price
            density[~free | (price > most - spent)] = 0
            ranked = density.argsort(descending=True)
            room = max(self._growth * spent, float(price[ranked[0]]))
            fits = (price[ranked].cumsum(0) <= min(room, most - spent)) & (density[ranked] > 0)
            chosen = ranked[: int(fits.long().cumprod(0).sum())]
            if not len(chosen):
                break
            free[chosen] = False
            spent += float(price[chosen].sum())
            # Within a step the best come first.
            rank = torch.full((number,), number)
            rank[chosen] = torch.arange(len(chosen))
            members = (rank[bundles] < number).nonzero().flatten()
            taken.append(members[rank[bundles[members]].argsort(stable=True)])
            gains = self._fit(torch.cat(taken))
        return torch.cat(taken) if taken else torch.zeros(0, dtype=torch.int64)

    def _fit(self, taken: Int[Tensor, " taken"]) -> Float[Tensor, " directions"]:
        """The best gains of these directions, by the Woodbury identity where they are many."""
        gains = torch.zeros_like(self._own)
        if not len(taken):
            return gains
        rows, weights = self._rows[:, taken], self._weights[taken]
        right = rows.mT @ (self._whole - rows.sum(1))
        if len(taken) <= len(rows):
            step = torch.linalg.solve(rows.mT @ rows + weights.diag(), right)
        else:
            inner = (rows / weights) @ rows.mT
            inner.diagonal().add_(1)
            step = torch.linalg.solve(inner, rows @ (right / weights))
            step = (right - rows.mT @ step) / weights
        gains[taken] = 1 + step
        return gains


def predict(features: Tensor, gains: Tensor) -> float:
    """The mean squared loss of gains, to first order at the tuned network, from a sketch there."""
    return float((features @ (1 - gains)).square().mean())


def choose(pool: Pool, fit: Tensor, select: Tensor, parameters: int) -> Choice:
    """Directions for so many parameters, with the intensity that the other sketch chooses."""

    def lost(intensity: float) -> float:
        coarse = Choice(pool, fit, intensity, parameters, _COARSE)
        return predict(select, coarse.gains(parameters))

    return Choice(pool, fit, min(INTENSITIES, key=lost), parameters)


def predict_least(
    pool: Pool, fit: Tensor, select: Tensor, aim: float, numbers: Sequence[int]
) -> int:
    """The first of rising numbers that is predicted to lose at most ``aim``, or the last."""
    path = Choice(pool, fit, INTENSITIES[len(INTENSITIES) // 2], numbers[-1], _COARSE)
    reached = (number for number in numbers if predict(select, path.gains(number)) <= aim)
    return next(reached, numbers[-1])
