"""Rank thresholds and a worst-case error of an adapted transformer (chapter 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, lowrank
from ..networks import LinearNetwork, Segment, Transformer, product, segments
from .linear import error_rank


class PerSegment(NamedTuple):
    """One number for each segment of a transformer.

    Attributes
    ----------
    query_key, value_output : ``[..., L, H]``.
    output : ``[...]``.
    """

    query_key: Tensor
    value_output: Tensor
    output: Tensor

    def largest(self) -> Tensor:
        """The largest of a network's numbers; ``[...]``."""
        heads = torch.maximum(self.query_key, self.value_output).amax((-2, -1))
        return torch.maximum(heads, self.output)


class PairRanks(NamedTuple):
    """Least ranks with which the two adapted factors of a segment reach its target.

    Attributes
    ----------
    inner, outer : of the factor that acts first, and of the other.
    together : of both.
    """

    inner: Int[Tensor, "*batch"]
    outer: Int[Tensor, "*batch"]
    together: Int[Tensor, "*batch"]

    def equal(self) -> Int[Tensor, "*batch"]:
        """The least equal rank of both, ``max(⌈together / 2⌉, inner, outer)``."""
        return torch.stack([-(-self.together // 2), self.inner, self.outer]).amax(0)


def halves(network: LinearNetwork) -> tuple[Tensor, Tensor]:
    """The products ``Y`` of the first and ``X`` of the last two of a segment's four layers."""
    return product(network.weights[:2]), product(network.weights[2:])


def pair_ranks(segment: Segment) -> PairRanks:
    """Least ranks on the two middle layers of a segment of four with ``d`` between them.

    With ``X Y`` the frozen, ``X̄ Ȳ`` the target product, cut in the middle: ``rank[Ȳ; Y] − d``,
    ``rank[X̄, X] − d``, and ``rank(X̄ Ȳ − X Y)`` for both together. The first two are 0 for heads
    that are not narrower than the tokens. They are necessary where ``X̄`` and ``Ȳ`` have rank ``d``.
    Source: proposition "narrow heads", chapter 4.
    """
    _checks.kind(Segment, segment=segment)
    (Y, X), (Y_target, X_target) = halves(segment.frozen), halves(segment.target)
    size = Y.shape[-2]
    inner = _rank_beside(Y_target.mT, Y.mT) - size
    outer = _rank_beside(X_target, X) - size
    return PairRanks(inner.clamp(min=0), outer.clamp(min=0), error_rank(*segment))


def _rank_beside(left: Tensor, right: Tensor) -> Int[Tensor, "*batch"]:
    sides = [m / torch.linalg.matrix_norm(m, ord=2, keepdim=True) for m in (left, right)]
    return lowrank.rank(torch.cat(sides, dim=-1).nan_to_num())


def transformer_ranks(frozen: Transformer, target: Transformer) -> PerSegment:
    """The least equal rank on the two adapted weights of each segment with which it is exact.

    ``⌈rank(E) / 2⌉`` with ``E`` the difference of target and frozen segment, more only where heads
    are narrower than the tokens (`pair_ranks`). Raises what `networks.segments` raises. Source:
    theorem "exact adaptation of a transformer", chapter 4.
    """
    cut = segments(frozen, target)
    output = -(-error_rank(*cut.output) // 2)
    return PerSegment(
        pair_ranks(cut.query_key).equal(), pair_ranks(cut.value_output).equal(), output
    )


def transformer_threshold(frozen: Transformer, target: Transformer) -> Int[Tensor, "*batch"]:
    """``⌈G/2⌉``: the rank that is enough for every segment (see `transformer_ranks`)."""
    return transformer_ranks(frozen, target).largest()


def transformer_error(
    frozen: Transformer,
    target: Transformer,
    errors: PerSegment,
    x: Float[Tensor, "*batch width n"],
) -> Float[Tensor, "*batch"]:
    """A bound of the largest error ``‖f(x)_j − f̄(x)_j‖_2`` of a token, for each sequence ``x``.

    Block by block, with ``r`` the largest norm of a column ``a`` that enters it (of the input, or
    of the activations before), ``q`` that of ``y = a + c``, ``δ`` that of the error, ``r̂ = r + δ``
    and ``q̂ = q + δ``: the scores of head ``h`` are off by at most ``s = ‖M_QK‖ δ (r̂ + q) + ε_QK r̂
    q̂``, a column of the softmax by ``min(s, 2)`` in ``ℓ_1``, and the next columns by ``Σ_h [‖M_VO‖
    (r min(s, 2) + δ) + ε_VO r̂]``. At the end ``‖W_out W_2‖ δ + ε_out r̂``. A worst case, far above
    the typical error after several blocks; the rounding of evaluating the networks comes on top.

    Parameters
    ----------
    errors : spectral distances ``ε`` of the adapted segments from the target's, such as
        `constructions.transformer.TransformerAdaptation.errors`.

    Source: proposition "error below the threshold", chapter 4.
    """
    cut = segments(frozen, target)
    norms = [_norm(segment.target.product()) for segment in (cut.query_key, cut.value_output)]
    delta = torch.zeros((), dtype=target.dtype)
    columns = target.as_inputs(x)
    for l, block in enumerate(target.trace(x)):
        shifted = columns + cut.shift[..., l - 1, :, None] if l else columns
        r, q, delta = (size[..., None] for size in (_longest(columns), _longest(shifted), delta))
        scores, values = (norm[..., l, :] for norm in norms)
        score_errors, value_errors = errors.query_key[..., l, :], errors.value_output[..., l, :]
        off = scores * delta * (r + delta + q) + score_errors * (r + delta) * (q + delta)
        delta = (values * (r * off.clamp(max=2) + delta) + value_errors * (r + delta)).sum(-1)
        columns = block.preactivations.relu()
    return _norm(cut.output.target.product()) * delta + errors.output * (_longest(columns) + delta)


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, ord=2)


def _longest(columns: Tensor) -> Tensor:
    """Norm of the longest column."""
    return torch.linalg.vector_norm(columns, dim=-2).amax(-1)
