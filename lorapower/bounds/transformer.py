"""Rank thresholds and a worst-case error of an adapted transformer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, lowrank
from ..networks import segments
from ..networks.gap import Gap
from ..networks.segments import Segments, missing_shift
from ..networks.transformer import Transformer


class PairRanks(NamedTuple):
    """Ranks on the two middle layers of a segment: of the one that acts first, the other, both."""

    inner: Int[Tensor, "*batch"]
    outer: Int[Tensor, "*batch"]
    together: Int[Tensor, "*batch"]


def pair_ranks(gap: Gap) -> PairRanks:
    """Least ranks on the two middle layers of a segment of four.

    With ``X Y`` the frozen product, cut in the middle where ``d`` units stand, and ``M`` the
    target's: ``rank[M; Y] − rank Y``, ``rank[M, X] − rank X``, and ``rank(M − X Y)`` for both
    together. The first two are 0 for heads that are not narrower than the tokens. All three are
    necessary. Where ``X`` and ``Y`` have rank ``d`` they are enough, for a target of any rank.
    Source: [prop-narrow-heads].
    """
    _checks.kind(Gap, gap=gap)
    (Y, X), (Y_target, X_target) = gap.frozen.halves(), gap.target.halves()
    size = Y.shape[-2]
    if size >= max(Y.shape[-1], X.shape[-2]):
        none = torch.zeros_like(gap.rank)
        return PairRanks(none, none, gap.rank)
    full = target_ranks(gap) == size
    rows, columns = _bases(Y_target, X_target)
    inner = torch.where(full, _rank_beside(Y_target.mT, Y.mT), _rank_beside(rows.mT, Y.mT))
    outer = torch.where(full, _rank_beside(X_target, X), _rank_beside(columns, X))
    inner, outer = inner - lowrank.rank(Y), outer - lowrank.rank(X)
    return PairRanks(inner.clamp(min=0), outer.clamp(min=0), gap.rank)


def target_ranks(gap: Gap) -> Int[Tensor, "*batch"]:
    """The rank of the target's product through the units in the middle of a segment."""
    Y, X = gap.target.halves()
    ranks = _ranks(torch.linalg.qr(Y.mT, mode="r").R, torch.linalg.qr(X, mode="r").R)
    return ranks.expand(gap.batch_shape)


def _ranks(of_Y: Tensor, of_X: Tensor) -> Int[Tensor, "*batch"]:
    scale = lowrank.norm(of_X) * lowrank.norm(of_Y)
    return lowrank.rank(of_X @ of_Y.mT, scale=scale)


def _bases(Y: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns that span those of ``X Y``, and zeros."""
    Q_Y, of_Y = torch.linalg.qr(Y.mT)
    Q_X, of_X = torch.linalg.qr(X)
    U, S, V = lowrank.svd(of_X @ of_Y.mT)
    counts = torch.arange(S.shape[-1], device=S.device) < _ranks(of_Y, of_X)[..., None]
    return (Q_Y @ (V * counts[..., None, :])).mT, Q_X @ (U * counts[..., None, :])


def _rank_beside(left: Tensor, right: Tensor) -> Int[Tensor, "*batch"]:
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    sides = [(m / lowrank.norm(m)[..., None, None]).nan_to_num() for m in (left, right)]
    return lowrank.rank(torch.cat([m.expand(*batch, *m.shape[-2:]) for m in sides], dim=-1))


def transformer_ranks(frozen: Transformer, target: Transformer) -> Segments[Tensor]:
    """The least equal rank on the two adapted weights of each segment with which it is exact.

    ``⌈rank(E) / 2⌉`` with ``E`` the difference of target and frozen segment, more only where heads
    are narrower than the tokens (`pair_ranks`). Raises what `networks.segments` raises. Source:
    [thm-transformer].
    """
    cut = segments(frozen, target)

    def equal(gap: Gap) -> Tensor:
        least = pair_ranks(gap)
        return torch.stack([least.inner, least.outer, -(-least.together // 2)]).amax(0)

    return Segments(equal(cut.query_key), equal(cut.value_output), cut.output.threshold)


def transformer_threshold(frozen: Transformer, target: Transformer) -> Int[Tensor, "*batch"]:
    """``⌈G/2⌉``: the rank that is enough for every segment (see `transformer_ranks`)."""
    return transformer_ranks(frozen, target).largest()


def transformer_errors(frozen: Transformer, target: Transformer, rank: int) -> Segments[Tensor]:
    """``ε = σ_{r+1}(E)`` of each segment where each adapted weight has at most this rank.

    ``r`` is the sum over the segment's two adapted weights, of which none takes more than its
    smaller side. Heads narrower than the tokens are adapted exactly or not at all: ``ε`` is
    infinite for too low a rank (`pair_ranks`), or else 0. Raises what `networks.segments` raises,
    and `InputError` for a rank outside 0 to the width. Source: [thm-transformer],
    [prop-narrow-heads].
    """
    cut = segments(frozen, target)
    rank = _checks.integer("rank", rank, 0, frozen.width, limit="the width")

    def of_heads(gap: Gap) -> Tensor:
        _, width, size, *_ = gap.frozen.widths
        if size >= width:
            return gap.error(sum(gap.ranks([0, rank, rank, 0])))
        own, least = min(rank, size), pair_ranks(gap)
        lacking = torch.maximum(least.inner, least.outer) > own
        lacking = lacking | (least.together > 2 * own)
        return torch.where(lacking, torch.inf, torch.zeros_like(gap.error(0)))

    of_output = cut.output.error(sum(cut.output.ranks([rank, rank])))
    return Segments(of_heads(cut.query_key), of_heads(cut.value_output), of_output)


def transformer_error(
    frozen: Transformer,
    target: Transformer,
    errors: Segments[Tensor],
    x: Float[Tensor, "*#batch width n"],
) -> Float[Tensor, "*batch"]:
    """A bound of the largest error ``‖f(x)_j − f̄(x)_j‖_2`` of a token, for each sequence ``x``.

    Block by block, with ``r`` the largest norm of a column ``a`` that enters it (of the input, or
    of the activations before), ``q`` that of ``y = a + c``, ``δ`` that of the error, ``r̂ = r + δ``
    and ``q̂ = q + δ``: the scores of head ``h`` are off by at most ``s = ‖M_QK‖ δ (r̂ + q) + ε_QK r̂
    q̂``, a column of the softmax by ``min(s, 2)`` in ``ℓ_1``, and the next columns by ``Σ_h [‖M_VO‖
    (r min(s, 2) + δ) + ε_VO r̂]``. At the end ``‖W_out W_2‖ δ + ε_out r̂``. A worst case, far above
    the typical error after several blocks; the rounding of evaluating the networks comes on top.

    Source: [prop-transformer-error].

    Parameters
    ----------
    errors : Segments
        Spectral distances ``ε`` of the adapted segments from the target's, such as
        `constructions.transformer.TransformerAdaptation.errors`.
    """
    _checks.kind(Segments, errors=errors)
    cut, shift = segments(frozen, target), missing_shift(target)
    norms = Segments(*(lowrank.norm(gap.target.product()) for gap in cut))
    delta = torch.zeros((), dtype=target.dtype, device=target.device)
    columns = target.as_inputs(x)
    for l, block in enumerate(target.trace(x)):
        shifted = columns + shift[..., l - 1, :, None] if l else columns
        r, q, delta = (size[..., None] for size in (_longest(columns), _longest(shifted), delta))
        scores, values = (norm[..., l, :] for norm in norms[:2])
        score_errors, value_errors = errors.query_key[..., l, :], errors.value_output[..., l, :]
        off = scores * delta * (r + delta + q) + score_errors * (r + delta) * (q + delta)
        delta = (values * (r * off.clamp(max=2) + delta) + value_errors * (r + delta)).sum(-1)
        columns = block.preactivations.relu()
    return norms.output * delta + errors.output * (_longest(columns) + delta)


def _longest(columns: Tensor) -> Tensor:
    """Norm of the longest column."""
    return torch.linalg.vector_norm(columns, dim=-2).amax(-1)
