"""What adapters of one part of the blocks leave far out [prop-floor-attention].

As tokens ``c n`` grow, norms see directions alone: what blocks add to them tends to a function of
``n``. Attention adds an affine map of it, feed-forward layers have kinks that no attention moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..errors import InputError
from ..networks.decoder import Decoder
from ..regression import reduced_rank


class _AttentionFloor(NamedTuple):
    value: Float[Tensor, "*batch"]
    standard_error: Float[Tensor, "*batch"]
    slope: Float[Tensor, "*batch width width"]
    offset: Float[Tensor, "*batch width"]


def attention_floor(
    frozen: Decoder,
    target: Decoder,
    tokens: Float[Tensor, "width samples"],
    ranks: int | Sequence[int] | None = None,
) -> _AttentionFloor:
    """Estimate ``min E‖Y(n) − K n − k‖² / D`` with ``Y(n) = lim_{c→∞} f̄(c n) − f(c n)``.

    The minimum is over matrices ``K`` of the given rank and vectors ``k``, for the mean over these
    directions. Returns the ``value`` and its ``standard_error``, the spread over tokens, and the
    best ``K`` and ``k`` as ``slope`` and ``offset``. Raises what `directions` raises, and
    `InputError` for too few tokens. Source: [prop-floor-attention], [thm-attention-rank].

    Parameters
    ----------
    tokens
        Directions as columns, more than ``m + 1``, which span the space of normalized tokens.
    ranks
        The total rank of all ``W_V`` and ``W_O``, or the rank of each of ``frozen.weights``, as by
        `Decoder.ranks`. By default any rank.
    frozen, target
        See `directions`.
    """
    n = directions(frozen, target, tokens)
    m, V, samples = target.dimension, target.basis(), n.shape[-1]
    rank, inner = sum(frozen.value_ranks(ranks).values()), V.mT @ n
    if samples <= m + 1:
        raise InputError("tokens", allowed=f"more than {m + 1}", given=samples)
    if lowrank.rank(inner - inner.mean(-1, keepdim=True)) < m:
        allowed = "of directions that span all that norms let through"
        raise InputError("tokens", allowed=allowed, given="some that do not")
    single = _sequences(n.mT[..., None], frozen, target)
    gap = (_added(target, single) - _added(frozen, single))[..., 0].movedim(0, -1)
    fit = reduced_rank(gap, inner, min(rank, m))
    left = (gap - fit.update.matrix() @ inner - fit.intercept[..., None]).square().mean(-2)
    slope = fit.update.matrix() @ V.mT
    return _AttentionFloor(left.mean(-1), left.std(-1) / samples**0.5, slope, fit.intercept)


def directions(
    frozen: Decoder, target: Decoder, tokens: Float[Tensor, "width samples"]
) -> Float[Tensor, "width samples"]:
    """Put tokens on the sphere ``‖n‖² = D`` of two networks' normalized tokens.

    Networks have residual connections, any depth and no final norm, and equal width, norm and
    activation; otherwise, and for tokens that a norm sends to 0, `InputError` is raised.
    """
    _require_one_sphere(frozen, target)
    v = target.as_inputs(tokens, "tokens")
    rounding = 16 * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    if target.settings.norm == "layer":
        v = v - v.mean(-2, keepdim=True)
    size = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    if not (size > rounding).all():
        raise InputError("tokens", allowed="of different coordinates", given="one without variance")
    return v / size * target.width**0.5


def _require_one_sphere(frozen: Decoder, target: Decoder) -> None:
    """Refuse networks without a limit for far tokens, and a pair whose spheres differ."""
    _checks.kind(Decoder, frozen=frozen, target=target)
    for name, network in (("frozen", frozen), ("target", target)):
        settings = network.settings
        if settings.norm is None or not settings.residual or settings.final_norm:
            # With a final norm outputs for far tokens differ less and less.
            words = "with residual connections and norms, but no final norm"
            remedy = "from_decoder can leave the final norm out" if settings.final_norm else ""
            raise InputError(name, allowed=words, given=network, remedy=remedy)
    target.require_like(frozen, ("norm", "activation"), ("width",))
    # On a circle or two points kinks of different units meet.
    _checks.integer("dimension of normalized tokens", target.dimension, 3)


def _sequences(x: Tensor, *networks: Decoder) -> Tensor:
    """Give sequences ``[samples, width, N]`` a dimension for each of the networks' batch."""
    batch = torch.broadcast_shapes(*(network.batch_shape for network in networks))
    return x.reshape(len(x), *[1] * len(batch), *x.shape[1:])


def _added(network: Decoder, n: Tensor) -> Tensor:
    """Compute what blocks add to far tokens of these directions."""
    # Far out, norms see directions alone.
    limit, added = network.replace(eps=0.0), torch.zeros_like(n)
    for l in range(network.depth):
        patterns = limit.patterns(limit.scores(l, n))
        added = added + (limit.attend(l, n, patterns) - n)
        added = added + (limit.feed_forward(l, n, limit.hidden(l, n)) - n)
    return added


def far_error(
    network: Decoder,
    target: Decoder,
    tokens: Float[Tensor, "width samples"],
    size: float,
    length: int = 1,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Measure the mean squared error at tokens ``c n``, ``‖n‖² = D``, and its standard error.

    Single tokens of all directions ``n``, or as many sequences of ``length`` drawn from them.
    A size ``c`` near ``1 / eps`` leaves few digits of what a network adds to it. Raises what
    `directions` raises.
    """
    n = directions(network, target, tokens)
    samples = n.shape[-1]
    x = size * n.mT[..., None]
    if length > 1:
        draw = randomness.generator(0, "far sequences")
        x = size * n.mT[torch.randint(samples, (samples, length), generator=draw)].mT
    x = _sequences(x, network, target)
    each = (network(x) - target(x)).square().mean((-2, -1))
    return each.mean(0), each.std(0) / len(x) ** 0.5
