"""The network that a value stands for, whatever its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import InputError
from .base import Network
from .fnn import FNN
from .linear import LinearNetwork


def as_network(value: Any, name: str = "network") -> Network:
    """``value`` itself if it is a network, or the one that it stands for.

    A `torch.nn.Sequential` stands for a `LinearNetwork` where it has neither ReLU nor bias, or else
    for an `FNN`; a matrix, or several, for a `LinearNetwork`. Raises `InputError` for anything
    else, and for what `FNN.from_sequential` and `LinearNetwork.of` refuse; it calls the value
    ``name``.
    """
    if isinstance(value, Network):
        return value
    if isinstance(value, nn.Sequential):
        has_relu_or_bias = any(
            isinstance(part, nn.ReLU) or getattr(part, "bias", None) is not None
            for part in value.modules()
        )
        kind: type[FNN] | type[LinearNetwork] = FNN if has_relu_or_bias else LinearNetwork
        return kind.from_sequential(value, name=name)
    if isinstance(value, str) or not isinstance(value, Tensor | np.ndarray | Sequence):
        raise InputError(
            name,
            allowed="a network (lorapower.networks), a torch.nn.Sequential of layers, or matrices",
            given=type(value).__name__,
            remedy="networks.residual.from_decoder makes a network of a GPT-2 or OPT"
            if hasattr(value, "config")
            else "",
        )
    return LinearNetwork.of(value, name)
