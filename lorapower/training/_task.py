"""What all runs of a training share: its data as batches, its loss, and the slopes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .. import _checks
from ..errors import InputError
from ..networks.base import Network
from ..networks.layers import FNN
from .tuning import Data, Labelled


class _Layer(NamedTuple):
    """What one layer of all runs has, in buffers that are taken once."""

    weight: Float[Tensor, "runs out in"]
    bias: Float[Tensor, "runs out 1"]
    slope: Float[Tensor, "runs out in"]
    bias_slope: Float[Tensor, "runs out"]


class _Room(NamedTuple):
    """Memory for what leaves a layer, and for the slopes in it, ``[runs, out, samples]``."""

    outputs: Tensor
    slopes: Tensor


class Task:
    """Batches of labelled inputs, and losses on them of runs with weights and biases of their own.

    Weights ``W`` are ``[M, runs, D, D]`` and biases ``b`` ``[P, runs, D]``, padded with zeros, and
    so are the slopes in them, ``dW`` and ``db``. `bind` says in which buffers all these lie.
    """

    def __init__(
        self,
        network: Network,
        data: Data,
        classes: Sequence[int],
        one_sided: Bool[Tensor, " runs"],
    ) -> None:
        self.network: Any = network
        self.shapes = [tuple(weight.shape[-2:]) for weight in network.weights]
        self.inputs, self.outputs = self.shapes[0][1], self.shapes[-1][0]
        self.has_one_sided, self.one_sided = bool(one_sided.any()), one_sided[:, None, None]
        if self.has_one_sided:
            require_relu_end(network, classes)
        self.votes = self._votes(classes)
        self.data, self.rooms = data, dict[int, list[_Room]]()
        self.validation = self._arrange(*data.validation)
        self.first = self._arrange(*data.block(0), Data.BLOCK)

    def bind(self, W: Tensor, b: Tensor, dW: Tensor, db: Tensor) -> Task:
        """Say where weights and biases are, and where their slopes shall be; return the task."""
        self.buffers, self.layers = (W, b, dW, db), list[_Layer]()
        if not self.network.sequences:
            for l, (out, into) in enumerate(self.shapes):
                weight, slope = (buffer[l, :, :out, :into] for buffer in (W, dW))
                none = W.new_zeros(W.shape[1], out)
                bias, moved = (buffer[l, :, :out] if len(b) else none for buffer in (b, db))
                self.layers.append(_Layer(weight, bias[..., None], slope, moved))
        return self

    def batches(self, steps: int) -> Iterator[Labelled]:
        """Yield inputs and labels of each step."""

        def endless() -> Iterator[Labelled]:
            index, block = 0, self.first
            while True:
                yield from zip(*block, strict=True)
                index += 1
                block = self._arrange(*self.data.block(index), Data.BLOCK)

        return islice(endless(), steps)

    # Losses.

    def losses(self, batch: Labelled) -> Float[Tensor, " runs"]:
        """Compute each run's mean squared error, or cross-entropy of the classes' summed votes."""
        x, y = batch
        if self.network.sequences:
            return self._loss(self._outputs(*self.buffers[:2], x), y)[0]
        rooms = self._rooms(x.shape[-1])
        return self._loss(self._layers(x, rooms), y, rooms[-1].slopes)[0]

    def slopes(self, batch: Labelled, lowest: int) -> Float[Tensor, " runs"]:
        """Put the slopes of the losses into their buffers; return the losses.

        Of layers that chain, those below the ``lowest`` are left out.
        """
        x, y = batch
        if not self.network.sequences:
            return self._layers_slopes(x, y, lowest)
        W, b, *slopes = self.buffers
        with torch.enable_grad():
            leaves = W.detach().requires_grad_(), b.detach().requires_grad_()
            out = self._outputs(*leaves, x)
        loss, slope = self._loss(out.detach(), y)
        found = torch.autograd.grad(out, leaves, slope, materialize_grads=True)
        for into, each in zip(slopes, found, strict=True):
            into.copy_(each)
        return loss

    def _outputs(self, W: Tensor, b: Tensor, x: Tensor) -> Float[Tensor, "runs samples _ n"]:
        """Compute outputs for tokens."""
        sizes = zip(W.unbind(), self.shapes, strict=True)
        weights = [w[:, None, :out, :into] for w, (out, into) in sizes]
        pairs = zip(b.unbind(), self.network.biases, strict=True)
        biases = [bias[:, None, : old.shape[-1]] for bias, old in pairs]
        tuned = self.network.with_parameters(weights, biases, checked=False)
        return tuned(x)

    def _rooms(self, samples: int) -> list[_Room]:
        """Return memory for so many samples in each layer, taken once."""
        if samples not in self.rooms:
            W = self.buffers[0]
            pairs = [W.new_empty(2, W.shape[1], out, samples) for out, _ in self.shapes]
            self.rooms[samples] = [_Room(z, slope) for z, slope in pairs]
        return self.rooms[samples]

    def _layers(self, x: Tensor, rooms: list[_Room], *, open_end: bool = False) -> Tensor:
        """Compute what leaves each layer; return the last, without its ReLU if ``open_end``."""
        for l, (layer, room) in enumerate(zip(self.layers, rooms, strict=True)):
            z = room.outputs
            if l:
                torch.baddbmm(layer.bias, layer.weight, rooms[l - 1].outputs, out=z)
            else:
                # One product for all runs, since they share inputs.
                bias, weight = layer.bias.flatten(0, 1), layer.weight.flatten(0, 1)
                torch.addmm(bias, weight, x, out=z.flatten(0, 1))
            if l < self.network.relus - open_end:
                z.relu_()
        return rooms[-1].outputs

    def _layers_slopes(self, x: Tensor, y: Tensor, lowest: int) -> Float[Tensor, " runs"]:
        rooms = self._rooms(x.shape[-1])
        last = self._layers(x, rooms, open_end=self.has_one_sided)
        relus = self.network.relus - self.has_one_sided
        if self.has_one_sided:
            # The last ReLU acts only where an output should be 0 [def-one-sided].
            is_open = self.one_sided & (y > 0)
            last = torch.where(is_open, last, last.relu())
        loss, slope = self._loss(last, y, rooms[-1].slopes)
        if self.has_one_sided:
            slope.mul_(is_open | (last > 0))
        for l in range(len(self.shapes) - 1, lowest - 1, -1):
            layer, slope = self.layers[l], rooms[l].slopes
            if l < relus:
                torch.ops.aten.threshold_backward(slope, rooms[l].outputs, 0.0, grad_input=slope)
            if len(self.network.biases):
                torch.sum(slope, -1, out=layer.bias_slope)
            if l:
                torch.bmm(slope, rooms[l - 1].outputs.mT, out=layer.slope)
            else:
                layer.slope.copy_((slope.flatten(0, 1) @ x.mT).view_as(layer.slope))
            if l > lowest:
                torch.bmm(layer.weight.mT, slope, out=rooms[l - 1].slopes)
        return loss

    def _loss(
        self, out: Tensor, y: Tensor, room: Tensor | None = None
    ) -> tuple[Float[Tensor, " runs"], Tensor]:
        """Compute losses of outputs, and their slopes in the outputs, these in a given room."""
        if not len(self.votes):
            difference = torch.sub(out, y, out=room)
            size = difference[0].numel()
            loss = torch.linalg.vector_norm(difference.flatten(1), dim=1).square_().div_(size)
            return loss, difference.mul_(2 / size)
        columns = out.sum(-1).mT if self.network.sequences else out
        logarithms = (self.votes @ columns).log_softmax(1)
        loss = -(y * logarithms).sum(1).mean(-1)
        errors = (logarithms.exp() - y).div_(y.shape[-1])
        slope = torch.matmul(self.votes.mT, errors, out=room)
        return loss, slope.mT[..., None].expand_as(out) if self.network.sequences else slope

    # Data.

    def _arrange(self, x: Any, y: Any, *lead: int) -> Labelled:
        """Return inputs and labels, checked; ``lead`` is how many batches they are."""
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
            y = self._wanted(y, (*x.shape[:-2], self.outputs, x.shape[-1]))
        device = self.network.device
        return x.to(device, torch.float32), y.to(device, torch.float32)

    def _wanted(self, y: Any, shape: tuple[int, ...]) -> Tensor:
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
        """Return which outputs vote for each class, checked; empty for the squared error."""
        if len(classes) not in (0, self.outputs):
            allowed = f"none, or one for each of {self.outputs} outputs"
            raise InputError("classes", allowed=allowed, given=f"{len(classes)} of them")
        given = [_checks.integer("classes", c, 0) for c in classes]
        if {*given} != {*range(max(given, default=-1) + 1)}:
            allowed = "such that each class from 0 to the last has a vote"
            raise InputError("classes", allowed=allowed, given=list(classes))
        places = torch.arange(max(given, default=-1) + 1)[:, None]
        return (places == torch.tensor(given)).to(self.network.weights[0])


def _require_shape(y: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(y.shape) != shape:
        allowed = f"of shape {shape}, to fit inputs"
        raise InputError("data's labels", allowed=allowed, given=tuple(y.shape))


def require_relu_end(network: Network, classes: Sequence[int] = ()) -> None:
    """Refuse a one-sided loss for outputs that no ReLU gives, or that vote for classes."""
    if not isinstance(network, FNN) or network.linear_last or len(classes):
        given = "classes" if len(classes) else network
        raise InputError(
            "loss",
            allowed="'squared', but for ReLU networks that end with a ReLU and a squared error",
            given=f"'one-sided' for {given}",
        )
