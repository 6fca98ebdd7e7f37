"""Ranks and errors of adapted transformers with residual connections and normalization."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..networks.gap import Gap
from ..networks.residual.network import ACTIVATIONS, Norm, ResidualTransformer
from ..networks.residual.rewriting import basis
from ..networks.residual.segments import ResidualSegments, residual_segments
from .transformer import pair_ranks

# How many dimensions the sphere of normalized tokens needs, for the statements on ReLUs.
LEAST = 3


def ranks(frozen: ResidualTransformer, target: ResidualTransformer) -> ResidualSegments[Tensor]:
    """The rank on each weight of each segment with which it is exact, gains and biases tuned.

    Of attention for each head, ``[..., L, H]``, and of ``inner`` and ``outer``, ``[..., L]``:
    `constructions.residual.adapt` takes them as they are.

    ``⌈rank(E)/2⌉`` for the two of a segment of attention, more only where heads are narrower than
    the tokens (`pair_ranks`), and ``rank E`` for ``W_1`` and ``W_2``, with ``E`` the difference of
    target and frozen segment (`networks.residual.residual_segments`). Raises what that raises.
    Source: [thm-residual].
    """
    cut = residual_segments(frozen, target)

    def equal(gap: Gap) -> Tensor:
        least = pair_ranks(gap)
        return torch.stack([least.inner, least.outer, -(-least.together // 2)]).amax(0)

    return ResidualSegments(
        equal(cut.query_key), equal(cut.value_output), cut.inner.rank, cut.outer.rank
    )


def inner_rank(
    width: int,
    hidden: int,
    *,
    activation: Literal["relu", "gelu", "silu"] = "relu",
    norm: Norm = "layer",
    gains: bool = True,
) -> int:
    """A rank that ``W_1`` of every block needs for exactness, for almost all frozen weights.

    The least ``r`` with ``(F − r)(m − r) ≤ F``, or ``≤ F + D − 1`` where gains are tuned, for
    ReLUs; with ``≤ 0``, or ``≤ D``, for the others; ``m = D − 1`` under a LayerNorm, ``D`` under
    an RMSNorm. It is ``m − 1`` for ReLUs and ``m`` for the others as soon as there are enough
    hidden units, and then it is attained (`networks.residual.aligned`). Target and frozen network
    are of one depth and of equally many hidden units; no two normals in a block of the target are
    parallel.

    Raises `InputError` where the sphere of normalized tokens has fewer than three dimensions.

    Source: [thm-inner-rank].

    Parameters
    ----------
    width, hidden : int
        ``D`` and ``F``.
    activation : {"relu", "gelu", "silu"}
        ``"relu"``, ``"gelu"`` or ``"silu"``; nothing is proved of GELU's approximation.
    gains : bool
        Whether they are tuned.
    """
    width, hidden = _checks.integer("width", width, 1), _checks.integer("hidden", hidden, 1)
    _checks.choice("activation", activation, ("relu", "gelu", "silu"))
    _checks.choice("norm", norm, get_args(Norm))
    gains = _checks.flag("gains", gains)
    m = width - (norm == "layer")
    _require_sphere(m, width)
    free = hidden + gains * (width - 1) if activation == "relu" else gains * width
    return next(r for r in range(m + 1) if (hidden - r) * (m - r) <= free or r >= hidden)


class AttentionFloor(NamedTuple):
    """What is left where only attention is adapted.

    Attributes
    ----------
    value : Tensor
        ``min E‖Δ(n) − M n − m‖² / D`` over matrices ``M`` and vectors ``m``; ``[...]``.
    standard_error : Tensor
        Of the value, from the spread over tokens.
    slope, offset : Tensor
        The best ``M``, ``[..., D, D]``, and ``m``, ``[..., D]``.
    """

    value: Float[Tensor, "*batch"]
    standard_error: Float[Tensor, "*batch"]
    slope: Float[Tensor, "*batch width width"]
    offset: Float[Tensor, "*batch width"]


def attention_floor(
    frozen: ResidualTransformer,
    target: ResidualTransformer,
    tokens: Float[Tensor, "width samples"],
) -> AttentionFloor:
    """The least mean squared error, far out, of single tokens where feed-forward layers are frozen.

    Whatever is done to attention, at any rank, and to ``b_O`` and ``b_2``: as tokens ``c v`` grow,
    the error is in the limit at least that of the best affine map in place of ``Δ(n) = Σ_l [M̄LP_l
    − MLP_l](n)``, on the directions ``n`` of the tokens. It bounds the largest error over the
    sizes of tokens, and so over any set of inputs with single tokens of all sizes; not the mean
    over inputs of one size. The value is that of a least-squares fit, corrected for its degrees of
    freedom.

    Raises `InputError` for networks that do not fit, for too few tokens, and for one that is
    constant, which has no direction.

    Source: [prop-floor-attention].

    Parameters
    ----------
    frozen, target : ResidualTransformer
        Of equal width, norm and activation, without a final norm; of any depth.
    tokens : Tensor
        Directions as columns, more than ``m + 1`` of them, which span the space of normalized
        tokens.
    """
    n = directions(frozen, target, tokens)
    gap = _far(target, n) - _far(frozen, n)
    inner = torch.cat([basis(target).mT @ n, torch.ones_like(n[..., :1, :])], -2)
    samples, count = inner.shape[-1], inner.shape[-2]
    if samples <= count:
        raise InputError("tokens", allowed=f"more than {count}", given=samples)
    if lowrank.rank(inner) < count:
        allowed = "of directions that span all that norms let through"
        raise InputError("tokens", allowed=allowed, given="some that do not")
    batch = gap.shape[:-2]
    fit = torch.linalg.lstsq(inner.mT.expand(*batch, -1, -1), gap.mT).solution.mT
    left = (gap - fit @ inner).square().mean(-2)
    value = left.sum(-1) / (samples - count)
    return AttentionFloor(
        value,
        left.std(-1) / samples**0.5,
        fit[..., :-1] @ basis(target).mT,
        fit[..., -1],
    )


def directions(
    frozen: ResidualTransformer, target: ResidualTransformer, tokens: Float[Tensor, "width samples"]
) -> Float[Tensor, "width samples"]:
    """Tokens on the sphere ``‖n‖² = D``; raises `InputError` for networks that have none alike."""
    _checks.kind(ResidualTransformer, frozen=frozen, target=target)
    for name, network in (("frozen", frozen), ("target", target)):
        if network.final_norm:
            raise InputError(
                name,
                allowed="without a final norm",
                given="one",
                remedy="with it outputs for far tokens differ less and less; "
                "from_decoder can leave it out",
            )
    for aspect in ("norm", "activation", "width"):
        own, wanted = getattr(target, aspect), getattr(frozen, aspect)
        if own != wanted:
            raise InputError("target", allowed=f"with {aspect} {wanted!r}", given=own)
    _checks.like_frozen(target, frozen)
    _require_sphere(target.dimension, target.width)
    v = target.as_inputs(tokens, "tokens")
    if v.ndim != 2:
        raise InputError("tokens", allowed="of shape [width, samples]", given=tuple(v.shape))
    shapes = [tuple(network.batch_shape) for network in (frozen, target)]
    _checks.common_shape("frozen and target", shapes)
    rounding = 16 * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    if target.norm == "layer":
        v = v - v.mean(-2, keepdim=True)
    size = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    if not (size > rounding).all():
        raise InputError("tokens", allowed="of different coordinates", given="one without variance")
    return v / size * target.width**0.5


def _far(network: ResidualTransformer, n: Tensor) -> Tensor:
    """What all feed-forward layers add to a far token of this direction, but for ``b_2``."""
    added = torch.zeros_like(n)
    for l in range(network.depth):
        reads = network.g_2[..., l, :, None] * n + network.s_2[..., l, :, None]
        hidden = network.W_1[..., l, :, :] @ reads + network.b_1[..., l, :, None]
        added = added + network.W_2[..., l, :, :] @ ACTIVATIONS[network.activation](hidden)
    return added


def _require_sphere(m: int, width: int) -> None:
    if m < LEAST:
        raise InputError(
            "width",
            allowed=f"such that normalized tokens span at least {LEAST} dimensions",
            given=f"{width}, with {m}",
            remedy="on a circle or two points kinks of different units meet",
        )
