"""Fully connected ReLU networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _checks, randomness
from ..errors import InputError
from .base import Layers, chained, per_layer, random_weights, uniform


def pad(x: Float[Tensor, "*batch in samples"], width: int) -> Float[Tensor, "*batch width samples"]:
    """Inputs of a narrower network embedded among ``width`` coordinates: zeros follow them.

    Raises `InputError` for a width below theirs.
    """
    inputs = _checks.tensor("x", x, min_dims=2).shape[-2]
    width = _checks.integer("width", width, inputs)
    return nn.functional.pad(x, (0, 0, 0, width - inputs))


@dataclass(frozen=True, eq=False, repr=False)
class FNN(Layers):
    """A ReLU network: layer ``l`` maps ``z`` to ``ReLU(W_l z + b_l)``, the last one too.

    Parameters
    ----------
    weights : the ``L`` matrices, first layer first: a sequence of ``[..., out, in]`` or one stacked
        array ``[..., L, D, D]``; torch tensors, numpy arrays or nested lists, all float32 or all
        float64. Batch dimensions of all weights and biases broadcast against each other.
    biases : the ``L`` vectors, a sequence of ``[..., out]`` or one stacked array ``[..., L, D]``.

    Raises
    ------
    InputError : no layers, sizes that do not fit, mixed or unusable types, entries not finite.
    """

    biases: tuple[Float[Tensor, "*batch _"], ...]
    relu: ClassVar[bool] = True

    def __init__(self, weights: Any, biases: Any) -> None:
        matrices, vectors = chained(weights), per_layer("bias", biases, min_dims=1)
        if len(vectors) != len(matrices):
            raise InputError(
                "biases", allowed=f"one for each of the {len(matrices)} layers", given=len(vectors)
            )
        for l, (weight, bias) in enumerate(zip(matrices, vectors, strict=True), start=1):
            if bias.shape[-1] != weight.shape[-2]:
                raise InputError(
                    f"bias of layer {l}",
                    allowed=f"of {weight.shape[-2]} entries, the outputs of its weight",
                    given=f"shape {tuple(bias.shape)}",
                )
        if vectors[0].dtype != matrices[0].dtype:
            raise InputError(
                "biases", allowed=f"{matrices[0].dtype}, like the weights", given=vectors[0].dtype
            )
        batch = _checks.common_shape(
            "weights and biases",
            [*(w.shape[:-2] for w in matrices), *(b.shape[:-1] for b in vectors)],
        )
        object.__setattr__(
            self, "weights", tuple(w.expand(*batch, *w.shape[-2:]) for w in matrices)
        )
        object.__setattr__(self, "biases", tuple(b.expand(*batch, b.shape[-1]) for b in vectors))

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
    ) -> FNN:
        """Square layers drawn as `torch.nn.Linear` draws its own: uniform on ``±1/√D``.

        Networks of one seed and different purposes are independent.
        """
        generator = randomness.generator(seed, "ReLU network", purpose)
        weights = random_weights(
            depth, width, batch_shape=batch_shape, generator=generator, dtype=dtype
        )
        shape = weights.shape[:-1]
        return cls(weights, uniform(*shape, width=width, generator=generator, dtype=dtype))

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> FNN:
        return FNN(weights, self.biases if biases is None else biases)

    def layers(self, which: slice) -> FNN:
        """The network of some consecutive layers; raises `InputError` for none of them."""
        which = _checks.run("which", which, self.depth)
        network = object.__new__(FNN)
        object.__setattr__(network, "weights", self.weights[which])
        object.__setattr__(network, "biases", self.biases[which])
        return network

    def preactivations(
        self, x: Float[Tensor, "*#batch in samples"]
    ) -> list[Float[Tensor, "*batch _ samples"]]:
        """``W_l z_{l−1} + b_l`` for each layer, where ``z_0 = x`` and ``z_l = ReLU(…)`` of it."""
        z, found = self.as_inputs(x), []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            found.append(weight @ z + bias[..., None])
            z = found[-1].relu()
        return found

    def __call__(
        self, x: Float[Tensor, "*#batch in samples"]
    ) -> Float[Tensor, "*batch out samples"]:
        """``z_L``: the last layer's ReLU of its pre-activations."""
        return self.preactivations(x)[-1].relu()

    @classmethod
    def from_sequential(cls, module: nn.Sequential) -> FNN:
        """The ReLU network that a `torch.nn.Sequential` of ``Linear, ReLU, …, Linear, ReLU`` is.

        A `Linear` without bias gets one of zeros. Inputs of the module are rows, ours columns:
        ``network(x.mT).mT`` equals ``module(x)``. Raises `InputError` for another module, naming
        the first layer that is out of its place.
        """
        _checks.sequential(module)
        expected = [nn.Linear, nn.ReLU]
        for position, layer in enumerate(module):
            if type(layer) is not expected[position % 2]:
                raise InputError(
                    "module",
                    allowed="a Sequential of Linear and ReLU layers in turn",
                    given=f"{layer} at {position}",
                )
        if len(module) % 2:
            raise InputError(
                "module",
                allowed="a Sequential that ends with ReLU",
                given=f"{module[-1]} at its end",
                remedy="append a ReLU; an affine last layer is not a layer of this kind",
            )
        linears = [layer for layer in module if isinstance(layer, nn.Linear)]
        # Copies: the network must not change when the module is trained on.
        weights = [layer.weight.detach().clone() for layer in linears]
        biases = [
            weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
            for layer, weight in zip(linears, weights, strict=True)
        ]
        return cls(weights, biases)

    def to_sequential(self) -> nn.Sequential:
        """A `torch.nn.Sequential` of `Linear` and `ReLU` layers that computes this on rows.

        Raises `InputError` when the network carries batch dimensions: a module is one network.
        """
        self._require_single()
        layers: list[nn.Module] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers)
