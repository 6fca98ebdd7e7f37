"""Deep linear networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _checks, lowrank, randomness
from ..errors import InputError
from ._layers import dense_layers, random_weights, usable_layers
from .base import Layers


def product(weights: Sequence[Float[Tensor, "*#batch _ _"]]) -> Float[Tensor, "*batch out in"]:
    """``∏_l W_l = W_L ⋯ W_1``: the first of the sequence acts first."""
    return reduce(lambda inner, outer: outer @ inner, weights)


@dataclass(frozen=True, eq=False, repr=False)
class LinearNetwork(Layers):
    """A deep linear network ``x ↦ W_L ⋯ W_1 x``.

    Weights ``[..., out, in]``, first layer first, or stacked to ``[..., L, D, D]``, are tensors,
    numpy arrays or nested lists, all float32 or all float64; batch dimensions broadcast. Raises
    `InputError` for no layers, sizes that do not chain, other types, and non-finite numbers.
    """

    def __init__(self, weights: Any) -> None:
        object.__setattr__(self, "weights", tuple(usable_layers(weights)[0]))

    @classmethod
    def of(cls, value: Any, name: str = "network") -> LinearNetwork:
        """``value`` if it is a linear network, or make one from it; `InputError` calls it ``name``.

        A `torch.nn.Sequential`, one matrix ``[out, in]`` (one layer), or ``weights`` of the class.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, nn.Sequential):
            return cls.from_sequential(value, name=name)
        if isinstance(value, Tensor | np.ndarray) and value.ndim == 2:
            return cls([value])
        if isinstance(value, str) or not isinstance(value, Tensor | np.ndarray | Sequence):
            _checks.kind(cls, **{name: value})
        return cls(value)

    @classmethod
    def unchecked(
        cls,
        weights: Sequence[Float[Tensor, "*batch _ _"]],
        spectra: Sequence[Float[Tensor, "*batch _"]] | None = None,
    ) -> LinearNetwork:
        """The network of usable weights of one batch shape, with singular values that are known."""
        network = object.__new__(cls)
        object.__setattr__(network, "weights", tuple(weights))
        if spectra is not None:
            vars(network)["spectra"] = tuple(spectra)
        return network

    @classmethod
    def random(
        cls,
        depth: int,
        width: int,
        *,
        batch_shape: tuple[int, ...] = (),
        seed: int = 0,
        purpose: str = "network",
        dtype: torch.dtype = torch.float64,
    ) -> LinearNetwork:
        """Draw square layers uniform on ``±1/√D``, like `torch.nn.Linear`, by seed and purpose."""
        generator = randomness.generator(seed, "linear network", purpose)
        return cls(
            random_weights(depth, width, batch_shape=batch_shape, generator=generator, dtype=dtype)
        )

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> LinearNetwork:
        return LinearNetwork(weights)

    def holding(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> LinearNetwork:
        return LinearNetwork.unchecked(weights)

    def __call__(
        self, x: Float[Tensor, "*#batch in samples"]
    ) -> Float[Tensor, "*batch out samples"]:
        """``W_L ⋯ W_1 x``, layer by layer."""
        return product([self.as_inputs(x), *self.weights])

    def product(self) -> Float[Tensor, "*batch out in"]:
        """The matrix ``∏_l W_l`` that the network applies."""
        return product(self.weights)

    def halves(self) -> tuple[Tensor, Tensor]:
        """The products of the first half of the layers and of the other half."""
        middle = self.depth // 2
        return product(self.weights[:middle]), product(self.weights[middle:])

    @cached_property
    def spectra(self) -> tuple[Float[Tensor, "*batch _"], ...]:
        """The singular values of each layer's weight."""
        return tuple(lowrank.spectrum(weight) for weight in self.weights)

    @property
    def norms(self) -> tuple[Float[Tensor, "*batch"], ...]:
        """``‖W_l‖_2`` of each layer."""
        return tuple(values[..., 0] for values in self.spectra)

    @cached_property
    def norm(self) -> Float[Tensor, "*batch"]:
        """``‖∏_l W_l‖_2``."""
        return self.norms[0] if self.depth == 1 else lowrank.norm(self.product())

    @cached_property
    def rounding_scale(self) -> Float[Tensor, "*batch"]:
        """Entries of the product below ``D · eps`` times this may be rounding.

        The smaller of two bounds: ``max_l ‖∏_{j>l} W_j‖ ‖W_l‖ ‖∏_{j<l} W_j‖`` over layers, and
        ``‖∏_l |W_l|‖_2``, bounded by the root of its largest row sum times its largest column sum.
        """
        if self.depth == 1:
            return self.norms[0]
        first, *middle, last = self.weights
        inner, outer = [first], [last]
        for low, high in zip(middle, reversed(middle), strict=True):
            inner.append(low @ inner[-1])
            outer.append(outer[-1] @ high)
        one = torch.ones_like(self.norms[0])
        before = [one, self.norms[0], *map(lowrank.norm, inner[1:])]
        after = [one, self.norms[-1], *map(lowrank.norm, outer[1:])]
        layers = zip(after[::-1], self.norms, before, strict=True)
        layerwise = torch.stack([a * w * b for a, w, b in layers]).amax(0)
        sizes = product([weight.abs() for weight in self.weights]).nan_to_num(torch.inf)
        entrywise = sizes.sum(-1).amax(-1).sqrt() * sizes.sum(-2).amax(-1).sqrt()
        return torch.minimum(layerwise, entrywise)

    @classmethod
    def from_sequential(
        cls, module: nn.Sequential, *, dtype: torch.dtype | None = None, name: str = "module"
    ) -> LinearNetwork:
        """Read a `torch.nn.Sequential` as `FNN.from_sequential` does; refuses ReLU and bias too."""
        layers = dense_layers(module, name, dtype)
        for layer in layers:
            if layer.relu or layer.bias is not None:
                what = "a ReLU after" if layer.relu else "a bias in"
                raise InputError(
                    name,
                    allowed="without ReLU and biases",
                    given=f"{what} {layer.words}",
                    remedy="FNN.from_sequential takes both",
                )
        return cls([layer.weight for layer in layers])
