"""Metrics of a module's inputs and outputs, and directions of its change in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import randomness, regression
from ..lowrank import LowRank
from ._measuring import Readout, fast, watch
from ._texts import Batch, count_tokens
from .pair import Module

#: Moments are taken over about so many tokens.
TOKENS = 2048
#: They are taken for as many modules at a time as so many numbers of inputs and outputs allow.
KEPT = 2**28


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

    def to(self, other: Tensor | torch.dtype) -> Moments:
        """Convert both to the type of another tensor, or to a type."""
        return Moments(self.inputs.to(other), self.outputs.to(other))

    def columns(self, mean: Float[Tensor, " in"]) -> Float[Tensor, "in in"]:
        """Find ``Z`` with ``Z Zᵀ = C + ρ c I``, for the inputs' covariance ``C`` about a mean.

        ``c`` is the mean diagonal entry of ``C``.
        """
        return regression.second_moment_root((self.inputs - mean).mT, self.ridge).mT

    def root(self) -> Float[Tensor, "out out"] | None:
        """Find ``R`` with ``RᵀR = G + ρ c I``; ``None`` for ``G = 0``."""
        found = regression.second_moment_root(self.outputs.mT, self.ridge)
        return found if self.outputs.any() else None


def size(modules: Iterable[Module], batches: Sequence[Batch]) -> int:
    """Count the numbers of inputs and outputs of modules that `collect_moments` takes."""
    return sum(module.cost for module in modules) * min(count_tokens(batches), TOKENS)


def collect_moments(
    network: Any,
    modules: Sequence[Module],
    batches: Sequence[Batch],
    readout: Readout,
    *,
    seed: int,
    report: Callable[[int, int], None],
) -> Iterator[tuple[str, Moments]]:
    """Take `Moments` of a network's modules on some texts, forwards and backwards.

    Outputs are as the ``readout`` of the tuned network gives them. Texts of all lengths are taken,
    of about 2,048 tokens, and passed for some modules at a time, so that memory is bounded.
    """
    if not modules:
        return
    parts = max(1, math.ceil(size(modules, batches) / KEPT))
    step = max(1, round(count_tokens(batches) / TOKENS))
    batches = batches[step // 2 :: step]
    for part in range(parts):
        report(part, parts)
        yield from _take(network, modules[part::parts], batches, readout, seed)
    report(parts, parts)


@torch.no_grad()
def _take(
    network: Any, modules: Sequence[Module], batches: Sequence[Batch], readout: Readout, seed: int
) -> Iterator[tuple[str, Moments]]:
    """The moments of some modules, all in one pass."""
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {module.name: [] for module in modules}
    draw = randomness.generator(seed, "probes")
    for batch in batches:
        with torch.enable_grad(), watch(network, kept) as seen:
            with fast(network, readout):
                values = readout.rows(readout.states(network, batch))
            along = randomness.normal(draw, *values.shape).to(values)
            after = [output for _, output in seen.values()]
            slopes = torch.autograd.grad(values, after, along, materialize_grads=True)
        for (name, (given, _)), slope in zip(seen.items(), slopes, strict=True):
            kept[name].append((batch.rows(given).cpu(), batch.rows(slope).cpu()))
    for module in modules:
        # Let go of one after the other, as they may take much memory.
        if parts := kept.pop(module.name):
            yield module.name, Moments(*(torch.cat(rows) for rows in zip(*parts, strict=True)))


class Directions(NamedTuple):
    """The leading part of a module's change ``E``, ordered by a metric [prop-two-metrics].

    The ``leading`` ``r`` columns of ``update`` are the best ``K_r`` of rank ``r``. Direction ``d``
    takes ``σ_d²`` off the squared error, where ``values`` are ``σ_1 ≥ σ_2 ≥ …``; ``total`` is
    ``Σσ_d²`` over all. ``mean`` is the mean input ``μ``, and ``shift`` is ``Eμ``.
    """

    update: LowRank
    values: Float[Tensor, " k"]
    total: float
    shift: Float[Tensor, " out"]
    mean: Float[Tensor, " in"]

    def bias(self, rank: int) -> Float[Tensor, " out"]:
        """``(E − K_r)μ``, added to the tuned bias beside the best update of a rank."""
        best = self.update.leading(rank)
        return self.shift - best.left @ (best.right.mT @ self.mean)


def find_directions(
    change: Float[Tensor, "out in"], about: Moments | None, most: int, *, bias: bool = False
) -> Directions:
    """Find at most ``most`` leading directions of a change ``E`` [prop-two-metrics].

    ``σ_d`` are the singular values of ``R E Z``, where ``Z`` is `Moments.columns`, about the mean
    input if the ``bias`` is free and else about 0, and ``R`` is `Moments.root`; without moments
    (``about``) both are the identity. A module that no output depends on has no direction in two
    metrics.
    """
    Z = R = None
    mean = torch.zeros_like(change[0])
    if about is not None:
        about = about.to(change)
        mean = about.inputs.mean(0) if bias else mean
        Z, R = about.columns(mean), about.root()
        if R is None:
            nothing = LowRank(change[:, :0], change[:0].mT)
            return Directions(nothing, change.new_zeros(0), 0.0, change @ mean, mean)
    rank = min(most, *change.shape)
    best = regression.truncate(change, rank, inputs=Z, metric=R, approximate=True)
    return Directions(best.update, best.values, float(best.total), change @ mean, mean)
