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

    With ``X Y`` the frozen, ``X̄ Ȳ`` the target product, cut in the middle where ``d`` units stand:
    ``rank[Ȳ; Y] − d``, ``rank[X̄, X] − d``, and ``rank(X̄ Ȳ − X Y)`` for both together. The first
    two are 0 for heads that are not narrower than the tokens. They are necessary where ``X̄`` and
    ``Ȳ`` have rank ``d``.
    Source: [prop-narrow-heads].
    """
    _checks.kind(Gap, gap=gap)
    (Y, X), (Y_target, X_target) = gap.frozen.halves(), gap.target.halves()
    size = Y.shape[-2]
    inner = _rank_beside(Y_target.mT, Y.mT) - size
    outer = _rank_beside(X_target, X) - size
    return PairRanks(inner.clamp(min=0), outer.clamp(min=0), gap.rank)


def _rank_beside(left: Tensor, right: Tensor) -> Int[Tensor, "*batch"]:
    sides = [m / lowrank.norm(m)[..., None, None] for m in (left, right)]
    return lowrank.rank(torch.cat(sides, dim=-1).nan_to_num())


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
