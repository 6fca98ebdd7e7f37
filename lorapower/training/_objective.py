"""The losses of stacked networks, and the batches that they are taken on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    ``one_sided`` says which runs are trained by the one-sided loss.
    """

    def __init__(
        self, network: Network, data: Data, classes: Sequence[int], one_sided: Bool[Tensor, " runs"]
    ) -> None:
        self.network, self.data = network, data
        self.outputs, self.inputs = network.weights[-1].shape[-2], network.weights[0].shape[-1]
        self.has_one_sided, self.one_sided = bool(one_sided.any()), one_sided[:, None, None]
        if self.has_one_sided:
            _require_relu_end(network, classes)
        self.votes = self._votes(classes)
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
        return self._loss(torch.where(self.one_sided & (y > 0), last, last.relu()), y)

    def validation_loss(self, network: Network) -> Float[Tensor, " runs"]:
        """Compute the loss that each run's parameters are chosen by."""
        return self._loss(_outputs(network, self.validation[0]), self.validation[1])

    def _loss(self, out: Tensor, y: Tensor) -> Float[Tensor, " runs"]:
        """Compute mean squared errors, or cross-entropies of the classes' summed votes."""
        if not len(self.votes):
            errors = (out - y).flatten(1)
            return torch.linalg.vector_norm(errors, dim=1).square() / errors.shape[1]
        columns = out.sum(-1).mT if self.network.sequences else out
        logarithms = (self.votes @ columns).log_softmax(1)
        return -(y * logarithms).sum(1).mean(-1)

    def _checked(self, x: Any, y: Any, *lead: int) -> Labelled:
        """Read inputs and labels; ``lead`` is how many batches they are."""
        x = _checks.real_tensor("data's inputs", x, min_dims=1)
        D, sequences = self.inputs, self.network.sequences
        form = [*lead, "samples", D, "tokens"] if sequences else [*lead, D, "samples"]
        if x.ndim != len(form) or x.shape[: len(lead)] != lead or x.shape[-2] != D:
            allowed = f"of shape [{', '.join(map(str, form))}]"
            raise InputError("data's inputs", allowed=allowed, given=tuple(x.shape))
        if len(self.votes):
            samples = x.shape[len(lead)] if sequences else x.shape[-1]
            y = self._one_hot(y, (*lead, samples))
        else:
            y = self._real_labels(y, (*x.shape[:-2], self.outputs, x.shape[-1]))
        device = self.network.device
        return x.to(device, torch.float32), y.to(device, torch.float32)

    def _real_labels(self, y: Any, shape: tuple[int, ...]) -> Tensor:
        if isinstance(y, Tensor) and not y.is_floating_point():
            allowed = "float32 or float64 where no classes are given"
            remedy = f"say for which class each output votes, classes=range({self.outputs})"
            raise InputError("data's labels", allowed=allowed, given=y.dtype, remedy=remedy)
        y = _checks.real_tensor("data's labels", y, min_dims=1)
        _require_shape(y, shape)
        if self.has_one_sided and y.min() < 0:
            allowed = "at least 0 for the one-sided loss, as outputs of a ReLU are"
            raise InputError("data's labels", allowed=allowed, given=float(y.min()))
        return y

    def _one_hot(self, y: Any, shape: tuple[int, ...]) -> Float[Tensor, "*lead classes samples"]:
        y, classes = torch.as_tensor(y), len(self.votes)
        _require_shape(y, shape)
        if y.is_floating_point() or y.min() < 0 or y.max() >= classes:
            allowed = f"classes, integers from 0 to {classes - 1}"
            given = f"{y.dtype} from {y.min()} to {y.max()}"
            raise InputError("data's labels", allowed=allowed, given=given)
        return functional.one_hot(y.long(), classes).mT

    def _votes(self, classes: Sequence[int]) -> Float[Tensor, "classes outputs"]:
        """Say which outputs vote for each class; empty for the squared error."""
        if len(classes) not in (0, self.outputs):
            allowed = f"none, or one for each of {self.outputs} outputs"
            raise InputError("classes", allowed=allowed, given=f"{len(classes)} of them")
        voted = [_checks.integer("classes", c, 0) for c in classes]
        last = max(voted, default=-1)
        if {*voted} != {*range(last + 1)}:
            allowed = "such that each class from 0 to the last has a vote"
            raise InputError("classes", allowed=allowed, given=list(classes))
        places = torch.arange(last + 1)[:, None]
        return (places == torch.tensor(voted)).to(self.network.weights[0])


def _outputs(network: Network, x: Tensor) -> Tensor:
    if network.sequences:  # Runs by samples.
        stacks = (
            [values[:, None] for values in each] for each in (network.weights, network.biases)
        )
        return network.with_parameters(*stacks, checked=False)(x)
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


def _require_shape(y: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(y.shape) != shape:
        allowed = f"of shape {shape}, to fit inputs"
        raise InputError("data's labels", allowed=allowed, given=tuple(y.shape))


def _require_relu_end(network: Network, classes: Sequence[int]) -> None:
    """Refuse a one-sided loss for outputs that no ReLU gives, or that vote for classes."""
    if not isinstance(network, FNN) or network.linear_last or len(classes):
        given = "classes" if len(classes) else network
        raise InputError(
            "loss",
            allowed="'squared', but for ReLU networks that end with a ReLU and a squared error",
            given=f"'one-sided' for {given}",
        )
