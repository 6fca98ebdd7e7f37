"""The losses of stacked networks, and the batches that they are taken on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .. import _checks
from ..errors import InputError
from ..networks.base import Network
from ..networks.layers import FNN
from .tuning import Data, Labelled


class Objective:
    """Losses of runs, whose networks are a batch, on checked batches of labelled inputs.

    ``one_sided`` says which runs take the one-sided loss for all outputs, and ``if_dead`` which
    take it for dead outputs alone. Labels that are integers are classes, one for each output.
    """

    def __init__(
        self,
        network: Network,
        data: Data,
        one_sided: Bool[Tensor, " runs"],
        if_dead: Bool[Tensor, " runs"],
    ) -> None:
        self.network, self.data = network, data
        self.has_classes = not torch.as_tensor(data.validation[1]).is_floating_point()
        self.has_one_sided = bool((one_sided | if_dead).any())
        self.one_sided, self.if_dead = one_sided[:, None, None], if_dead[:, None, None]
        ends_with_relu = isinstance(network, FNN) and not network.linear_last
        if self.has_one_sided and (self.has_classes or not ends_with_relu):
            allowed = "'squared', but for ReLU networks that end with a ReLU and a squared error"
            given = f"'one-sided' for {'classes' if self.has_classes else network}"
            raise InputError("loss", allowed=allowed, given=given)
        self.validation = self._checked(*data.validation)
        self.first_block = self._checked(*data.block(0), Data.BLOCK)

    def batches(self) -> Iterator[Labelled]:
        """Yield inputs and labels of one step after the other, without end."""
        yield from zip(*self.first_block, strict=True)
        for index in count(1):
            yield from zip(*self._checked(*self.data.block(index), Data.BLOCK), strict=True)

    def training_loss(self, network: Any, batch: Labelled) -> Float[Tensor, " runs"]:
        """Compute the loss that each run descends."""
        x, y = batch
        if not self.has_one_sided:
            return self._loss(_outputs(network, x), y)
        # The last ReLU acts only where an output should be 0 [def-one-sided].
        last = _preactivation(network, x)
        reached = self.one_sided
        if self.if_dead.any():
            reached = reached | self.if_dead & (last <= 0).all(-1, keepdim=True)
        return self._loss(torch.where(reached & (y > 0), last, last.relu()), y)

    def validation_loss(self, network: Network) -> Float[Tensor, " runs"]:
        """Compute the loss that each run's parameters are chosen by."""
        return self._loss(_outputs(network, self.validation[0]), self.validation[1])

    def _loss(self, out: Tensor, y: Tensor) -> Float[Tensor, " runs"]:
        """Compute mean squared errors, or cross-entropies."""
        if self.has_classes:
            return -(y * out.log_softmax(1)).sum(1).mean(-1)
        errors = (out - y).flatten(1)
        return torch.linalg.vector_norm(errors, dim=1).square() / errors.shape[1]

    def _checked(self, x: Any, y: Any, *lead: int) -> Labelled:
        """Read inputs and labels; ``lead`` is how many batches they are."""
        network = self.network
        D, outputs = network.weights[0].shape[-1], network.weights[-1].shape[-2]
        x = _checks.real_tensor("data's inputs", x, min_dims=1)
        form = (*lead, "samples", D, "tokens") if network.sequences else (*lead, D, "samples")
        if x.ndim != len(form) or x.shape[: len(lead)] != lead or x.shape[-2] != D:
            allowed = f"of shape [{', '.join(map(str, form))}]"
            raise InputError("data's inputs", allowed=allowed, given=tuple(x.shape))
        if self.has_classes:
            y = functional.one_hot(torch.as_tensor(y).long(), outputs).mT
        else:
            y = _checks.real_tensor("data's labels", y, min_dims=1)
        shape = (*x.shape[:-2], outputs, x.shape[-1])
        if tuple(y.shape) != shape:
            allowed = f"of shape {shape}, to fit inputs, or classes [..., samples]"
            raise InputError("data's labels", allowed=allowed, given=tuple(y.shape))
        if self.has_one_sided and y.min() < 0:
            allowed = "at least 0 for the one-sided loss, as outputs of a ReLU are"
            raise InputError("data's labels", allowed=allowed, given=float(y.min()))
        return x.to(network.device, torch.float32), y.to(network.device, torch.float32)


def _outputs(network: Network, x: Tensor) -> Tensor:
    if network.sequences:  # Runs by samples.
        weights, biases = ([v[:, None] for v in each] for each in (network.weights, network.biases))
        return network.with_parameters(weights, biases, checked=False)(x)
    if not isinstance(network, FNN):
        return network(x)
    last = _preactivation(network, x)
    return last if network.linear_last else last.relu_()


def _preactivation(network: FNN, x: Float[Tensor, "in samples"]) -> Float[Tensor, "runs out n"]:
    """Compute `FNN.preactivations` of the last layer, in half the time: in place, biases fused."""
    z = x.expand(len(network.weights[0]), *x.shape)
    for l, (W, b) in enumerate(zip(network.weights, network.biases, strict=True)):
        z = torch.baddbmm(b[..., None], W, z.relu_() if l else z)
    return z
