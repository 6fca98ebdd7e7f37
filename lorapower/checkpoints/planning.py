"""Directions of a module's change in a metric, and which to take for a number of parameters.

The statements are those on errors in two metrics and on allocation of the chapter on planning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import randomness
from .metrics import Moments
from .pair import Module

Metric = Literal["plain", "input", "both"]
METRICS: tuple[Metric, ...] = get_args(Metric)
# The output metric is known from few texts: this part of its mean is added for every direction.
RIDGE = 0.1
# Of an SVD of which only the leading part is asked for: extra columns, and rounds.
EXTRA, ROUNDS = 16, 3


class Directions(NamedTuple):
    """The leading part of a module's change, in the order in which a metric takes it.

    ``K_r = left[:, :r] right[:, :r]ᵀ`` is the best change of rank ``r`` in the metric
    [prop-two-metrics], and ``σ_d²`` is what direction ``d`` takes off the squared error.

    Attributes
    ----------
    left, right : Tensor
        The factors.
    values : Tensor
        ``σ_d``, falling.
    total : float
        ``Σσ_d²`` over all directions, also those past the last column.
    shift : Tensor
        ``(E − K_r)μ`` for rank 0: what the bias takes over of the change at the mean input.
    mean : Tensor
        ``μ``.
    """

    left: Float[Tensor, "out k"]
    right: Float[Tensor, "in k"]
    values: Float[Tensor, " k"]
    total: float
    shift: Float[Tensor, " out"]
    mean: Float[Tensor, " in"]

    def bias(self, rank: int) -> Float[Tensor, " out"]:
        """``(E − K_r)μ``: what is added to the tuned bias for the best change of this rank."""
        return self.shift - self.left[:, :rank] @ (self.right[:, :rank].mT @ self.mean)


def directions(
    change: Float[Tensor, "out in"], about: Moments | None, metric: Metric, most: int
) -> Directions:
    """The directions of a change ``E`` in a metric: at most ``most`` of them [prop-two-metrics].

    ``σ_d`` and ``U`` are those of ``R E Zᵀ``: ``Z`` has the inputs' second moment, or is the
    identity in the metric ``"plain"``; ``R`` has the outputs' in ``"both"``, and a little of the
    identity, or else is the identity. Then ``K_r = R⁻¹ U_r U_rᵀ R E``. A module that no output
    depends on has none in ``"both"``.
    """
    E = change.double()
    out, into = E.shape
    most = min(most, out, into)
    mean = E.new_zeros(into)
    Z: Tensor | None = None
    R: Tensor | None = None
    if metric != "plain":
        assert about is not None
        Z, mean = about.inputs.double(), about.mean.double()
    if metric == "both":
        assert about is not None
        R = root(about.outputs)
        if R is None:
            return Directions(E[:, :0], E[:0].mT, E.new_zeros(0), 0.0, E @ mean, mean)
    U, values, total = _leading(E, Z, R, most)
    left = U if R is None else torch.linalg.solve_triangular(R, U, upper=True)
    right = E.mT @ (U if R is None else R.mT @ U)
    return Directions(left, right, values, total, E @ mean, mean)


def root(outputs: Float[Tensor, "rows out"]) -> Float[Tensor, "out out"] | None:
    """``R``, upper triangular, of the output metric with its ridge; nothing for one that is 0."""
    rows = outputs.double()
    G = rows.mT @ rows
    if not (level := float(G.trace()) / len(G)):
        return None
    G.diagonal().add_(RIDGE * level)
    return torch.linalg.cholesky(G, upper=True)


def _leading(
    E: Tensor, Z: Tensor | None, R: Tensor | None, most: int
) -> tuple[Tensor, Tensor, float]:
    """``U``, ``σ`` of ``R E Zᵀ`` for its leading ``most`` directions, and ``Σσ²`` of all.

    Of a large matrix the leading subspace is found by rounds of multiplication (Halko, Martinsson
    and Tropp, 2011), so that time grows as its number of entries.
    """

    def ahead(x: Tensor) -> Tensor:
        x = E @ (x if Z is None else Z.mT @ x)
        return x if R is None else R @ x

    def back(x: Tensor) -> Tensor:
        x = E.mT @ (x if R is None else R.mT @ x)
        return x if Z is None else Z @ x

    height, width = len(E), E.shape[1] if Z is None else len(Z)
    M = E if Z is None else E @ Z.mT
    M = M if R is None else R @ M
    total = float(M.square().sum())
    if min(height, width) > 2 * (most + EXTRA):
        draw = randomness.generator(0, "subspace")
        Q = torch.linalg.qr(ahead(randomness.normal(draw, width, most + EXTRA))).Q
        for _ in range(ROUNDS):
            Q = torch.linalg.qr(ahead(torch.linalg.qr(back(Q)).Q)).Q
        inner, values, _ = torch.linalg.svd(back(Q).mT, full_matrices=False)
        U = Q @ inner
    else:
        U, values, _ = torch.linalg.svd(M, full_matrices=False)
    return U[:, :most], values[:most], total


class Path(NamedTuple):
    """Directions of all modules in the order in which more parameters take them.

    Attributes
    ----------
    modules : list of str
        The module of each step.
    costs : ndarray
        Numbers of parameters after each step.
    """

    modules: list[str]
    costs: np.ndarray[tuple[int], np.dtype[np.int64]]

    def ranks(self, parameters: int) -> dict[str, int]:
        """Ranks for at most so many parameters."""
        return self.after(int(np.searchsorted(self.costs, parameters, side="right")))

    def after(self, steps: int) -> dict[str, int]:
        """Ranks after so many steps; modules without one are left out."""
        found: dict[str, int] = {}
        for name in self.modules[:steps]:
            found[name] = found.get(name, 0) + 1
        return found


def path(
    values: Mapping[str, Float[Tensor, " k"]], modules: Mapping[str, Module], step: int = 1
) -> Path:
    """Directions by ``σ²/cost``, the largest first [prop-allocation].

    ``step`` directions of a module are taken at once. Each prefix is best for what it costs, of all
    ranks that are multiples of ``step``, for the prediction ``Σ_m Σ_{d>r_m} σ_d²``.
    """
    items = []
    for order, (name, found) in enumerate(values.items()):
        squares = found.double().square()
        for start in range(0, len(squares), step):
            taken = squares[start : start + step]
            cost = modules[name].cost * len(taken)
            items.append((-float(taken.sum()) / cost, order, start, name, len(taken)))
    items.sort()
    names = [name for density, _, _, name, size in items if density < 0 for _ in range(size)]
    costs = np.cumsum([modules[name].cost for name in names], dtype=np.int64)
    if step > 1:
        # Within a step nothing is bought before all of it is.
        ends = np.cumsum([size for density, *_, size in items if density < 0]) - 1
        costs = np.repeat(costs[ends], np.diff(ends, prepend=-1))
    return Path(names, costs)


def uniform(modules: Mapping[str, Module], rank: int) -> dict[str, int]:
    """One rank for all modules, or the most that a small one can have."""
    return {name: min(rank, *module.shape) for name, module in modules.items()}


def by_energy(
    values: Mapping[str, Float[Tensor, " k"]],
    totals: Mapping[str, float],
    modules: Mapping[str, Module],
    parameters: int,
) -> dict[str, int]:
    """Of each module the least rank with one and the same share of ``‖ΔW‖²``.

    The share is the largest that so many parameters pay for. This is the rule of
    ``peft.convert_to_lora`` and, with norms in place of squares, of other tools that extract
    adapters.
    """
    shares = {
        name: (found.double().square().cumsum(0) / totals[name]).numpy()
        for name, found in values.items()
        if totals[name]
    }

    def ranks(share: float) -> dict[str, int]:
        return {
            name: min(int((each < share).sum()) + 1, len(each)) for name, each in shares.items()
        }

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = cost(ranks(middle), modules) <= parameters
        low, high = (middle, high) if fits else (low, middle)
    found_at = ranks(low)
    return found_at if cost(found_at, modules) <= parameters else {}


def by_inputs(
    spread: Mapping[str, Float[Tensor, " k"]],
    modules: Mapping[str, Module],
    parameters: int,
    most: int,
) -> dict[str, int]:
    """Ranks that follow the variance of what modules take in, for at most so many parameters.

    Directions of all modules are taken by their part of the variance, the largest first. So does
    EVA (Paischer et al., 2024), before training, with inputs as they are; here ``spread`` has the
    singular values of each module's inputs as `Moments` weighs them. No rank is above ``most``.
    """
    parts = sorted(
        (
            (-float(part), order, name)
            for order, (name, values) in enumerate(spread.items())
            for part in values.double().square() / values.double().square().sum()
        ),
    )
    found: dict[str, int] = {}
    for _, _, name in parts:
        rank = found.get(name, 0) + 1
        if rank > min(most, *modules[name].shape):
            continue
        if (parameters := parameters - modules[name].cost) < 0:
            break
        found[name] = rank
    return found


def cost(ranks: Mapping[str, int], modules: Mapping[str, Module]) -> int:
    """Numbers of adapters of these ranks: ``Σ_m r_m (out_m + in_m)``."""
    return sum(modules[name].cost * rank for name, rank in ranks.items())
