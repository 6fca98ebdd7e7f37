"""The data of a training as the training steps take it: checked, stacked, padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from .. import _checks
from ..errors import InputError
from ._state import Stack
from .tuning import Data, Labelled


class Batches:
    """Labelled inputs, ``[..., D, tokens, samples]``, and what outputs are compared with there."""

    def __init__(
        self, data: Sequence[Data], stack: Stack[Any], classes: Sequence[int], one_sided: bool
    ) -> None:
        self.stack, self.one_sided = stack, one_sided
        self.votes = _class_of(classes, stack.outputs)
        self.classes = int(self.votes.max(initial=-1)) + 1
        self.sequences = stack.network.sequences
        # Members with the same data share its tensors.
        distinct = {id(source): source for source in data}
        self.distinct = list(distinct.values())
        self.sources = np.array([list(distinct).index(id(source)) for source in data])
        self.validation = self._join([source.validation for source in self.distinct])
        self.first = self._join([source.block(0) for source in self.distinct], Data.BLOCK)
        self.tokens, others = (part[0].shape[-2] for part in (self.first, self.validation))
        if others != self.tokens:
            allowed = "of equally many tokens for training and validation"
            raise InputError("data", allowed=allowed, given=f"{self.tokens} and {others}")

    def blocks(self, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield first step, inputs and labels of each block, made while the last one is in use."""
        with ThreadPoolExecutor(1, initializer=_checks.flush) as ahead:
            coming = ahead.submit(self._block, 0)
            for index, start in enumerate(range(0, steps, Data.BLOCK)):
                x, y = coming.result()
                if start + Data.BLOCK < steps:
                    coming = ahead.submit(self._block, index + 1)
                yield start, x[:, : steps - start], y[:, : steps - start]

    # Threads do not inherit this.
    @torch.no_grad()
    def _block(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 0:
            return self.first
        x, y = self._join([source.block(index) for source in self.distinct], Data.BLOCK)
        if x.shape != self.first[0].shape:
            raise InputError("data", allowed="alike in every block", given=f"block {index} unlike")
        return x, y

    def _join(self, given: Sequence[Labelled], *lead: int) -> tuple[Tensor, Tensor]:
        inputs, labels = zip(*(self._arrange(x, y, lead) for x, y in given), strict=True)
        shapes = sorted({tuple(x.shape[-2:]) for x in inputs})
        if len(shapes) > 1:
            allowed = "of equally many tokens and samples for all networks"
            raise InputError("data", allowed=allowed, given=f"tokens and samples {shapes}")
        return torch.stack(inputs), torch.stack(labels)

    def _arrange(self, x: Any, y: Any, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        x = _checks.real_tensor("data's inputs", x, min_dims=1)
        D = self.stack.inputs
        form = [*lead, "samples", D, "tokens"] if self.sequences else [*lead, D, "samples"]
        if x.ndim != len(form) or x.shape[: len(lead)] != lead or x.shape[-2] != D:
            allowed = f"of shape [{', '.join(map(str, form))}]"
            raise InputError("data's inputs", allowed=allowed, given=tuple(x.shape))
        if self.classes:
            samples = x.shape[len(lead)] if self.sequences else x.shape[-1]
            return self._features(x), self._one_hot(y, (*lead, samples))
        if isinstance(y, Tensor) and not y.is_floating_point():
            allowed = "float32 or float64 where no classes are given"
            remedy = f"say for which class each output votes, classes=range({self.stack.outputs})"
            raise InputError("data's labels", allowed=allowed, given=y.dtype, remedy=remedy)
        y = _checks.real_tensor("data's labels", y, min_dims=1)
        _require_shape(y, (*x.shape[:-2], self.stack.outputs, x.shape[-1]))
        if self.one_sided and y.min() < 0:
            allowed = "at least 0 for the one-sided loss, as outputs of a ReLU are"
            raise InputError("data's labels", allowed=allowed, given=float(y.min()))
        return self._features(x), self._features(y)

    def _features(self, values: Tensor) -> Float[Tensor, "*lead D tokens samples"]:
        values = values.movedim(-3, -1) if self.sequences else values.unsqueeze(-2)
        padding = self.stack.width - values.shape[-3]
        return torch.nn.functional.pad(values, (0, 0, 0, 0, 0, padding)).to("cpu", torch.float32)

    def _one_hot(self, y: Any, shape: tuple[int, ...]) -> Float[Tensor, "*lead classes 1 samples"]:
        y = torch.as_tensor(y, device="cpu")
        _require_shape(y, shape)
        if y.is_floating_point() or y.min() < 0 or y.max() >= self.classes:
            allowed = f"classes, integers from 0 to {self.classes - 1}"
            given = f"{y.dtype} from {y.min()} to {y.max()}"
            raise InputError("data's labels", allowed=allowed, given=given)
        hot = torch.nn.functional.one_hot(y.long(), self.classes)
        return hot.movedim(-1, -2).unsqueeze(-2).to(torch.float32)


def _require_shape(y: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(y.shape) != shape:
        allowed = f"of shape {shape}, to fit inputs"
        raise InputError("data's labels", allowed=allowed, given=tuple(y.shape))


def _class_of(classes: Sequence[int], outputs: int) -> NDArray[np.int64]:
    """Return the class to which each output votes, checked; empty for the squared error."""
    if len(classes) not in (0, outputs):
        allowed = f"none, or one for each of {outputs} outputs"
        raise InputError("classes", allowed=allowed, given=f"{len(classes)} of them")
    votes = np.array([_checks.integer("classes", c, -1) for c in classes], np.int64)
    missing = set(range(int(votes.max(initial=-1)) + 1)) - set(votes.tolist())
    if missing or (len(votes) and votes.max() < 0):
        allowed = "such that each class from 0 to the last has a vote"
        raise InputError("classes", allowed=allowed, given=list(classes))
    return votes
