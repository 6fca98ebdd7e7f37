"""Low-rank matrices: truncated SVD, spectra, numerical rank, condition numbers, solves.

Everything broadcasts over leading batch dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import _checks, randomness
from .errors import InputError


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """A matrix held as its factors: the update ``ΔW = A Bᵀ`` of an adapter.

    Attributes
    ----------
    left : Tensor
        ``A``, ``[..., out, rank]``.
    right : Tensor
        ``B``, ``[..., in, rank]``.
    """

    left: Float[Tensor, "*batch out rank"]
    right: Float[Tensor, "*batch in rank"]

    def __post_init__(self) -> None:
        left, right = (
            _checks.tensor(name, getattr(self, name), min_dims=2).shape[-1]
            for name in ("left", "right")
        )
        if left != right:
            raise InputError("right", allowed=f"of {left} columns, like left", given=right)

    @property
    def rank(self) -> int:
        """Number of columns of the factors; the matrix has at most this rank."""
        return self.left.shape[-1]

    @property
    def parameter_count(self) -> int:
        """Numbers stored for one matrix: ``(out + in) · rank``."""
        return (self.left.shape[-2] + self.right.shape[-2]) * self.rank

    def matrix(self) -> Float[Tensor, "*batch out in"]:
        """The product ``A Bᵀ``."""
        return self.left @ self.right.mT

    def balanced(self) -> LowRank:
        """The same matrix with each column as long in one factor as in the other."""
        sides = [torch.linalg.vector_norm(f, dim=-2, keepdim=True) for f in (self.left, self.right)]
        root = (sides[0] / sides[1]).sqrt()
        # A column of zeros in one factor stays one, whatever stands in the other.
        root = torch.where(root.isfinite() & (root > 0), root, 1)
        return LowRank(self.left / root, self.right * root)

    def __repr__(self) -> str:
        (*batch, out, rank), into = self.left.shape, self.right.shape[-2]
        parts = [f"{out}×{into}", f"rank {rank}", *[f"batch {batch}"] * bool(batch)]
        return f"LowRank({', '.join(parts)}, {str(self.left.dtype).removeprefix('torch.')})"


def spectrum(matrix: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch k"]:
    """Singular values ``σ_1 ≥ σ_2 ≥ …``, ``k = min(out, in)`` of them.

    Raises `InputError` for anything but a finite float32 or float64 matrix.
    """
    return _singular_values(_checks.real_tensor("matrix", matrix, min_dims=2))


class SVD(NamedTuple):
    """``U diag(S) Vᵀ``: ``k`` orthonormal columns in ``U`` and in ``V``, largest ``σ`` first."""

    U: Float[Tensor, "*batch out k"]
    S: Float[Tensor, "*batch k"]
    V: Float[Tensor, "*batch in k"]


def svd(matrix: Float[Tensor, "*batch out in"]) -> SVD:
    """The singular value decomposition of a matrix of finite numbers, ``k = min(out, in)``."""
    matrix = _checks.real_tensor("matrix", matrix, min_dims=2)
    U, S, Vh = _of_distinct(lambda m: torch.linalg.svd(m, full_matrices=False), matrix)
    return SVD(U, S, Vh.mT)


def norm(matrix: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """The spectral norm ``σ_1`` of a matrix of finite numbers."""
    return spectrum(matrix)[..., 0]


def _singular_values(matrix: Tensor) -> Tensor:
    (values,) = _of_distinct(lambda m: (torch.linalg.svdvals(m),), matrix)
    return values


def _of_distinct(
    function: Callable[[Tensor], tuple[Tensor, ...]], matrix: Tensor
) -> tuple[Tensor, ...]:
    """``function`` of a batch of matrices; members that are one by expansion are taken once."""
    batch = matrix.shape[:-2]
    for dim in range(len(batch)):
        if matrix.stride(dim) == 0:
            matrix = matrix.narrow(dim, 0, 1)
    found = function(matrix)
    return tuple(each.expand((*batch, *each.shape[len(batch) :])) for each in found)


def truncated_svd(matrix: Float[Tensor, "*batch out in"], rank: int) -> LowRank:
    """``LR_r(M) = Σ_{d≤r} σ_d u_d v_dᵀ``, the best approximation of rank ``r``.

    Its factors are ``A = UΣ`` and ``B = V``. Best in spectral and Frobenius norm
    [thm-eckart-young]. Raises `InputError` for a rank outside ``0…min(out, in)`` or a matrix that
    is not finite float32 or float64.
    """
    matrix = _checks.real_tensor("matrix", matrix, min_dims=2)
    rank = _checks.integer("rank", rank, 0, min(matrix.shape[-2:]), limit="the smaller side")
    U, S, V = svd(matrix)
    return LowRank(U[..., :rank] * S[..., None, :rank], V[..., :rank])


class Norms(NamedTuple):
    """Spectral and Frobenius norm of a matrix."""

    spectral: Float[Tensor, "*batch"]
    frobenius: Float[Tensor, "*batch"]


def tail_norms(singular_values: Float[Tensor, "*batch k"], rank: int) -> Norms:
    """Norms of what rank ``r`` leaves out: ``σ_{r+1}`` (0 past the end), ``(Σ_{d>r} σ_d²)^{1/2}``.

    These are the spectral and the Frobenius distance to the nearest matrix of rank ``r``
    [thm-eckart-young]. Raises `InputError` for a negative rank.
    """
    _checks.tensor("singular_values", singular_values, min_dims=1)
    tail = singular_values[..., _checks.integer("rank", rank, 0) :]
    spectral = (
        tail[..., 0] if tail.shape[-1] else singular_values.new_zeros(singular_values.shape[:-1])
    )
    return Norms(spectral, torch.linalg.vector_norm(tail, dim=-1))


def rank(
    matrix: Float[Tensor, "*batch out in"], *, scale: Tensor | float | None = None
) -> Int[Tensor, "*batch"]:
    """Numerical rank: how many ``σ_d`` exceed ``max(out, in) · eps · scale``.

    ``scale`` is the size of the numbers that the matrix was computed from, by default its own
    ``σ_1``; a difference of nearly equal matrices needs the size of its terms, or its rounding
    errors would count.
    """
    matrix = _checks.real_tensor("matrix", matrix, min_dims=2)
    singular_values = _singular_values(matrix)
    if scale is None:
        size = singular_values[..., 0]
    elif isinstance(scale, Tensor):
        size = _checks.real_tensor("scale", scale, min_dims=0)
    else:
        size = singular_values.new_tensor(_checks.tolerance("scale", scale))
    threshold = max(matrix.shape[-2:]) * torch.finfo(singular_values.dtype).eps * size
    return (singular_values > threshold[..., None]).sum(-1)


def condition_number(matrix: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch"]:
    """``σ_1 / σ_min(out, in)``: 1 at best, infinite for a matrix without full rank."""
    return condition(spectrum(matrix))


def condition(singular_values: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """``σ_1 / σ_k``, infinite for ``σ_k = 0``."""
    _checks.tensor("singular_values", singular_values, min_dims=1)
    largest, smallest = singular_values[..., 0], singular_values[..., -1]
    # Also for a zero matrix, whose quotient would be 0/0.
    return torch.where(smallest > 0, largest / smallest, torch.inf)


def solve(
    matrix: Float[Tensor, "*#batch rows cols"], right: Float[Tensor, "*#batch rows k"]
) -> Float[Tensor, "*batch cols k"]:
    """The smallest ``X`` with ``M X = Y`` for a matrix ``M`` of full row rank (``rows ≤ cols``).

    By a QR factorization of ``Mᵀ``, which is backward stable and forms no inverse. Where ``M`` is
    singular the result is not finite: look at `condition_number` first. Raises `InputError` when
    ``rows > cols``, since then no solution exists in general.
    """
    rows, cols = _checks.tensor("matrix", matrix, min_dims=2).shape[-2:]
    height = _checks.tensor("right", right, min_dims=2).shape[-2]
    if height != rows:
        raise InputError("right", allowed=f"of {rows} rows, like the matrix", given=height)
    if rows > cols:
        raise InputError("matrix", allowed="at least as wide as high", given=f"{rows}×{cols}")
    Q, R = _of_distinct(torch.linalg.qr, matrix.mT)
    return Q @ torch.linalg.solve_triangular(R.mT, right, upper=False)


def random_matrix(
    rows: int,
    cols: int,
    *,
    condition_number: float,
    batch_shape: tuple[int, ...] = (),
    seed: int = 0,
    purpose: str = "matrix",
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "*batch rows cols"]:
    """``Q_1 diag(σ) Q_2ᵀ``: random orthonormal ``Q_1, Q_2``; ``σ`` log-spaced from 1 to ``1/κ``.

    ``κ`` is the given condition number, at least 1. For experiments on rounding errors. Matrices of
    one seed and different purposes are independent.
    """
    rows, cols = _checks.integer("rows", rows, 1), _checks.integer("cols", cols, 1)
    batch_shape, dtype = _checks.sizes("batch_shape", batch_shape), _checks.precision(dtype)
    condition_number = _checks.finite("condition_number", condition_number, 1)
    generator = randomness.generator(seed, "conditioned", purpose)
    size = min(rows, cols)

    def orthonormal(n: int) -> Tensor:
        normal = randomness.normal(generator, *batch_shape, n, size)
        return torch.linalg.qr(normal)[0]

    sigma = torch.logspace(0, -1, size, base=condition_number, dtype=torch.float64, device="cpu")
    return ((orthonormal(rows) * sigma) @ orthonormal(cols).mT).to(dtype)
