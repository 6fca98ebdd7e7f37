"""Metrics of a module's inputs and outputs, and directions of its change in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import randomness
from ..lowrank import LowRank
from .pair import Sliced

#: Moments are taken over about so many tokens.
TOKENS = 2048
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

    def bias(self, rank: int) -> Float[Tensor, " out"]:
        """``(E − K_r)μ``, added to the tuned bias beside the best update of a rank."""
        best = self.update.leading(rank)
        return self.shift - best.left @ (best.right.mT @ self.mean)


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
    device = torch.device("cpu") if about is None else about.inputs.device
    if isinstance(change, Tensor):
        change = change.to(device)
    out, into = change.shape
    mean = torch.zeros(into, device=device)
    inputs, outputs = torch.zeros(1, into), torch.zeros(1, out)
    if about is not None:
        inputs, outputs = about.inputs.float(), about.outputs.float()
        mean = inputs.mean(0) if bias else mean
        inputs = inputs - mean
    inputs, outputs = inputs.to(device), outputs.to(device)
    shift = (change @ mean[:, None])[:, 0]
    if about is not None and not outputs.any():
        nothing = LowRank(torch.zeros(out, 0), torch.zeros(into, 0))
        return Directions(nothing, torch.zeros(0), shift.cpu(), mean.cpu())
    size = min(most + _EXTRA, out, into)
    if isinstance(change, LowRank) and change.rank:
        # Others of an adapter's change are rounding.
        size = min(size, change.rank)
    C, G = _metric(inputs), _metric(outputs)
    draw = randomness.generator(0, "subspace")
    L = randomness.normal(draw, out, size, dtype=torch.float32).to(device)
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
