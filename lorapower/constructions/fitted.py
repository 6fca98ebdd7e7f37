"""Adapters fitted to inputs by closed forms, segment by segment, at any rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks
from ..adapters import Adapters
from ..bounds._expansion import first_order
from ..bounds.layers import variance as variance_of
from ..errors import InputError
from ..lowrank import LowRank, truncated_svd
from ..networks.base import Network
from ..networks.layers import FNN, as_network
from ..networks.partition import Partition
from ..networks.transformer import Transformer
from ..regions import Ball, Region
from ..regression import Regression, reduced_rank, second_moment_root
from . import transformer
from ._blocks import fit_blocks, fit_layer
from .fused import Fused, fuse
from .linear import Adaptation

Metric = Literal["alike", "outputs", "best"]
# Share of the identity in an output metric: errors that inputs never reach must cost something.
_RIDGE = 1e-3
# The region of a ReLU network: a ball as large as all inputs, times this.
_REACH = 1.25
# Half width of a 95% interval, in standard errors.
_NORMAL = 1.96


class _Split(NamedTuple):
    """Inputs to ``fit``; of those held out, one half to ``select`` a fit and one to ``test`` it."""

    fit: Tensor
    select: Tensor
    test: Tensor


@dataclass(frozen=True)
class Fit:
    """Hold one fit: ``adapters`` of the ``fused`` or, if ``direct``, of the frozen network.

    Those of ReLU networks hold in the ``region``.
    """

    fused: Fused
    adapters: Adapters
    direct: bool = False
    region: Region | None = None

    @property
    def network(self) -> Network:
        """The network that the adapters are for."""
        return self.fused.frozen if self.direct else self.fused.network

    def error(self, x: Tensor, wanted: Tensor) -> float:
        """Average the squared difference of the adapted network's outputs from those wanted."""
        return float((self.adapters.merge(self.network)(x) - wanted).square().mean())


@dataclass(frozen=True, eq=False, repr=False)
class FittedAdaptation(Adaptation):
    """Hold adapters fitted to inputs, and the evidence for them.

    Errors are mean squared differences of outputs from the target's over the variance of these: the
    best constant has 1. ``success`` says whether the ``fits``, one for each member of the batch,
    were carried back to the frozen network acceptably.

    Attributes
    ----------
    error : Tensor
        On the test inputs, by which nothing was chosen; ``[...]``.
    low, high : Tensor
        Its 95% interval, normal, from the spread over inputs; ``[...]``.
    predicted : Tensor
        By [prop-first-order], on the inputs of the fit; NaN without a fused network; ``[...]``.
    """

    error: Float[Tensor, "*batch"]
    low: Float[Tensor, "*batch"]
    high: Float[Tensor, "*batch"]
    predicted: Float[Tensor, "*batch"]
    fits: tuple[Fit, ...]

    @classmethod
    def measure(
        cls, fits: Sequence[Fit], data: _Split, batch: torch.Size, *, throw: bool = True
    ) -> FittedAdaptation:
        """Carry back fits, one for each member of a batch, and measure them on the test inputs."""
        found, columns = [], []
        for fit in fits:
            fused, predicted = fit.fused, data.test.new_tensor(torch.nan)
            if fit.direct:
                carried = Adaptation(fit.adapters, torch.ones_like(predicted, dtype=torch.bool))
            else:
                carried = fused.carry_back(fit.adapters, fit.region, throw=throw)
                adapted = fit.adapters.merge(fused.network)
                predicted = first_order(adapted, fused.fused_target, data.fit)
            found.append(carried)
            errors = relative_error(carried.adapters.merge(fused.frozen), fused.target, data.test)
            columns.append(torch.stack([*errors, predicted]))
        adapters = _stack([carried.adapters for carried in found], batch)
        success = torch.stack([carried.success for carried in found]).reshape(batch)
        error, low, high, predicted = torch.stack(columns, -1).reshape(4, *batch).unbind(0)
        return cls(adapters, success, error, low, high, predicted, tuple(fits))


@torch.no_grad()
@_checks.flushing()
def adapt(
    frozen: Any,
    target: Any,
    ranks: Any,
    inputs: Any,
    held_out: Any,
    *,
    partition: Partition | None = None,
    region: Region | None = None,
    throw: bool = True,
) -> FittedAdaptation:
    """Find the adapters and biases of the least error that closed forms reach on given inputs.

    Each segment ``P`` of the fused network (`fused.fuse`) becomes ``P + K``: ``K`` of the segment's
    rank and a bias bring it as near as possible, on the adapted network's own activations ``ẑ``, to
    the target's segment (`regression.reduced_rank`; for scores see `nearest_scores`). Half of the
    held-out inputs select, for each segment, among the theorem's splitting, a fit to the target's
    matrix alone, several shrinkages towards it and, in ReLU networks, a fit in the outputs' metric,
    and keep the theorem's adapters where all fits are worse. The other half gives the error.

    Raises `InputError` for networks, ranks and partitions that do not fit, for inputs that are too
    few, of another width, not finite, or in both sets; with ``throw``, `PrecisionError` or
    `SingularError` where too many digits are lost. Source: [thm-reduced-rank], [prop-scores],
    [lem-any-change].

    Parameters
    ----------
    frozen, target
        Networks of one kind, or what `networks.as_network` takes; batch shapes broadcast.
    ranks
        As the construction takes them: one for all or, for transformers, also one for each kind of
        weight by name; for narrow heads even too low for the theorem.
    inputs, held_out
        Columns ``[width, samples]`` or, for transformers, sequences ``[samples, width, tokens]``;
        at least two and four. With less than a few times the width, the fit follows noise.
    partition : Partition, optional
        For ReLU networks, as in `fused.fuse`.
    region : Region, optional
        For ReLU networks: where the carried-back fit holds; by default a ball about the mean of all
        inputs but those that test, 1.25 times as large as they need.
    """
    frozen, target = as_network(frozen, "frozen"), as_network(target, "target")
    _checks.kind(type(frozen), target=target)
    batch = _checks.common_shape("frozen and target", [frozen.batch_shape, target.batch_shape])
    data = split(target, inputs, held_out)
    if isinstance(frozen, FNN):
        if region is None:
            region = Ball.about(torch.cat([data.fit, data.select], -1), _REACH)
        region = region.fit(data.fit.shape[-2], data.fit.dtype)
    elif region is not None or partition is not None:
        name = "region" if partition is None else "partition"
        raise InputError(name, allowed="left out but for ReLU networks", given=f"one for {frozen}")
    fits = []
    for pair in zip(_members(frozen, batch), _members(target, batch), strict=True):
        best = fit(fuse(*pair, ranks, partition), data.fit, data.select)
        fits.append(replace(best, region=region))
    return FittedAdaptation.measure(fits, data, batch, throw=throw)


@torch.no_grad()
def fit(fused: Fused, inputs: Tensor, select: Tensor, metric: Metric = "best") -> Fit:
    """Find the network of least error on ``select`` among those that `adapt` compares.

    In ReLU networks a layer's errors count ``"alike"``, by their effect on the ``"outputs"``, or as
    comes out ``"best"``.
    """
    _checks.choice("metric", metric, get_args(Metric))
    network, target, ranks = fused.network, fused.fused_target, fused.fused_ranks
    if isinstance(network, Transformer) and isinstance(target, Transformer):
        by_kind = dict(zip(network.kind_of_weight, ranks, strict=True))
        each = {kind: by_kind[kind] for kind in network.adapted_kinds}
        # Heads too narrow for their ranks are adapted as well as they are, and lose the comparison.
        theorem = transformer.adapt(network, target, each, throw=False).adapters
        blockwise = fit_blocks(network, target, theorem.merge(network), ranks, inputs, select)
        candidates = [theorem, blockwise]
    else:
        pairs = zip(network.weights, target.weights, ranks, strict=True)
        updates = tuple(truncated_svd(W_target - W, rank) for W, W_target, rank in pairs)
        biases = tuple(b - a for a, b in zip(network.biases, target.biases, strict=True))
        candidates = [Adapters(updates, biases)]
        if metric != "outputs" or not isinstance(target, FNN):
            alike = [None] * len(updates)
            candidates.append(_fit_in_turn(fused, updates, inputs, select, alike))
        if metric != "alike" and isinstance(target, FNN):
            by_outputs = _metrics(target, inputs)
            candidates.append(_fit_in_turn(fused, updates, inputs, select, by_outputs))
    outputs = target(select)
    fits = [Fit(fused, adapters) for adapters in candidates]
    return min(fits, key=lambda fit: fit.error(select, outputs))


def nearest(fused: Fused, inputs: Float[Tensor, "in samples"]) -> Adapters:
    """Bring each layer of a fused ReLU network as near as possible to the target's.

    Layer ``i`` becomes ``P_i + U Uᵀ E_i``: ``U`` are the principal directions of ``E_i z̄_{i−1}``
    about its mean, at the target's activations; the bias adds the mean of the other directions.
    With enough rank the network is the target on all inputs. Source: [thm-reduced-rank].
    """
    network, target = fused.network, fused.fused_target
    assert isinstance(target, FNN)
    z, updates, biases = target.as_inputs(inputs, "inputs"), [], []
    for l, (W, rank) in enumerate(zip(network.weights, fused.fused_ranks, strict=True)):
        E = target.weights[l] - W
        fitted = reduced_rank(E @ z, z, rank, towards=E, shrinkage=inf)
        updates.append(fitted.update)
        biases.append(target.biases[l] + fitted.intercept - network.biases[l])
        z = target.layers(slice(l, l + 1))(z)
    return Adapters(tuple(updates), tuple(biases))


def relative_error(
    network: Network, target: Network, x: Float[Tensor, "*batch width n"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide the mean squared difference of outputs by the target's variance; add a 95% interval.

    The interval treats each sample, or sequence, as one draw and the variance as fixed. Only the
    target's coordinates count. Raises `InputError` for a constant target.
    """
    wanted = target(x)
    outputs = network(network.fill(x))[..., : wanted.shape[-2], :]
    variance = variance_of(wanted)
    if not variance > 0:
        raise InputError(
            "target",
            allowed="one whose outputs differ from input to input",
            given="equal outputs for all",
            remedy="an error relative to their variance has no meaning then",
        )
    each = (outputs - wanted).square().mean((-2, -1) if target.sequences else -2) / variance
    error, half = each.mean(), _NORMAL * each.std() / each.numel() ** 0.5
    return error, (error - half).clamp(min=0), error + half


def split(target: Network, inputs: Any, held_out: Any) -> _Split:
    """Return inputs to fit, to select by and to test on, as the target takes them.

    Raises `InputError` for inputs that are too few, of another width, not finite, or in both sets.
    """
    form = "[samples, width, tokens]" if target.sequences else "[width, samples]"
    place = 0 if target.sequences else -1
    parts = []
    for name, given, least in (("inputs", inputs, 2), ("held_out", held_out, 4)):
        x = target.as_inputs(given, name)
        if x.ndim != 2 + target.sequences or x.shape[place] < least:
            allowed = f"of shape {form}, at least {least} samples"
            raise InputError(name, allowed=allowed, given=f"shape {tuple(x.shape)}")
        parts.append(x)
    rows = [{row.numpy().tobytes() for row in x.cpu().movedim(place, 0)} for x in parts]
    # A few inputs may well be drawn twice.
    shared = len(rows[0] & rows[1])
    if 10 * shared > len(rows[1]):
        raise InputError(
            "held_out",
            allowed="other inputs than those of the fit",
            given=f"{shared} that are among them",
            remedy="the inputs of a fit cannot judge it; split the inputs first",
        )
    return _Split(parts[0], *parts[1].tensor_split(2, place))


def _members(network: Network, batch: torch.Size) -> list[Any]:
    """List single networks, one for each member of the batch."""
    dims = len(network.batch_shape)
    flat = network.map(lambda values: values.reshape(-1, *values.shape[dims:]))
    return [flat[int(place)] for place in network.members(...).expand(batch).flatten()]


def _stack(adapters: Sequence[Adapters], batch: torch.Size) -> Adapters:
    """Make one batch of adapters of equal ranks."""
    each = [replace(one, tuned=None).tensors() for one in adapters]
    stacked = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    return Adapters.from_tensors(
        {name: values.reshape(*batch, *values.shape[1:]) for name, values in stacked.items()}
    )


def _fit_in_turn(
    fused: Fused,
    theorem: Sequence[LowRank],
    x: Tensor,
    select: Tensor,
    metrics: Sequence[Tensor | None],
) -> Adapters:
    """Fit layer after layer on the adapted network's own activations."""
    network, target = fused.network, fused.fused_target
    updates, biases = [], []
    adapted, wanted = [x, select], [x, select]
    # A fused linear network has one layer, and no bias.
    own_biases = network.biases or [x.new_zeros(len(network.weights[0]))]
    goal_biases = target.biases or own_biases
    for l, (W, W_target) in enumerate(zip(network.weights, target.weights, strict=True)):
        wanted = [W_target @ z + goal_biases[l][:, None] for z in wanted]
        fitted = fit_layer(
            (W, W_target),
            fused.fused_ranks[l],
            adapted,
            wanted,
            Regression(theorem[l], goal_biases[l]),
            metric=metrics[l],
            bias=bool(target.biases),
        )
        updates.append(fitted.update)
        biases.append(fitted.intercept - own_biases[l])
        M = W + fitted.update.matrix()
        adapted = [(M @ z + fitted.intercept[:, None]).relu() for z in adapted]
        wanted = [z.relu() for z in wanted]
    return Adapters(tuple(updates), tuple(biases) if target.biases else ())


def _metrics(target: FNN, x: Tensor) -> list[Tensor]:
    """Find the root of what small errors of each layer's pre-activations cost at the outputs."""
    with torch.enable_grad():
        weights = [weight.clone().requires_grad_() for weight in target.weights]
        layers = target.with_parameters(weights, checked=False).preactivations(x)
        outputs = layers[-1] if target.linear_last else layers[-1].relu()
        slopes = [torch.autograd.grad(row.sum(), layers, retain_graph=True) for row in outputs]
    return [second_moment_root(torch.cat(each, -1), _RIDGE) for each in zip(*slopes, strict=True)]
