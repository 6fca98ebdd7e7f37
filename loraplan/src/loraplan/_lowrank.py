"""Matrices of low rank, held as factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ._errors import InputError


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """Hold a matrix as factors: ``ΔW = A Bᵀ``.

    ``left`` is ``A``, ``[out, rank]``, and ``right`` is ``B``, ``[in, rank]``. Raises `InputError`
    for different numbers of columns.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "in rank"]

    def __post_init__(self) -> None:
        left, right = self.left.shape[-1], self.right.shape[-1]
        if left != right:
            raise InputError("right", allowed=f"of {left} columns, like left", given=right)

    @property
    def rank(self) -> int:
        """Count the columns of the factors; the matrix has at most this rank."""
        return self.left.shape[-1]

    @property
    def parameter_count(self) -> int:
        """Count the numbers stored, ``(out + in) · rank``."""
        return (self.left.shape[-2] + self.right.shape[-2]) * self.rank

    @property
    def shape(self) -> torch.Size:
        """``[out, in]``, the sizes of ``A Bᵀ``."""
        return torch.Size([self.left.shape[-2], self.right.shape[-2]])

    @property
    def mT(self) -> LowRank:  # noqa: N802
        """The transpose, ``B Aᵀ``."""
        return LowRank(self.right, self.left)

    def matrix(self) -> Float[Tensor, "out in"]:
        """Multiply out ``A Bᵀ``."""
        return self.left @ self.right.mT

    def __matmul__(self, columns: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
        """Multiply columns, without multiplying out ``A Bᵀ``."""
        return self.left.to(columns) @ (self.right.to(columns).mT @ columns)

    def leading(self, rank: int) -> LowRank:
        """Keep the first columns of both factors."""
        return LowRank(self.left[..., :rank], self.right[..., :rank])

    def __repr__(self) -> str:
        return f"LowRank(left={[*self.left.shape]}, right={[*self.right.shape]})"
