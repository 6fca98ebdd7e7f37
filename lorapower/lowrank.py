"""Matrices of low rank: SVD, rank, condition numbers and solutions, over batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import _checks


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """Hold a matrix as factors: ``ΔW = A Bᵀ``.

    ``left`` is ``A``, ``[..., out, rank]``, and ``right`` is ``B``, ``[..., in, rank]``.
    """

    left: Float[Tensor, "*#batch out rank"]
    right: Float[Tensor, "*#batch in rank"]

    @property
    def rank(self) -> int:
        """Count the columns of the factors; the matrix has at most this rank."""
        return self.left.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``, the sizes of ``A Bᵀ``."""
        return self.left.shape[-2], self.right.shape[-2]

    @property
    def parameter_count(self) -> int:
        """Count the numbers stored for one matrix, ``(out + in) · rank``."""
        return sum(self.shape) * self.rank

    @property
    def mT(self) -> LowRank:  # noqa: N802
        """The transpose, ``B Aᵀ``."""
        return LowRank(self.right, self.left)

    def matrix(self) -> Float[Tensor, "*batch out in"]:
        """Multiply out ``A Bᵀ``."""
        return self.left @ self.right.mT

    def trimmed(self) -> LowRank:
        """Leave out columns that are 0 in both factors of all members of a batch."""
        left, right = (f.flatten(end_dim=-2).any(0) for f in (self.left, self.right))
        return LowRank(self.left[..., left | right], self.right[..., left | right])

    def balanced(self) -> LowRank:
        """Rescale columns so that each is as long in one factor as in the other."""
        sides = [torch.linalg.vector_norm(f, dim=-2, keepdim=True) for f in (self.left, self.right)]
        root = (sides[0] / sides[1]).sqrt()
        # A column of zeros stays one.
        root = torch.where(root.isfinite() & (root > 0), root, 1)
        return LowRank(self.left / root, self.right * root)

    def __repr__(self) -> str:
        return f"LowRank(left={[*self.left.shape]}, right={[*self.right.shape]})"


class SVD(NamedTuple):
    """Hold ``U diag(S) Vᵀ``: ``U`` and ``V`` have ``k`` orthonormal columns, ``S`` falls."""

    U: Float[Tensor, "*batch out k"]
    S: Float[Tensor, "*batch k"]
    V: Float[Tensor, "*batch in k"]

    @property
    def condition_number(self) -> Float[Tensor, "*batch"]:
        """``σ_1 / σ_k``, infinite for ``σ_k = 0``."""
        return _condition(self.S)


def svd(matrix: Float[Tensor, "*batch out in"]) -> SVD:
    """Decompose a matrix of finite numbers; ``k = min(out, in)``.

    Examples
    --------
    >>> import torch
    >>> from lorapower import lowrank
    >>> U, S, V = lowrank.svd(torch.diag(torch.tensor([1.0, 3.0])))
    >>> S, (U * S) @ V.mT
    (tensor([3., 1.]), tensor([[1., 0.],
            [0., 3.]]))
    """
    matrix = _checks.real_tensor("matrix", matrix, min_dims=2)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return SVD(U, S, Vh.mT)


def spectrum(matrix: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch k"]:
    """Compute the singular values ``σ_1 ≥ σ_2 ≥ …`` of a matrix, ``min(out, in)`` of them."""
    return torch.linalg.svdvals(_checks.real_tensor("matrix", matrix, min_dims=2))


def norm(matrix: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """Compute the spectral norm ``σ_1``."""
    return spectrum(matrix)[..., 0]


def truncated_svd(matrix: Float[Tensor, "*batch out in"], rank: int) -> LowRank:
    """Approximate by rank ``r``: ``Σ_{d≤r} σ_d u_d v_dᵀ``, as ``A = UΣ``, ``B = V``.

    It is best in both norms [thm-eckart-young]; ``r`` is at most ``min(out, in)``.

    Examples
    --------
    >>> import torch
    >>> from lorapower import lowrank
    >>> lowrank.truncated_svd(torch.diag(torch.tensor([1.0, 3.0])), rank=1).matrix()
    tensor([[0., 0.],
            [0., 3.]])
    """
    U, S, V = svd(matrix)
    rank = _checks.integer("rank", rank, 0, S.shape[-1], limit="the smaller side")
    return LowRank(U[..., :rank] * S[..., None, :rank], V[..., :rank])


def rank(
    matrix: Float[Tensor, "*batch out in"], *, scale: Tensor | float | None = None
) -> Int[Tensor, "*batch"]:
    """Count the singular values above ``max(out, in) · eps · scale``.

    ``scale`` is the size of the numbers that the matrix was computed from, by default its ``σ_1``.
    For a difference pass the size of its terms: otherwise their rounding counts.
    """
    singular_values = spectrum(matrix)
    size = singular_values[..., 0]
    if scale is not None:
        size = torch.as_tensor(scale, dtype=size.dtype, device=size.device)
    threshold = max(matrix.shape[-2:]) * torch.finfo(singular_values.dtype).eps * size
    return (singular_values > threshold[..., None]).sum(-1)


def condition_number(matrix: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """Compute ``σ_1 / σ_min(out, in)``, which is infinite for a matrix without full rank."""
    return _condition(spectrum(matrix))


def _condition(singular_values: Tensor) -> Tensor:
    largest, smallest = singular_values[..., 0], singular_values[..., -1]
    # Also for a zero matrix, whose quotient would be 0/0.
    return torch.where(smallest > 0, largest / smallest, torch.inf)


def times(
    matrix: Float[Tensor, "*#batch out in"], vector: Float[Tensor, "*#batch in"]
) -> Float[Tensor, "*batch out"]:
    """Multiply vectors by matrices."""
    return (matrix @ vector[..., None])[..., 0]


def solve(
    matrix: Float[Tensor, "*#batch rows cols"], right: Float[Tensor, "*#batch rows k"]
) -> Float[Tensor, "*batch cols k"]:
    """Find the smallest ``X`` with ``M X = Y``, by a QR factorization of ``Mᵀ``.

    ``M`` has full row rank, ``rows ≤ cols``. Where it is singular the result is not finite: check
    `condition_number` first.
    """
    Q, R = torch.linalg.qr(matrix.mT)
    return Q @ torch.linalg.solve_triangular(R.mT, right, upper=False)
