"""Every kind of network: its adapters, and the rank that an error needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _checks
from ..bounds.layers import fnn_error_on
from ..bounds.transformer import transformer_error
from ..errors import InputError
from ..networks.base import Network
from ..networks.gap import Gap
from ..networks.layers import FNN, LinearNetwork, as_network, pad
from ..networks.partition import Partition
from ..networks.transformer import Transformer
from ..regions import Region, Samples
from . import fnn, linear, transformer
from .linear import Adaptation

_CONSTRUCTIONS: dict[type[Network], Callable[..., Adaptation]] = {
    LinearNetwork: linear.adapt,
    FNN: fnn.adapt,
    Transformer: transformer.adapt,
}


def adapt(
    frozen: Any,
    target: Any,
    ranks: int | Sequence[int] | Mapping[str, int],
    inputs: Any = None,
    **options: Any,
) -> Adaptation:
    """Adapters and biases that make a frozen network imitate a target of its kind.

    Networks, or what `networks.as_network` takes, go to `linear.adapt`, `fnn.adapt` or
    `transformer.adapt`, with its ``ranks`` and ``options``; returns and raises what that does. Only
    ReLU networks take ``inputs``: the `regions.Region` in which to imitate, or columns
    ``[..., width, samples]``, which become `regions.Samples`. Source: [thm-optimal-adaptation],
    [thm-partition], [thm-transformer], [thm-residual].
    """
    frozen, target, kind = _one_kind(frozen, target)
    construct = _CONSTRUCTIONS[kind]
    given_here = ("frozen", "target", "ranks", "region")
    known = [name for name in inspect.signature(construct).parameters if name not in given_here]
    for option in options:
        if option not in known:
            allowed = f"among {', '.join(known)} for a frozen {kind.__name__}"
            raise InputError("options", allowed=allowed, given=option)
    if kind is FNN:
        if inputs is None:
            remedy = (
                "its biases are tuned for a regions.Ball(3.0), or columns [..., width, samples]"
            )
            raise InputError(
                "inputs", allowed="given for a ReLU network", given="none", remedy=remedy
            )
        region = inputs if isinstance(inputs, Region) else Samples(inputs)
        return construct(frozen, target, ranks, region, **options)
    if inputs is not None:
        allowed = "left out for linear networks and transformers, adapted for all inputs"
        raise InputError("inputs", allowed=allowed, given=type(inputs).__name__)
    return construct(frozen, target, ranks, **options)


@dataclass(frozen=True, eq=False)
class NeededRank:
    """The least rank for all layers that meets an error, and what the ranks below it leave.

    Errors are relative to the mean square of the target's outputs. ``rank`` ``[...]`` is the least
    one tried that meets the error, or the largest where ``success`` ``[...]`` is false; it leaves
    ``error`` ``[...]``. All ranks ``tried``, least first, leave ``errors`` ``[ranks, ...]``.
    """

    rank: Int[Tensor, "*batch"]
    error: Float[Tensor, "*batch"]
    tried: Int[Tensor, " ranks"]
    errors: Float[Tensor, " ranks *batch"]
    success: Bool[Tensor, "*batch"]


@torch.no_grad()
def rank_for_error(
    frozen: Any,
    target: Any,
    error: float,
    inputs: Any,
    *,
    by: Literal["bound", "trial"] = "bound",
    ranks: Sequence[int] | None = None,
    partition: Partition | None = None,
    throw: bool = True,
    seed: int = 0,
) -> NeededRank:
    """The least rank at which adapters leave at most a given error on given inputs.

    The error, at least 0, is the mean square over outputs and inputs, divided by the mean square of
    the target's outputs: not of what tuning changed, as the command's. ``ranks`` (by default all),
    each for all layers and cut to each weight's
    smaller side, are tried from below until each member of the batch has its own. Raises
    `InputError` where none is enough and ``throw``. Source: [def-needed-rank].

    Parameters
    ----------
    frozen, target
        Networks of one kind, or what `networks.as_network` takes.
    inputs : Tensor
        Columns ``[..., width, samples]``; for transformers one sequence ``[width, tokens]`` or
        ``[..., sequences, width, tokens]``. Batch dimensions broadcast with the networks'.
    by : {"bound", "trial"}
        ``"bound"``: by `bounds.fnn_error_on`, `bounds.transformer_error` or, for linear networks,
        the error itself. Where the construction's assumptions hold, which is not checked, the error
        is met up to rounding, and less rank may be enough. Bounds above 1 say nothing, and then
        the answer is the exact rank: measure by ``"trial"``.
        ``"trial"``: by making and measuring adapters; `adapt` may then need ``throw=False`` where
        they round much.
    partition : Partition, optional
        For ReLU networks; uniform by default.
    """
    frozen, target, kind = _one_kind(frozen, target)
    error, throw = _checks.tolerance("error", error), _checks.flag("throw", throw)
    _checks.choice("by", by, ["bound", "trial"])
    if partition is not None and kind is not FNN:
        raise InputError("partition", allowed="left out but for ReLU networks", given=partition)
    x = _group(inputs, frozen, target)
    signal = _mean_square(target(x))
    if by == "trial":
        measure = _trial(frozen, target, x, partition, seed)
    else:
        measure = _bound(frozen, target, x, partition)

    tried: list[int] = []
    errors: list[Tensor] = []
    for rank in _ranks_to_try(frozen, ranks):
        squared = measure(rank)
        # Nothing is no error even of a target that is 0 itself.
        relative = torch.where(squared == 0, 0, squared / signal)
        tried.append(rank)
        errors.append(relative.nan_to_num(torch.inf, torch.inf))
        met = torch.stack(errors) <= error
        success = met.any(0)
        if success.all():
            break

    if throw and not success.all():
        most = float(errors[-1][~success][0])
        given = f"{error:.3g}, where rank {tried[-1]}, the largest, leaves {most:.3g}"
        given += _checks.failed_members(~success)
        raise InputError("error", allowed="met by a rank that is tried", given=given)
    place = torch.where(success, met.long().argmax(0), len(tried) - 1)
    stacked, all_tried = torch.stack(errors), torch.tensor(tried, device=place.device)
    least = stacked.gather(0, place[None])[0]
    return NeededRank(all_tried[place], least, all_tried, stacked, success)


def _one_kind(frozen: Any, target: Any) -> tuple[Any, Any, type[Network]]:
    """Two networks of one kind, and that kind."""
    frozen, target = as_network(frozen, "frozen"), as_network(target, "target")
    _checks.kind(*_CONSTRUCTIONS, frozen=frozen)
    kind = next(kind for kind in _CONSTRUCTIONS if isinstance(frozen, kind))
    _checks.kind(kind, target=target)
    return frozen, target, kind


def _ranks_to_try(frozen: Network, ranks: Sequence[int] | None) -> list[int]:
    largest = max(min(weight.shape[-2:]) for weight in frozen.weights)
    if ranks is None:
        return list(range(largest + 1))
    if not isinstance(ranks, Sequence) or not ranks:
        raise InputError("ranks", allowed="a list of ranks to try", given=repr(ranks))
    limit = "the largest smaller side"
    return sorted({_checks.integer("ranks", rank, 0, largest, limit=limit) for rank in ranks})


def _group(inputs: Any, frozen: Network, target: Network) -> Tensor:
    """Inputs ``[groups, ..., width, n]``: one group for each sequence, then the batch."""
    x = _checks.real_tensor("inputs", inputs, min_dims=2)
    x = x.movedim(-3, 0) if target.sequences and x.ndim > 2 else x[None]
    groups, *batch = x.shape[:-2]
    missing = max(len(network.batch_shape) for network in (frozen, target)) - len(batch)
    x = target.as_inputs(x.reshape(groups, *[1] * missing, *batch, *x.shape[-2:]), "inputs")
    shapes = [tuple(batch), tuple(frozen.batch_shape), tuple(target.batch_shape)]
    _checks.common_shape("inputs, frozen and target", shapes)
    return x


def _mean_square(outputs: Tensor) -> Tensor:
    return outputs.square().mean((0, -2, -1))


def _trial(
    frozen: Any, target: Any, x: Tensor, partition: Partition | None, seed: int
) -> Callable[[int], Tensor]:
    """The mean squared error of adapters made at a rank."""
    outputs = target(x)
    fills = isinstance(frozen, Transformer)
    padded = frozen.fill(x) if fills else pad(x, frozen.weights[0].shape[-1])
    region = Samples(x[0]) if isinstance(frozen, FNN) else None
    options = {} if partition is None else {"partition": partition}

    def squared(rank: int) -> Tensor:
        adapters = adapt(frozen, target, rank, region, throw=False, seed=seed, **options).adapters
        adapted = adapters.merge(frozen)(padded)
        return _mean_square(adapted[..., : outputs.shape[-2], :] - outputs)

    return squared


def _bound(
    frozen: Any, target: Any, x: Tensor, partition: Partition | None
) -> Callable[[int], Tensor]:
    """A bound of the mean squared error at a rank; for linear networks, the error."""
    gap = Gap(frozen, target) if isinstance(frozen, LinearNetwork) else None
    outputs = target(x).shape[-2]

    def squared(rank: int) -> Tensor:
        if gap is not None:
            return _mean_square(gap.undone(sum(gap.ranks([rank] * frozen.depth))) @ x)
        if isinstance(frozen, FNN):
            bound = fnn_error_on(frozen, target, rank, x[0], partition)
            return bound.square() / outputs
        bound = transformer_error(frozen, target, rank, x)
        return bound.square().mean(0) / outputs

    return squared
