"""Settings, data and results of training runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from .. import _checks, randomness
from ..adapters import Adapters, N
from ..errors import InputError
from ..networks.base import Network

LARGEST = torch.finfo(torch.float32).max
Schedule = Literal["constant", "cosine"]
Loss = Literal["squared", "one-sided", "one-sided-dead"]
# Inputs and labels as `Data` describes them.
Labelled = tuple[Float[Tensor, "..."], Num[Tensor, "..."]]


@dataclass(frozen=True)
class Tuning:
    """Say what one run of `train` tunes, where it starts and how fast it goes.

    The last ``final`` of the network's ``weights`` are tuned in full, with their biases, instead of
    adapters; ``biases`` says of all or of each whether they are tuned. Adam has the L2 penalty
    ``weight_decay``. Its rate stays ``"constant"`` or falls to 0 as half a ``"cosine"``.

    Attributes
    ----------
    ranks : int or sequence of int
        One for each of the network's ``weights``. One number caps all: no weight gets more than its
        smaller side, and in a plain transformer only the weights that the theorem adapts
        [thm-transformer] get adapters.
    loss : Loss
        ``"one-sided"`` [def-one-sided] is for networks that end with a ReLU and outputs of at least
        0; ``"one-sided-dead"`` is this for outputs that are 0 on the whole batch, and squared for
        all others. The best parameters are chosen by the squared error either way.

    Examples
    --------
    >>> from lorapower.training import Tuning
    >>> Tuning(ranks=[4, 0, 2], biases=False).schedule
    'constant'
    >>> Tuning(ranks=2, final=1)
    Traceback (most recent call last):
    lorapower.errors.InputError: final must be 0 where adapters have a rank; got 1 with ranks 2
    """

    ranks: int | Sequence[int] = 0
    final: int = 0
    biases: bool | Sequence[bool] = True
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    loss: Loss = "squared"

    def __post_init__(self) -> None:
        if _checks.integer("final", self.final, 0) and np.any(self.ranks):
            given = f"{self.final} with ranks {self.ranks}"
            raise InputError("final", allowed="0 where adapters have a rank", given=given)
        _checks.choice("schedule", self.schedule, get_args(Schedule))
        _checks.choice("loss", self.loss, get_args(Loss))


@dataclass(frozen=True, eq=False, repr=False)
class Training(Generic[N]):
    """Trained networks: one for each `Tuning` (first dimension) and each frozen network.

    ``network`` and ``adapters`` are at each run's least validation loss, ``best_loss`` at
    ``best_step``. As one batch, updates are padded with zeros to the largest rank; ``adapters[i]``
    has the ranks of its own `Tuning`, and none for a weight that was tuned in full.
    Losses are at ``steps``, 0 before the first one: ``training_loss`` on the step's batch (NaN at
    0), ``validation_loss`` after the step; NaN once a run has ended, and none once all have. A run
    has ``diverged`` and ends if a loss is no finite number.
    """

    network: N
    adapters: Adapters
    steps: Int[Tensor, " points"]
    training_loss: Float[Tensor, "tunings *batch points"]
    validation_loss: Float[Tensor, "tunings *batch points"]
    best_loss: Float[Tensor, " tunings *batch"]
    best_step: Int[Tensor, " tunings *batch"]
    diverged: Bool[Tensor, " tunings *batch"]


class Data(ABC):
    """Batches to train on, and labelled inputs ``validation`` to choose the best parameters by.

    Inputs are as the network takes them: ``[..., D, samples]``, for transformers ``[..., samples,
    D, N]``. Labels are outputs of the same form or, for cross-entropy, integers ``[..., samples]``:
    each sample's class, one of the outputs.
    """

    # Batches are drawn in blocks, so that they do not depend on the number of steps.
    BLOCK = 50

    validation: Labelled

    @abstractmethod
    def block(self, index: int) -> Labelled:
        """Return batches of steps ``BLOCK · index`` to ``BLOCK · (index + 1)``, ``[BLOCK, …]``."""


@dataclass(eq=False)
class Fresh(Data):
    """Inputs ``N(0, s² I)`` drawn anew for every step, labelled by a function.

    ``label`` is a target network or another function of inputs, which lie on the device of its
    labels; ``shape`` is one input's, ``(D,)``, or ``(D, N)`` for N tokens; ``scale`` is ``s``. A
    batch has ``samples`` inputs; 256 are drawn once for the validation. Equal ``seed`` and
    ``purpose`` give equal inputs whatever is trained; different purposes give independent ones.
    """

    label: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    _: KW_ONLY
    samples: int = 256
    scale: float = 1.0
    seed: int = 0
    purpose: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.label, nn.Module):
            allowed = "a network or a function of columns, not a module, which takes rows"
            remedy = "networks.as_network makes a network of a Sequential"
            given = type(self.label).__name__
            raise InputError("label", allowed=allowed, given=given, remedy=remedy)
        if isinstance(self.label, Network):
            # Training is in single precision, and so are its labels.
            self.label = self.label.to(torch.float32)
        self.validation = self._draw((), 256, "validation inputs")

    def block(self, index: int) -> Labelled:
        return self._draw((self.BLOCK,), self.samples, "inputs", index)

    def test(self, samples: int) -> Labelled:
        """Draw labelled inputs for a test, independent of all others."""
        return self._draw((), samples, "test inputs")

    def _draw(self, batch: tuple[int, ...], samples: int, *part: str | int) -> Labelled:
        shape = (samples, *self.shape) if len(self.shape) == 2 else (*self.shape, samples)
        generator = randomness.generator(self.seed, *self.purpose, *part)
        x = self.scale * randomness.normal(generator, *batch, *shape, dtype=torch.float32)
        y = self.label(x)
        return x.to(y.device), y


@dataclass(eq=False)
class Fixed(Data):
    """Given labelled inputs, of a form that `Data` describes: all in every step, or in batches.

    Batches of ``samples`` come in an order that is new in each epoch. An epoch uses each sample
    once, except the few that do not fill another batch.
    """

    training: tuple[Any, Any]
    validation: tuple[Any, Any]
    _: KW_ONLY
    samples: int | None = None
    seed: int = 0
    purpose: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.training = x, y = _usable("training", self.training)
        self.validation = _usable("validation", self.validation)
        self._dim = 0 if x.ndim == 3 else -1
        count = x.shape[self._dim]
        if y.ndim == 0 or y.shape[self._dim] != count:
            allowed = f"of as many labels as inputs, {count}"
            raise InputError("training", allowed=allowed, given=f"labels of {tuple(y.shape)}")
        if self.samples is not None:
            _checks.integer("samples", self.samples, 1, count)

    def block(self, index: int) -> Labelled:
        x, y = self.training
        count = x.shape[self._dim]
        samples = self.samples or count
        if samples == count:
            return x.expand(self.BLOCK, *x.shape), y.expand(self.BLOCK, *y.shape)
        places = [divmod(self.BLOCK * index + i, count // samples) for i in range(self.BLOCK)]
        orders = {}
        for epoch in {epoch for epoch, _ in places}:
            generator = randomness.generator(self.seed, *self.purpose, "order", epoch)
            order = torch.randperm(count, generator=generator, device="cpu")
            orders[epoch] = order.to(x.device)
        batches = [orders[epoch].split(samples)[batch] for epoch, batch in places]

        def pick(part: Tensor) -> Tensor:
            return torch.stack([part.index_select(self._dim, batch) for batch in batches])

        return pick(x), pick(y)


def _usable(name: str, labelled: tuple[Any, Any]) -> Labelled:
    """Return inputs and labels as finite tensors; labels may be integers."""
    x, y = labelled
    inputs = _checks.real_tensor(f"{name} inputs", x, min_dims=2, copy=True)
    if isinstance(y, Tensor) and not y.is_floating_point():
        return inputs, y.clone()
    return inputs, _checks.real_tensor(f"{name} labels", y, min_dims=1, copy=True)
