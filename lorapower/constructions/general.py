"""Every kind of network: its adapters, and the rank that an error needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import _checks
from ..errors import InputError
from ..networks.base import Network
from ..networks.layers import FNN, LinearNetwork, as_network
from ..networks.transformer import Transformer
from ..regions import Region, Samples
from ..regression import relative_error
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


@torch.no_grad()
def rank_for_error(
    frozen: Any, target: Any, error: float, inputs: Any, *, ranks: Sequence[int] | None = None
) -> int:
    """Find the least rank at which constructed adapters leave at most an error on given inputs.

    The error is `regression.relative_error`, the mean square over the variance of the target's
    outputs. Adapters of each of the ``ranks``, by default all from 0 on, are made for single
    networks and measured on columns ``[width, samples]`` or sequences ``[..., width, tokens]``.
    Raises `InputError` where no rank is enough. [def-needed-rank] has the mean square, not the
    variance, of the outputs.
    """
    frozen, target = _one_kind(frozen, target)
    _checks.single(frozen=frozen, target=target)
    error, x = _checks.tolerance("error", error), target.as_inputs(inputs, "inputs")
    wanted, region = target(x), Samples(x) if isinstance(frozen, FNN) else None
    largest = max(min(weight.shape) for weight in frozen.weights)
    tried = range(largest + 1) if ranks is None else sorted(ranks)
    if not tried:
        raise InputError("ranks", allowed="at least one rank to try", given="none")
    for rank in tried:
        adapted = adapt(frozen, target, rank, region, throw=False).adapters.merge(frozen)
        if relative_error(adapted(frozen.fill(x)), wanted) <= error:
            return rank
    raise InputError("error", allowed="met by a rank that is tried", given=f"{error:.3g}")


def _one_kind(frozen: Any, target: Any) -> tuple[Any, Any]:
    """Read two networks of one kind."""
    frozen, target = as_network(frozen, "frozen"), as_network(target, "target")
    _checks.kind(type(frozen), target=target)
    return frozen, target
