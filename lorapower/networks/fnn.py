"""Fully connected ReLU networks, and values as networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _checks, randomness
from ..errors import InputError
from ._layers import dense_layers, random_weights, uniform, usable_layers
from .base import Layers, Network
from .linear import LinearNetwork, product


def pad(x: Float[Tensor, "*batch in samples"], width: int) -> Float[Tensor, "*batch width samples"]:
    """Append rows of zeros to inputs of a narrower network, up to ``width`` coordinates."""
    width = _checks.integer("width", width, x.shape[-2])
    return nn.functional.pad(x, (0, 0, 0, width - x.shape[-2]))


@dataclass(frozen=True, eq=False, repr=False)
class FNN(Layers):
    """A ReLU network: layer ``l`` maps ``z`` to ``ReLU(W_l z + b_l)``.

    With ``linear_last`` it ends with ``W_L z + b_L``. The ``L`` weights ``[..., out, in]`` and
    biases ``[..., out]``, first layer first, may be stacked to ``[..., L, D, D]`` and
    ``[..., L, D]``. Tensors, numpy arrays or nested lists are taken, all float32 or all float64;
    batch dimensions broadcast. Raises `InputError` for no layers, sizes that do not fit, other or
    mixed types, and numbers that are not finite.
    """

    biases: tuple[Float[Tensor, "*batch _"], ...]
    linear_last: bool = False

    def __init__(self, weights: Any, biases: Any, *, linear_last: bool = False) -> None:
        linear_last = _checks.flag("linear_last", linear_last)
        self._set(*usable_layers(weights, [] if biases is None else biases), linear_last)

    def _set(self, weights: Sequence[Tensor], biases: Sequence[Tensor], linear_last: bool) -> FNN:
        object.__setattr__(self, "weights", tuple(weights))
        object.__setattr__(self, "biases", tuple(biases))
        object.__setattr__(self, "linear_last", linear_last)
        return self

    @classmethod
    def random(
        cls,
        depth: int,
        width: int,
        *,
        linear_last: bool = False,
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
    ) -> FNN:
        """Draw square layers uniform on ``±1/√D``, like `torch.nn.Linear`, by seed and purpose."""
        generator = randomness.generator(seed, "ReLU network", purpose)
        weights = random_weights(
            depth, width, batch_shape=batch_shape, generator=generator, dtype=dtype
        )
        shape = weights.shape[:-1]
        biases = uniform(*shape, width=width, generator=generator, dtype=dtype)
        return cls(weights, biases, linear_last=linear_last)

    @property
    def relus(self) -> int:
        """How many of the first layers have a ReLU: all, or all but the last."""
        return self.depth - self.linear_last

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> FNN:
        biases = self.biases if biases is None else biases
        return FNN(weights, biases, linear_last=self.linear_last)

    def holding(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> FNN:
        return object.__new__(FNN)._set(weights, biases, self.linear_last)

    def without_last_relu(self) -> FNN:
        """The network without its last ReLU."""
        return object.__new__(FNN)._set(self.weights, self.biases, True)

    def layers(self, which: slice) -> FNN:
        """The network of consecutive layers; only the last of all layers can be linear."""
        last = self.linear_last and self.depth - 1 in range(self.depth)[which]
        return object.__new__(FNN)._set(self.weights[which], self.biases[which], last)

    def linearize(self, blocks: Sequence[slice]) -> FNN:
        """The network without the ReLUs inside blocks: each block becomes one affine layer."""
        weights, biases = [], []
        for layers in blocks:
            bias, *others = self.biases[layers]
            for W, b in zip(self.weights[layers][1:], others, strict=True):
                bias = (W @ bias[..., None])[..., 0] + b
            weights.append(product(self.weights[layers]))
            biases.append(bias)
        return FNN(weights, biases, linear_last=self.linear_last)

    def preactivations(
        self, x: Float[Tensor, "*#batch in samples"]
    ) -> list[Float[Tensor, "*batch _ samples"]]:
        """``W_l z_{l−1} + b_l`` of each layer, with ``z_0 = x`` and ``z_l`` its ReLU."""
        z, arguments = self.as_inputs(x), []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            arguments.append(weight @ z + bias[..., None])
            z = arguments[-1].relu()
        return arguments

    def behind(
        self, l: int, p: Float[Tensor, "*#batch _ samples"]
    ) -> Float[Tensor, "*batch out samples"]:
        """The outputs for pre-activations of layer ``l``, from 0; gradients flow through."""
        for weight, bias in zip(self.weights[l + 1 :], self.biases[l + 1 :], strict=True):
            p = weight @ p.relu() + bias[..., None]
        return p if self.linear_last else p.relu()

    def __call__(
        self, x: Float[Tensor, "*#batch in samples"]
    ) -> Float[Tensor, "*batch out samples"]:
        """``z_L``: the last layer's pre-activations, or the ReLU of them."""
        last = self.preactivations(x)[-1]
        return last if self.linear_last else last.relu()

    @classmethod
    def from_sequential(
        cls, module: nn.Sequential, *, dtype: torch.dtype | None = None, name: str = "module"
    ) -> FNN:
        """Read a `torch.nn.Sequential` of ``Linear`` layers with a ReLU between any two.

        It may end with a ReLU, or with ``Linear``: then the last layer is linear. Missing biases
        are zeros. Sequentials may be nested; ``Identity``, ``Dropout`` and a leading ``Flatten``
        are left out, as in evaluation. The module takes rows: ``network(x.mT).mT`` equals
        ``module(x)``. ``dtype`` converts all numbers, which are float32 or float64.

        Raises `InputError`, which calls the module ``name``, for other modules and layers, by their
        place as in a ``state_dict``, for forward hooks and for other types.
        """
        layers = dense_layers(module, name, dtype)
        for inner, outer in pairwise(layers):
            if not inner.relu:
                raise InputError(
                    name,
                    allowed="a Sequential with a ReLU between any two Linear layers",
                    given=f"none between {inner.words} and {outer.words}",
                    remedy="multiply the two into one",
                )
        biases = [
            layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
            for layer in layers
        ]
        weights = [layer.weight for layer in layers]
        return cls(weights, biases, linear_last=bool(layers) and not layers[-1].relu)


def as_network(value: Any, name: str = "network") -> Network:
    """Return ``value`` if it is a network, or make one from it.

    A `torch.nn.Sequential` with a ReLU or bias makes an `FNN`; another one, a matrix, or several
    make a `LinearNetwork`. Raises `InputError`, which calls the value ``name``, for anything else.
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
            remedy="networks.from_decoder makes a network of a GPT-2 or OPT"
            if hasattr(value, "config")
            else "",
        )
    return LinearNetwork.of(value, name)
