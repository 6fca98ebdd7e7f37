"""One call for every kind of network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import _checks
from ..errors import InputError
from ..networks.base import Network
from ..networks.conversion import as_network
from ..networks.fnn import FNN
from ..networks.linear import LinearNetwork
from ..networks.residual.network import ResidualTransformer
from ..networks.transformer import Transformer
from ..regions import Region, Samples
from . import fnn, linear, residual, transformer
from .adaptation import Adaptation

CONSTRUCTIONS: dict[type[Network], Callable[..., Adaptation]] = {
    LinearNetwork: linear.adapt,
    FNN: fnn.adapt,
    Transformer: transformer.adapt,
    ResidualTransformer: residual.adapt,
}

# What `adapt` gives to a construction by itself; the region is made of its inputs.
OWN = ("frozen", "target", "ranks", "region")


def adapt(
    frozen: Any,
    target: Any,
    ranks: int | Sequence[int] | Mapping[str, int],
    inputs: Any = None,
    **options: Any,
) -> Adaptation:
    """Adapters, and biases, that make a frozen network imitate a target of its kind.

    Returns what that construction does: adapters with the evidence for them. Raises what it raises,
    and `InputError` for inputs that are missing or not used, and for an option that it has not.

    Source: [thm-optimal-adaptation], [thm-partition], [thm-transformer], [thm-residual].

    Parameters
    ----------
    frozen, target
        Networks, or what `networks.as_network` makes one from: a `torch.nn.Sequential`, or
        matrices.
    ranks : int or sequence of int or mapping
        One for all weights, or as the construction for this kind of network takes them.
    inputs
        For ReLU networks, where the target is to be imitated: a `regions.Ball` or `regions.Box`, or
        `regions.Samples`, or inputs as columns ``[..., width, samples]``, of which samples are
        made. Linear networks and transformers are adapted for all inputs.
    options
        Of the construction: `linear.adapt`, `fnn.adapt`, `transformer.adapt` or
        `constructions.residual.adapt`.
    """
    frozen, target = as_network(frozen, "frozen"), as_network(target, "target")
    kind = kind_of(frozen)
    construct = CONSTRUCTIONS[kind]
    known = [name for name in inspect.signature(construct).parameters if name not in OWN]
    for option in options:
        if option not in known:
            allowed = f"among {', '.join(known)} for a frozen {kind.__name__}"
            raise InputError("options", allowed=allowed, given=option)
    if kind is FNN:
        return construct(frozen, target, ranks, _region(inputs), **options)
    if inputs is not None:
        raise InputError(
            "inputs",
            allowed="left out for linear networks and transformers",
            given=type(inputs).__name__,
            remedy="these are adapted for all inputs",
        )
    return construct(frozen, target, ranks, **options)


def kind_of(frozen: Network) -> type[Network]:
    """The class of networks, among those that there is a construction for, that it is of."""
    _checks.kind(*CONSTRUCTIONS, frozen=frozen)
    return next(kind for kind in CONSTRUCTIONS if isinstance(frozen, kind))


def _region(inputs: Any) -> Region:
    if inputs is None:
        raise InputError(
            "inputs",
            allowed="given for a ReLU network",
            given="none",
            remedy="its biases are tuned for a region, such as regions.Ball(3.0), or for samples, "
            "columns [..., width, samples]",
        )
    return inputs if isinstance(inputs, Region) else Samples(inputs)
