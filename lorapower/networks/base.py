"""What every kind of network shares: parameters, batches of members, checks of inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .. import _checks

Inputs = Float[Tensor, "*#batch in samples"]
Outputs = Float[Tensor, "*batch out samples"]


class Network(ABC):
    """A network, or a batch of them, as tensors.

    It has ``weights`` ``[..., out, in]`` and ``biases`` ``[..., out]`` of one type and one batch
    shape; linear networks have no biases. Numbers are copied, and no gradients flow into or through
    a network. ``sequences`` says whether inputs are tokens, ``[..., width, tokens]``.
    """

    weights: tuple[Float[Tensor, "*batch _ _"], ...]
    biases: tuple[Float[Tensor, "*batch _"], ...] = ()
    sequences: ClassVar[bool] = False

    @property
    def relus(self) -> int:
        """How many of the first layers of a chain are followed by a ReLU."""
        return 0

    @abstractmethod
    def __call__(self, x: Inputs) -> Outputs:
        """Compute outputs ``[..., out, samples]`` for columns ``x``, ``[..., in, samples]``."""

    def with_parameters(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        *,
        checked: bool = True,
    ) -> Self:
        """Make the network of other ``weights`` and, where given, ``biases``, in their order.

        Not ``checked``, it holds these very tensors, and gradients flow to them.
        """
        return self._rebuilt(weights, self.biases if biases is None else biases, checked)

    @abstractmethod
    def _rebuilt(self, weights: Sequence[Tensor], biases: Sequence[Tensor], checked: bool) -> Self:
        """Make the network of other parameters."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``change`` to each weight and bias."""
        return self.with_parameters([*map(change, self.weights)], [*map(change, self.biases)])

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Self:
        """Round all numbers to ``dtype``, float32 or float64, and move them to ``device``."""
        return self.map(lambda values: values.to(device or self.device, dtype or self.dtype))

    def __getitem__(self, index: Any) -> Self:
        """Pick the member, or members, of the batch at ``index``."""
        count = torch.arange(self.batch_shape.numel(), device=self.device)
        members, dims = count.reshape(self.batch_shape)[index], len(self.batch_shape)
        return self.map(lambda values: values.reshape(-1, *values.shape[dims:])[members])

    def __iter__(self) -> Iterator[Self]:
        """Go through the members along the first batch dimension."""
        if not self.batch_shape:
            raise TypeError("a single network has no members")
        return (self[i] for i in range(self.batch_shape[0]))

    def __repr__(self) -> str:
        batch = [f"batch {[*self.batch_shape]}"] if self.batch_shape else []
        device = [str(self.device)] if self.device.type != "cpu" else []
        words = [self._sides, *batch, str(self.dtype).removeprefix("torch."), *device]
        return f"{type(self).__name__}({', '.join(words)})"

    @property
    @abstractmethod
    def _sides(self) -> str:
        """The sizes in words."""

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions: how many networks this object holds."""
        return self.weights[0].shape[:-2]

    @property
    def dtype(self) -> torch.dtype:
        """The type of all numbers."""
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        """Where all numbers are."""
        return self.weights[0].device

    def as_inputs(self, x: Any, name: str = "x") -> Float[Tensor, "*batch in n"]:
        """Read inputs in the network's type and on its device; `InputError` for other sizes."""
        word = "tokens" if self.sequences else "samples"
        x = _checks.columns(name, x, self.weights[0].shape[-1], word)
        return x.to(self.device, self.dtype)

    def fill(self, x: Float[Tensor, "*batch narrower n"]) -> Float[Tensor, "*batch in n"]:
        """Widen inputs of a narrower network with zeros; `InputError` for wider ones."""
        x, inputs = _checks.real_tensor("x", x, min_dims=2), self.weights[0].shape[-1]
        width = _checks.integer("width of x", x.shape[-2], 1, inputs)
        return functional.pad(x, (0, 0, 0, inputs - width))
