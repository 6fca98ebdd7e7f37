"""Fully connected ReLU networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import _checks, randomness
from ..errors import InputError
from .base import Layers, chained, per_layer, random_weights, uniform
from .modules import dense_layers


def pad(x: Float[Tensor, "*batch in samples"], width: int) -> Float[Tensor, "*batch width samples"]:
    """Inputs of a narrower network embedded among ``width`` coordinates: zeros follow them.

    Raises `InputError` for a width below theirs.
    """
    inputs = _checks.tensor("x", x, min_dims=2).shape[-2]
    width = _checks.integer("width", width, inputs)
    return nn.functional.pad(x, (0, 0, 0, width - inputs))


@dataclass(frozen=True, eq=False, repr=False)
class FNN(Layers):
    """A ReLU network: layer ``l`` maps ``z`` to ``ReLU(W_l z + b_l)``.

    The last one does too, or else ends with ``W_L z + b_L``, as networks do whose outputs are
    logits or values of a regression.

    Parameters
    ----------
    weights
        The ``L`` matrices, first layer first: a sequence of ``[..., out, in]`` or one stacked array
        ``[..., L, D, D]``; torch tensors, numpy arrays or nested lists, all float32 or all float64.
        Batch dimensions of all weights and biases broadcast against each other.
    biases
        The ``L`` vectors, a sequence of ``[..., out]`` or one stacked array ``[..., L, D]``.
    linear_last : bool
        Whether the last layer is without a ReLU.

    Raises
    ------
    InputError
        No layers, sizes that do not fit, mixed or unusable types, entries not finite.
    """

    biases: tuple[Float[Tensor, "*batch _"], ...]
    linear_last: bool = False

    def __init__(self, weights: Any, biases: Any, *, linear_last: bool = False) -> None:
        if not isinstance(linear_last, bool):
            raise InputError("linear_last", allowed="True or False", given=repr(linear_last))
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
        object.__setattr__(self, "linear_last", linear_last)

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
        """Square layers drawn as `torch.nn.Linear` draws its own: uniform on ``±1/√D``.

        Networks of one seed and different purposes are independent.
        """
        generator = randomness.generator(seed, "ReLU network", purpose)
        weights = random_weights(
            depth, width, batch_shape=batch_shape, generator=generator, dtype=dtype
        )
        shape = weights.shape[:-1]
        biases = uniform(*shape, width=width, generator=generator, dtype=dtype)
        return cls(weights, biases, linear_last=linear_last)

    @property
    def relus(self) -> int:
        """How many of the first layers a ReLU follows: all, or all but the last."""
        return self.depth - self.linear_last

    def with_parameters(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
    ) -> FNN:
        tuned = self.biases if biases is None else biases
        return FNN(weights, tuned, linear_last=self.linear_last)

    def holding(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> FNN:
        network = object.__new__(FNN)
        object.__setattr__(network, "weights", tuple(weights))
        object.__setattr__(network, "biases", tuple(biases))
        object.__setattr__(network, "linear_last", self.linear_last)
        return network

    def without_last_relu(self) -> FNN:
        """The network whose outputs are the arguments of its last ReLU."""
        network = self.holding(self.weights, self.biases)
        object.__setattr__(network, "linear_last", True)
        return network

    def layers(self, which: slice) -> FNN:
        """The network of some consecutive layers; only the last of all can be linear.

        Raises `InputError` for none of them.
        """
        which = _checks.run("which", which, self.depth)
        has_last = self.depth - 1 in range(self.depth)[which]
        network = self.holding(self.weights[which], self.biases[which])
        object.__setattr__(network, "linear_last", self.linear_last and has_last)
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
        """``z_L``: the last layer's pre-activations, or the ReLU of them."""
        last = self.preactivations(x)[-1]
        return last if self.linear_last else last.relu()

    @classmethod
    def from_sequential(
        cls, module: nn.Sequential, *, dtype: torch.dtype | None = None, name: str = "module"
    ) -> FNN:
        """The ReLU network that a `torch.nn.Sequential` of ``Linear`` and ``ReLU`` layers is.

        A ReLU stands between any two ``Linear`` layers; the module ends with either, and a network
        that ends with ``Linear`` has a linear last layer. A ``Linear`` without bias gets one of
        zeros. Sequentials may be nested. ``Identity`` and ``Dropout`` are left out, the network
        computes what the module does in evaluation; so is a leading ``Flatten``. Inputs of the
        module are rows, ours columns: ``network(x.mT).mT`` equals ``module(x)``.

        Raises `InputError` for any other module, layer or type of numbers; it names the first layer
        that does not fit by its place, as a ``state_dict`` does.

        Parameters
        ----------
        dtype : dtype, optional
            Converts all numbers; by default they stay as they are, float32 or float64.
        name : str
            What errors call the module.
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

    def to_sequential(self) -> nn.Sequential:
        """A `torch.nn.Sequential` of ``Linear`` and ``ReLU`` layers that computes this on rows.

        Raises `InputError` when the network carries batch dimensions: a module is one network.
        """
        self._require_single()
        layers: list[nn.Module] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
            layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[: self.depth + self.relus])


def behind(
    network: FNN, l: int, p: Float[Tensor, "*#batch _ samples"]
) -> Float[Tensor, "*batch out samples"]:
    """The outputs for pre-activations of layer ``l``, from 0; gradients flow through."""
    for weight, bias in zip(network.weights[l + 1 :], network.biases[l + 1 :], strict=True):
        p = weight @ p.relu() + bias[..., None]
    return p if network.linear_last else p.relu()
