"""Bounded convex sets of inputs, on which constructions keep their promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from . import _checks, randomness
from .errors import InputError


class Region(ABC):
    """A bounded convex set of inputs.

    A region given by single numbers for all coordinates has no width before `fit`; until then only
    `lowest` works, and everything else raises `InputError`.
    """

    _centre: Tensor
    _fitted: bool = True

    @property
    def centre(self) -> Float[Tensor, "*batch width 1"]:
        """The centre, about which `lowest` and `image` measure."""
        if not self._fitted:
            given = "single numbers for all coordinates"
            remedy = "fit it to a width first, .fit(width, dtype)"
            raise InputError("region", allowed="of a known width", given=given, remedy=remedy)
        return self._centre

    @property
    def width(self) -> int:
        """Number of coordinates of an input."""
        return self.centre.shape[-2]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions: how many regions this object holds."""
        return self._centre.shape[:-2]

    @abstractmethod
    def fit(self, width: int, dtype: torch.dtype) -> Self:
        """Express the region in ``width`` coordinates; raises `InputError` for another width."""

    def _column(self, width: int) -> Float[Tensor, "*batch width 1"]:
        """Expand the centre to ``width`` coordinates."""
        if self._fitted and self.width != width:
            allowed = f"of {width} coordinates, like the inputs"
            raise InputError("region", allowed=allowed, given=self.width)
        return self._centre.expand(*self.batch_shape, width, 1)

    @abstractmethod
    def lowest(self, matrix: Float[Tensor, "*#batch out width"]) -> Float[Tensor, "*batch out 1"]:
        """Minimize ``M (x − centre)`` over the region, row by row; never above 0."""

    def sample(
        self, samples: int, *, edge: bool = False, seed: int = 0
    ) -> Float[Tensor, "*batch width samples"]:
        """Draw inputs in the region or, with ``edge``, at its edge."""
        return self._draw(samples, edge, randomness.generator(seed, "inputs in a region"))

    @abstractmethod
    def _draw(self, samples: int, edge: bool, generator: torch.Generator) -> Tensor: ...

    def typical(self, scale: float) -> Float[Tensor, "*batch width samples"]:
        """Make typical inputs: ``centre ± scale · √D · e_d`` for each of the ``D`` coordinates.

        Their covariance is ``scale² I``; inputs outside the region move towards the centre.
        """
        identity = torch.eye(self.width).to(self.centre)
        steps = identity * (-self.lowest(identity)).clamp(max=scale * self.width**0.5)
        return torch.cat([self.centre + steps, self.centre - steps], dim=-1)

    def image(
        self, matrix: Float[Tensor, "*#batch out width"], at_centre: Float[Tensor, "*#batch out 1"]
    ) -> Region:
        """Find a region that holds ``M (x − centre) + m`` for every ``x`` in this one."""
        return Box(*self._ends(matrix, at_centre))

    def relu(self) -> Region:
        """Find a region that holds ``ReLU(x)`` for every ``x`` in this one."""
        identity = torch.eye(self.width).to(self.centre)
        return Box(*(end.relu() for end in self._ends(identity, self.centre)))

    def _ends(self, matrix: Tensor, at_centre: Tensor) -> tuple[Tensor, Tensor]:
        """Find the least and the largest value of each row of ``M (x − centre) + m``."""
        low, high = at_centre + self.lowest(matrix), at_centre - self.lowest(-matrix)
        return low[..., 0], high[..., 0]


class Ball(Region):
    """All inputs with ``‖x − centre‖_2 ≤ radius``.

    The centre is one number for all coordinates, or ``[..., width]``, the radius one or ``[...]``.

    Examples
    --------
    >>> import torch
    >>> from lorapower.regions import Ball
    >>> Ball(2.0).fit(3, torch.float64).sample(100).norm(dim=0).max() <= 2
    tensor(True)
    """

    def __init__(self, radius: Any, centre: Any = 0.0) -> None:
        self.radius, middle = _checks.numbers("radius", radius), _checks.numbers("centre", centre)
        self._fitted = middle.ndim > 0
        column = torch.atleast_1d(middle)[..., None]
        batches = [self.radius.shape, column.shape[:-2]]
        batch = _checks.common_shape("radius and centre", batches)
        self._centre = column.expand(*batch, *column.shape[-2:])
        if (self.radius < 0).any():
            raise InputError("radius", allowed="at least 0", given=float(self.radius.min()))

    @classmethod
    def about(cls, x: Float[Tensor, "*batch width samples"], margin: float = 1.0) -> Ball:
        """Find the ball about the mean of inputs that holds them; ``margin`` scales its radius."""
        centre = x.mean(-1, keepdim=True)
        radius = torch.linalg.vector_norm(x - centre, dim=-2).amax(-1)
        return cls(margin * radius, centre[..., 0])

    def fit(self, width: int, dtype: torch.dtype) -> Ball:
        return Ball(self.radius.to(dtype), self._column(width)[..., 0].to(dtype))

    def lowest(self, matrix: Tensor) -> Tensor:
        rows = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
        return -self.radius[..., None, None] * rows

    def _draw(self, samples: int, edge: bool, generator: torch.Generator) -> Tensor:
        like: Any = {"dtype": self.centre.dtype, "device": self.centre.device}
        drawn = randomness.normal(generator, *self.centre.shape[:-1], samples, **like)
        direction = drawn / torch.linalg.vector_norm(drawn, dim=-2, keepdim=True)
        fraction = randomness.uniform(generator, *self.batch_shape, 1, samples, **like)
        reach = 1 if edge else fraction ** (1 / self.width)
        return self.centre + self.radius[..., None, None] * reach * direction


class Box(Region):
    """All inputs with ``low ≤ x ≤ high`` in every coordinate.

    Sides are one number or ``[..., width]``.

    Examples
    --------
    >>> import torch
    >>> from lorapower.regions import Box
    >>> Box([0.0, 0.0], [1.0, 2.0]).centre.mT
    tensor([[0.5000, 1.0000]], dtype=torch.float64)
    """

    def __init__(self, low: Any, high: Any) -> None:
        low, high = _checks.numbers("low", low), _checks.numbers("high", high)
        self._fitted = max(low.ndim, high.ndim) > 0
        low, high = torch.atleast_1d(low, high)
        shape = _checks.common_shape("low and high", [low.shape, high.shape])
        low, high = low.expand(shape), high.expand(shape)
        empty = low > high
        if empty.any():
            given = f"{float(low[empty][0])} above {float(high[empty][0])}"
            raise InputError("low", allowed="at most high in every coordinate", given=given)
        # Not (low + high) / 2, which overflows sooner.
        self._centre = (low / 2 + high / 2)[..., None]
        self.half = (high / 2 - low / 2)[..., None]

    def fit(self, width: int, dtype: torch.dtype) -> Box:
        centre = self._column(width)
        return Box(*((centre + end)[..., 0].to(dtype) for end in (-self.half, self.half)))

    def lowest(self, matrix: Tensor) -> Tensor:
        return -(matrix.abs() * self.half.mT).sum(-1, keepdim=True)

    def _draw(self, samples: int, edge: bool, generator: torch.Generator) -> Tensor:
        shape = (*self.centre.shape[:-1], samples)
        drawn = randomness.uniform(generator, *shape, dtype=self.centre.dtype)
        drawn = 2 * drawn.to(self.centre) - 1
        return self.centre + self.half * (drawn.sign() if edge else drawn)


class Samples(Region):
    """The convex hull of inputs ``[..., width, samples]``, enlarged about their mean.

    It is enlarged by the factor ``1 + margin ≥ 1``. After the first block of a partition the region
    is the enlarged hull of the inputs' images, which need not hold the image of the hull: for
    targets of several layers the promise is for the given inputs alone.

    Examples
    --------
    >>> import torch
    >>> from lorapower.regions import Samples
    >>> Samples(torch.eye(2), margin=0.0).lowest(torch.tensor([[1.0, 0.0]]))
    tensor([[-0.5000]])
    """

    def __init__(self, inputs: Any, margin: float = 0.1) -> None:
        self.inputs = _checks.real_tensor("inputs", inputs, min_dims=2, copy=True)
        self.margin = _checks.number("margin", margin, 0)
        self._centre = self.inputs.mean(-1, keepdim=True)

    def fit(self, width: int, dtype: torch.dtype) -> Samples:
        self._column(width)
        return Samples(self.inputs.to(dtype), self.margin)

    def lowest(self, matrix: Tensor) -> Tensor:
        return (1 + self.margin) * (matrix @ (self.inputs - self.centre)).amin(-1, keepdim=True)

    def _draw(self, samples: int, edge: bool, generator: torch.Generator) -> Tensor:
        picked = torch.randint(self.inputs.shape[-1], (samples,), generator=generator)
        drawn = self.inputs[..., picked.to(self.inputs.device)]
        return self.centre + (1 + self.margin) * (drawn - self.centre) if edge else drawn

    def typical(self, scale: float) -> Float[Tensor, "*batch width samples"]:
        return self.inputs

    def image(
        self, matrix: Float[Tensor, "*#batch out width"], at_centre: Float[Tensor, "*#batch out 1"]
    ) -> Samples:
        return Samples(matrix @ (self.inputs - self.centre) + at_centre, self.margin)

    def relu(self) -> Samples:
        return Samples(self.inputs.relu(), self.margin)


def as_region(value: Region | Any, width: int, dtype: torch.dtype) -> Region:
    """Read a region of inputs of this width and type; columns ``[..., width, samples]`` are one."""
    if value is None:
        allowed = "given for networks with ReLUs: a region, or columns [..., width, samples]"
        raise InputError("on", allowed=allowed, given="none")
    region = value if isinstance(value, Region) else Samples(_checks.columns("on", value, width))
    return region.fit(width, dtype)
