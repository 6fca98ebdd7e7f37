"""Inputs and what a network should return for them, batch after batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from .. import _checks, randomness
from ..errors import InputError, brief
from ..networks.base import Network

# Of a form that `Data` describes.
Labelled = tuple[Float[Tensor, "..."], Num[Tensor, "..."]]


class Data(ABC):
    """Batches to train on, and labelled inputs to validate with.

    Inputs are as the network takes them: ``[..., D, samples]``, for transformers ``[..., samples,
    D, N]``. What the network should return is of the same form, or, to be compared by
    cross-entropy, one class for each sample, integers ``[..., samples]``.

    Attributes
    ----------
    validation : Labelled
        The labelled inputs on which the best parameters are chosen.
    """

    # Batches come in blocks, so that they do not depend on how many are asked for.
    BLOCK = 50

    validation: Labelled

    @abstractmethod
    def block(self, index: int) -> Labelled:
        """The batches of steps ``BLOCK · index`` to ``BLOCK · (index + 1)``; ``[BLOCK, …]``."""


class Fresh(Data):
    """Inputs ``N(0, s² I)`` drawn anew for every step, labelled by a function.

    Parameters
    ----------
    label : callable
        A target network, or another function of inputs; these lie where its labels do.
    shape : tuple of int
        Of one input, ``(D,)`` or ``(D, N)``.
    samples : int
        In each batch.
    scale : float
        ``s``; 1 by default.
    validation_samples : int
        Drawn once.
    seed, purpose
        Equal ones give equal inputs, whatever is trained on them; those of one seed and different
        purposes are independent.
    """

    def __init__(
        self,
        label: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        *,
        samples: int = 256,
        scale: float = 1.0,
        validation_samples: int = 256,
        seed: int = 0,
        purpose: tuple[str, ...] = (),
    ) -> None:
        _checks.function("label", label)
        shape = _checks.sizes("shape", shape, 1)
        if len(shape) not in (1, 2):
            raise InputError("shape", allowed="(D,), or (D, N) for N tokens", given=shape)
        if isinstance(label, nn.Module):
            raise InputError(
                "label",
                allowed="a network, or a function of columns",
                given=f"{type(label).__name__}, a module, which takes rows",
                remedy="networks.as_network makes a network of a Sequential",
            )
        # Training is in single precision, and so is what it is told.
        self.label = label.to(torch.float32) if isinstance(label, Network) else label
        self.shape = shape
        self.scale = _checks.positive("scale", scale)
        self.samples = _checks.integer("samples", samples, 1)
        self.seed = _checks.seed(seed)
        self.purpose = _words(purpose)
        count = _checks.integer("validation_samples", validation_samples, 1)
        self.validation = self._draw((), count, "validation inputs")

    def __repr__(self) -> str:
        return f"Fresh(shape {self.shape}, {self.samples} samples, seed {self.seed})"

    def block(self, index: int) -> Labelled:
        index = _checks.integer("index", index, 0)
        return self._draw((self.BLOCK,), self.samples, "inputs", index)

    def test(self, samples: int) -> Labelled:
        """Labelled inputs that are drawn for nothing else."""
        return self._draw((), _checks.integer("samples", samples, 1), "test inputs")

    def _draw(self, batch: tuple[int, ...], samples: int, *part: str | int) -> Labelled:
        one = (samples, *self.shape) if len(self.shape) == 2 else (*self.shape, samples)
        generator = randomness.generator(self.seed, *self.purpose, *part)
        x = self.scale * randomness.normal(generator, *batch, *one, dtype=torch.float32)
        y = self.label(x)
        if not isinstance(y, Tensor):
            raise InputError("label", allowed="a function to tensors", given=brief(y))
        return x.to(y.device), y


class Fixed(Data):
    """Given labelled inputs, all of them in every step or in batches in an order new in each epoch.

    In an epoch each sample is used once, but for those that are too few for another batch.

    Raises `InputError` for what is no pair, numbers that are not finite, and labels that do not fit
    inputs.

    Parameters
    ----------
    training, validation : tuple
        Labelled inputs, of a form that `Data` describes.
    samples : int, optional
        In each batch, at most as many as there are; all by default.
    seed, purpose
        Of the order.
    """

    def __init__(
        self,
        training: tuple[Any, Any],
        validation: tuple[Any, Any],
        *,
        samples: int | None = None,
        seed: int = 0,
        purpose: tuple[str, ...] = (),
    ) -> None:
        self.training = _usable("training", training)
        self.validation = _usable("validation", validation)
        self.sample_dim = 0 if self.training[0].ndim == 3 else -1
        x, y = self.training
        count = x.shape[self.sample_dim]
        if y.ndim == 0 or y.shape[self.sample_dim] != count:
            raise InputError(
                "training",
                allowed=f"of as many labels as inputs, {count}",
                given=f"labels of shape {tuple(y.shape)}",
            )
        self.samples = count if samples is None else _checks.integer("samples", samples, 1, count)
        self.seed, self.purpose = _checks.seed(seed), _words(purpose)

    def __repr__(self) -> str:
        x, y = self.training
        return f"Fixed({list(x.shape)} to {list(y.shape)}, {self.samples} samples)"

    def block(self, index: int) -> Labelled:
        index = _checks.integer("index", index, 0)
        x, y = self.training
        count = x.shape[self.sample_dim]
        if self.samples == count:
            return x.expand(self.BLOCK, *x.shape), y.expand(self.BLOCK, *y.shape)
        per_epoch = count // self.samples
        places = [divmod(self.BLOCK * index + step, per_epoch) for step in range(self.BLOCK)]
        orders = {epoch: self._order(epoch) for epoch in {epoch for epoch, _ in places}}
        batches = [orders[epoch].split(self.samples)[batch] for epoch, batch in places]

        def picked(part: Tensor) -> Tensor:
            return torch.stack([part.index_select(self.sample_dim, batch) for batch in batches])

        return picked(x), picked(y)

    def _order(self, epoch: int) -> Tensor:
        generator = randomness.generator(self.seed, *self.purpose, "order", epoch)
        x, _ = self.training
        count = x.shape[self.sample_dim]
        return torch.randperm(count, generator=generator, device="cpu").to(x.device)


def _words(purpose: Any) -> tuple[str, ...]:
    if not isinstance(purpose, tuple) or not all(isinstance(word, str) for word in purpose):
        raise InputError("purpose", allowed="a tuple of words", given=brief(purpose))
    return purpose


def _usable(name: str, labelled: Any) -> Labelled:
    """Inputs and labels as tensors, which are finite numbers; labels may be integers."""
    if not isinstance(labelled, tuple | list) or len(labelled) != 2:
        raise InputError(
            name, allowed="a pair of inputs and labels", given=f"a {type(labelled).__name__}"
        )
    x, y = labelled
    inputs = _checks.real_tensor(f"{name} inputs", x, min_dims=2, copy=True)
    if isinstance(y, Tensor) and y.dtype not in _checks.PRECISIONS:
        return inputs, y.clone()
    return inputs, _checks.real_tensor(f"{name} labels", y, min_dims=1, copy=True)
