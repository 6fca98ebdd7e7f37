"""Any network: its adapters, and the rank that an error needs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import _checks
from ..adapters import Adapters
from ..errors import InputError
from ..networks.base import Network
from ..networks.layers import FNN, LinearNetwork, as_network
from ..regression import relative_error
from .fnn import adapt_relu
from .linear import Adaptation, adapt_linear
from .transformer import adapt_transformer

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Adapted(Generic[T]):
    """Hold what `adapt` returns: the adapters of ``frozen``, as it was given, and their evidence.

    ``evidence`` has the errors that the construction predicts and measures, by kind of network:
    a `LinearAdaptation`, an `FNNAdaptation` or a `TransformerAdaptation`.
    """

    frozen: T
    evidence: Adaptation

    @property
    def adapters(self) -> Adapters:
        """The updates of the weights and biases, in the order of ``as_network(frozen).weights``."""
        return self.evidence.adapters

    @cached_property
    def network(self) -> T:
        """The adapted network, of the kind that was given: a module, matrices, or a network."""
        return _in_place_of(self.frozen, self.adapters.merge(as_network(self.frozen, "frozen")))


def adapt(
    frozen: T,
    target: Any,
    ranks: Any,
    on: Any = None,
    *,
    throw: bool = True,
) -> Adapted[T]:
    """Make a frozen network imitate a target of its kind, by adapters and biases.

    It goes to `adapt_linear`, `adapt_relu` or `adapt_transformer`, and raises what that does.
    Source: [thm-optimal-adaptation], [thm-partition], [thm-transformer], [thm-residual].

    Parameters
    ----------
    frozen, target
        Networks, or what `networks.as_network` takes: a `torch.nn.Linear` or a
        `torch.nn.Sequential` of these and ReLUs, a matrix, or several.
    ranks
        One for all weights, one for each, or for transformers one for each kind of weight.
    on : Region or Tensor
        For networks with ReLUs, and for no others: the `regions.Region` on which to imitate, or
        inputs as columns ``[..., width, samples]``. Far from them the result is another function.
    throw
        See `adapt_linear`.

    Examples
    --------
    A module of two layers becomes one of a single layer, with rank 2 on both layers.

    >>> import torch
    >>> from torch import nn
    >>> from lorapower.constructions import adapt
    >>> _ = torch.manual_seed(0)
    >>> relu = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)]
    >>> base, target = nn.Sequential(*relu[:2]).double(), relu[2].double()
    >>> x = torch.randn(100, 4).double()
    >>> found = adapt(base, target, ranks=2, on=x.mT)
    >>> type(found.network).__name__, found.adapters.ranks
    ('Sequential', (2, 2))
    >>> torch.allclose(found.network(x), target(x))
    True
    """
    network, goal = _one_kind(frozen, target)
    if isinstance(network, FNN):
        found: Adaptation = adapt_relu(network, goal, ranks, on, throw=throw)
    elif on is not None:
        allowed = "left out for linear networks and transformers, adapted for all inputs"
        raise InputError("on", allowed=allowed, given=type(on).__name__)
    else:
        construct: Any = adapt_linear if isinstance(network, LinearNetwork) else adapt_transformer
        found = construct(network, goal, ranks, throw=throw)
    return Adapted(frozen, found)


@torch.no_grad()
def rank_for_error(frozen: Any, target: Any, error: float, on: Any) -> int:
    """Find the least rank at which constructed adapters leave at most an error on given inputs.

    The error is `regression.relative_error`; [def-needed-rank] has the mean square in place of the
    variance. Adapters of one rank after the other, from 0 on, are made for single networks and
    measured on columns ``[width, samples]`` or sequences ``[..., width, tokens]``. Raises
    `InputError` where no rank is enough.

    Examples
    --------
    >>> import torch
    >>> from lorapower.constructions import rank_for_error
    >>> from lorapower.networks import LinearNetwork
    >>> frozen, target = LinearNetwork.random(4, 8), LinearNetwork.random(1, 8, seed=1)
    >>> x = torch.eye(8, dtype=torch.float64)
    >>> rank_for_error(frozen, target, 1e-12, on=x), rank_for_error(frozen, target, 0.5, on=x)
    (2, 1)
    """
    frozen, target = _one_kind(frozen, target)
    _checks.single(frozen=frozen, target=target)
    error, x = _checks.number("error", error, 0), target.as_inputs(on, "on")
    wanted, region = target(x), x if isinstance(frozen, FNN) else None
    for rank in range(max(min(weight.shape) for weight in frozen.weights) + 1):
        adapted = adapt(frozen, target, rank, region, throw=False).network
        if relative_error(adapted(frozen.fill(x)), wanted) <= error:
            return rank
    raise InputError("error", allowed="met by some rank", given=f"{error:.3g}")


def _one_kind(frozen: Any, target: Any) -> tuple[Any, Any]:
    """Read two networks of one kind."""
    frozen, target = as_network(frozen, "frozen"), as_network(target, "target")
    _checks.kind(type(frozen), target=target)
    return frozen, target


def _in_place_of(given: Any, network: Network) -> Any:
    """Write a network as what `as_network` read another of these sizes from."""
    if isinstance(given, Network):
        return network
    if isinstance(given, nn.Module):
        return _as_module(given, network)
    if isinstance(given, Tensor | np.ndarray):
        stack = network.weights[0] if given.ndim == 2 else torch.stack(network.weights, -3)
        return stack if isinstance(given, Tensor) else stack.numpy()
    pairs = zip(given, network.weights, strict=True)
    return [weight if isinstance(one, Tensor) else weight.numpy() for one, weight in pairs]


def _as_module(given: nn.Module, network: Network) -> nn.Module:
    """Copy a module with the numbers of a network; it gets the biases that it lacks."""
    module = deepcopy(given)
    layers: Any = [
        m for _, m in module.named_modules(remove_duplicate=False) if type(m) is nn.Linear
    ]
    if len(set(layers)) < len(layers):
        # A layer that is used twice is adapted in two ways.
        assert isinstance(network, LinearNetwork | FNN)
        return network.to_sequential()
    for l, layer in enumerate(layers):
        layer.weight.data = network.weights[l].clone()
        if network.biases:
            layer.bias = nn.Parameter(network.biases[l].clone(), layer.weight.requires_grad)
    return module
