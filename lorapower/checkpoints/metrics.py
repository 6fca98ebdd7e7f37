"""Metrics of a module's inputs and outputs, directions of its change in them, and ranks.

Second moments come from calibration texts, as rows whose products they are: a QR factorization of
one batch after the other, so that few or dependent samples cost no digits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import randomness, regression
from ..lowrank import LowRank
from ._measuring import Batch, Readout, count, watch
from .pair import Module

# How many random combinations of a text's outputs are differentiated.
PROBES = 2
#: The part of the weight of inputs that is the same for all tokens.
EVEN = 0.3
#: As few texts determine the output metric, this part of its mean is added in every direction.
RIDGE = 0.1


class Moments(NamedTuple):
    """Second moments of a module over calibration texts, as rows of factors.

    ``inputs`` is ``Z`` with ``ZᵀZ = C``, the second moment of inputs minus ``mean``, which is 0
    unless a bias can make up for it. A token's weight is in part (``EVEN``) the same for all, else
    the squared gradient there of the network's outputs. ``outputs`` is ``R`` with ``RᵀR = G``: to
    first order ``vᵀGv`` is the squared change of the network's outputs if ``v`` is added to the
    module's output for one token, summed over the tokens of a text and averaged over texts.
    """

    inputs: Float[Tensor, "rows in"]
    mean: Float[Tensor, " in"]
    outputs: Float[Tensor, "rows out"]

    def root(self) -> Float[Tensor, "out out"] | None:
        """Find ``R``, upper triangular, with ``RᵀR = G + ρ c I``, the metric with its ridge.

        ``c`` is the mean diagonal entry of ``G``, and ``ρ`` is ``RIDGE``; ``None`` for ``G = 0``.
        """
        rows = self.outputs.double()
        if not rows.any():
            return None
        return regression.second_moment_root(rows.mT, RIDGE) * len(rows) ** 0.5


def moments(
    network: Any,
    modules: Iterable[Module],
    batches: Sequence[Batch],
    readout: Readout,
    *,
    seed: int = 0,
) -> dict[str, Moments]:
    """Take `Moments` of a network's modules in one pass over texts, forwards and backwards.

    Gradients are of random combinations, with independent normal weights, of the outputs as the
    ``readout`` of the tuned network gives them. Modules with a bias have their mean input
    subtracted.
    """
    known = {module.name: module for module in modules}
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    totals = dict.fromkeys(known, 0.0)
    probes = randomness.generator(seed, "probes")
    for batch in batches:
        with torch.enable_grad(), watch(network, known) as seen:
            values = readout.rows(readout.states(network, batch))
            after = [output for _, output in seen.values()]
            weights = [torch.zeros(()) for _ in after]
            for probe in range(PROBES):
                drawn = randomness.normal(probes, *values.shape, dtype=values.dtype)
                slopes = torch.autograd.grad(
                    (values * drawn).sum(),
                    after,
                    retain_graph=probe < PROBES - 1,
                    allow_unused=True,
                )
                for i, (name, slope) in enumerate(zip(seen, slopes, strict=True)):
                    rows = batch.rows(torch.zeros_like(after[i]) if slope is None else slope)
                    gradients[name] = _fold(gradients.get(name), rows)
                    weights[i] = weights[i] + rows.square().sum(-1)
        for (name, (given, _)), weight in zip(seen.items(), weights, strict=True):
            rows, even = batch.rows(given), torch.ones_like(weight)
            if known[name].bias:
                # The factor's first row then holds the mean, and the others are about it.
                rows = torch.cat([rows.new_ones(len(rows), 1), rows], 1)
            if (mean := weight.mean()) > 0:
                even = EVEN + (1 - EVEN) * weight / mean
            inputs[name] = _fold(inputs.get(name), rows * even.sqrt()[:, None])
            totals[name] += float(even.sum())
    found = {}
    for name, module in known.items():
        factor = inputs[name]
        mean = torch.zeros_like(factor[0])
        if module.bias:
            mean, factor = factor[0, 1:] / factor[0, 0], factor[1:, 1:]
        outputs = gradients[name] / (count(batches) * PROBES) ** 0.5
        found[name] = Moments(factor / totals[name] ** 0.5, mean, outputs)
    return found


def _fold(factor: Tensor | None, rows: Float[Tensor, "rows columns"]) -> Tensor:
    """The triangular factor of rows and of those before, whose factor is given."""
    return torch.linalg.qr(rows if factor is None else torch.cat([factor, rows]), mode="r").R


class Directions(NamedTuple):
    """The leading part of a module's change ``E``, ordered by a metric [prop-two-metrics].

    The ``leading`` ``r`` columns of ``update`` are the best ``K_r`` of rank ``r``. Direction ``d``
    takes ``σ_d²`` off the squared error, where ``values`` are ``σ_1 ≥ σ_2 ≥ …``; ``total`` is
    ``Σσ_d²`` over all directions, also those past the last column. ``mean`` is the mean input
    ``μ``, and ``shift`` is ``Eμ``, which the bias takes over at rank 0.
    """

    update: LowRank
    values: Float[Tensor, " k"]
    total: float
    shift: Float[Tensor, " out"]
    mean: Float[Tensor, " in"]

    def single(self) -> Directions:
        """The same, but factors and vectors in float32."""
        update = LowRank(self.update.left.float(), self.update.right.float())
        return self._replace(update=update, shift=self.shift.float(), mean=self.mean.float())

    def bias(self, rank: int) -> Float[Tensor, " out"]:
        """``(E − K_r)μ``, added to the tuned bias beside the best update of a rank."""
        best = self.update.leading(rank)
        return self.shift - best.left @ (best.right.mT @ self.mean)


def directions(change: Float[Tensor, "out in"], about: Moments | None, most: int) -> Directions:
    """Find at most ``most`` leading directions of a change ``E`` [prop-two-metrics].

    ``σ_d`` are the singular values of ``R E Zᵀ``, where ``Z`` has the inputs' second moment and
    ``R`` is `Moments.root`; without moments (``about``) both are the identity. A module that no
    output depends on has no direction in two metrics.
    """
    E = change.double()
    Z = R = None
    mean = torch.zeros_like(E[0])
    if about is not None:
        Z, mean, R = about.inputs.double().mT, about.mean.double(), about.root()
        if R is None:
            nothing = LowRank(E[:, :0], E[:0].mT)
            return Directions(nothing, E.new_zeros(0), 0.0, E @ mean, mean)
    rank = min(most, *E.shape)
    best = regression.truncate(E, rank, inputs=Z, metric=R, approximate=True)
    return Directions(best.update, best.values, float(best.total), E @ mean, mean)


class _Allocation(NamedTuple):
    """The module of each step in which more parameters are spent, and the costs after it."""

    modules: list[str]
    costs: np.ndarray[tuple[int], np.dtype[np.int64]]

    def ranks(self, parameters: int) -> dict[str, int]:
        """Ranks for at most so many parameters."""
        return self.after(int(np.searchsorted(self.costs, parameters, side="right")))

    def after(self, steps: int) -> dict[str, int]:
        """Ranks after so many steps; modules of rank 0 are left out."""
        return dict(Counter(self.modules[:steps]))


def allocate(
    values: Mapping[str, Float[Tensor, " k"]], modules: Mapping[str, Module], step: int = 1
) -> _Allocation:
    """Order directions by ``σ²/cost``, the largest first, ``step`` of a module at once.

    Among all ranks that are multiples of ``step`` and cost as much, those after each step have the
    least predicted squared error ``Σ_m Σ_{d>r_m} σ_d²`` [prop-allocation]. ``ranks(parameters)`` of
    the result are those for at most so many parameters, ``after(steps)`` those after so many steps.
    """
    items = []
    for order, (name, sigma) in enumerate(values.items()):
        squares = sigma.double().square()
        for start in range(0, len(squares), step):
            taken = squares[start : start + step]
            density = float(taken.sum()) / (modules[name].cost * len(taken))
            items.append((-density, order, start, name, len(taken)))
    items = sorted(item for item in items if item[0] < 0)
    names = [name for *_, name, size in items for _ in range(size)]
    costs = np.cumsum([modules[name].cost for name in names], dtype=np.int64)
    # A step is bought as a whole.
    ends = np.cumsum([size for *_, size in items], dtype=np.int64) - 1
    return _Allocation(names, np.repeat(costs[ends], np.diff(ends, prepend=-1)))
