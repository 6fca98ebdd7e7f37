"""Every kind of network: its adapters, and the rank that an error needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks
from ..errors import InputError
from ..networks.base import Network
from ..networks.layers import FNN, LinearNetwork, as_network
from ..networks.transformer import Transformer
from ..regions import Region, Samples
from . import fnn, linear, transformer
from .linear import Adaptation

_CONSTRUCTIONS: dict[type[Network], Any] = {
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
    """Make a frozen network imitate a target of its kind, by adapters and biases.

    Networks, or what `networks.as_network` takes, go to `linear.adapt`, `fnn.adapt` or
    `transformer.adapt`, with its ``ranks`` and ``options``; returns and raises what that does. Only
    ReLU networks take ``inputs``: the `regions.Region` in which to imitate, or columns
    ``[..., width, samples]``, which become `regions.Samples`. Source: [thm-optimal-adaptation],
    [thm-partition], [thm-transformer], [thm-residual].
    """
    frozen, target = _one_kind(frozen, target)
    construct = _CONSTRUCTIONS[type(frozen)]
    if not isinstance(frozen, FNN):
        if inputs is not None:
            allowed = "left out for linear networks and transformers, adapted for all inputs"
            raise InputError("inputs", allowed=allowed, given=type(inputs).__name__)
        return construct(frozen, target, ranks, **options)
    if inputs is None:
        remedy = "its biases are tuned for a regions.Ball(3.0), or columns [..., width, samples]"
        raise InputError("inputs", allowed="given for a ReLU network", given="none", remedy=remedy)
    region = inputs if isinstance(inputs, Region) else Samples(inputs)
    return construct(frozen, target, ranks, region, **options)


class _NeededRank(NamedTuple):
    rank: Int[Tensor, "*batch"]
    error: Float[Tensor, "*batch"]
    tried: Int[Tensor, " ranks"]
    errors: Float[Tensor, " ranks *batch"]


@torch.no_grad()
def rank_for_error(
    frozen: Any, target: Any, error: float, inputs: Any, *, ranks: Sequence[int] | None = None
) -> _NeededRank:
    """Find the least rank at which constructed adapters leave at most an error on given inputs.

    The error, at least 0, is the mean square over outputs and inputs, divided by the mean square of
    the target's outputs: not of what tuning changed, as the command's. Adapters of one rank for all
    layers, cut to each weight's smaller side, are made and measured from below until each member of
    the batch has its own rank. Returns the least ``rank`` and the ``error`` that it leaves, each
    ``[...]``, and all ranks ``tried`` with their ``errors``, ``[ranks, ...]``. Before there are
    adapters, `bounds.fnn_error_on` bounds the error at a rank and `bounds.transformer_error`
    computes it.

    Raises `InputError` where no rank is enough. Source: [def-needed-rank].

    Parameters
    ----------
    frozen, target
        Networks of one kind, or what `networks.as_network` takes.
    inputs : Tensor
        Columns ``[..., width, samples]``; for transformers one sequence ``[width, tokens]`` or
        ``[..., sequences, width, tokens]``. Batch dimensions broadcast with the networks'.
    ranks : sequence of int, optional
        The ranks to try, by default all.
    """
    frozen, target = _one_kind(frozen, target)
    error = _checks.tolerance("error", error)
    x = _group(inputs, frozen, target)
    outputs = target(x)
    padded = frozen.fill(x)
    region = Samples(x[0]) if isinstance(frozen, FNN) else None
    largest = max(min(weight.shape[-2:]) for weight in frozen.weights)

    tried: list[int] = []
    errors: list[Tensor] = []
    for rank in sorted(set(ranks or range(largest + 1))):
        adapted = adapt(frozen, target, rank, region, throw=False).adapters.merge(frozen)
        missed = adapted(padded)[..., : outputs.shape[-2], :] - outputs
        squared, size = (part.square().mean((0, -2, -1)) for part in (missed, outputs))
        # Nothing is no error even of a target that is 0 itself.
        relative = torch.where(squared == 0, 0, squared / size)
        tried.append(rank)
        errors.append(relative.nan_to_num(torch.inf, torch.inf))
        met = torch.stack(errors) <= error
        missed = ~met.any(0)
        if not missed.any():
            break
    else:
        least = float(errors[-1][missed][0])
        given = f"{error:.3g}, where rank {tried[-1]}, the largest, leaves {least:.3g}"
        given += _checks.failed_members(missed)
        raise InputError("error", allowed="met by a rank that is tried", given=given)
    place = met.long().argmax(0)
    each, all_tried = torch.stack(errors), torch.tensor(tried, device=place.device)
    return _NeededRank(all_tried[place], each.gather(0, place[None])[0], all_tried, each)


def _one_kind(frozen: Any, target: Any) -> tuple[Any, Any]:
    """Read two networks of one kind."""
    frozen, target = as_network(frozen, "frozen"), as_network(target, "target")
    _checks.kind(type(frozen), target=target)
    return frozen, target


def _group(inputs: Any, frozen: Network, target: Network) -> Tensor:
    """Bring inputs into groups ``[groups, ..., width, n]``: one for each sequence, then batches."""
    x = _checks.real_tensor("inputs", inputs, min_dims=2)
    x = x.movedim(-3, 0) if target.sequences and x.ndim > 2 else x[None]
    groups, *batch = x.shape[:-2]
    missing = max(len(network.batch_shape) for network in (frozen, target)) - len(batch)
    x = target.as_inputs(x.reshape(groups, *[1] * missing, *batch, *x.shape[-2:]), "inputs")
    shapes = [tuple(batch), tuple(frozen.batch_shape), tuple(target.batch_shape)]
    _checks.common_shape("inputs, frozen and target", shapes)
    return x
