"""Segments of a transformer: what lies between two of its non-linearities (chapter 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from .linear import LinearNetwork
from .transformer import Transformer


class Segment(NamedTuple):
    """Deep linear networks of equal layers: what a frozen and a target transformer do there.

    Attributes
    ----------
    frozen, target : of one batch shape: that of the transformers, followed by blocks and heads
        where there is a segment for each of them.
    """

    frozen: LinearNetwork
    target: LinearNetwork


class Segments(NamedTuple):
    """A transformer cut at its non-linearities, in coordinates in which nothing is absorbed.

    The tokens of block ``l`` are ``z = W_{2,l−1} y`` with ``y = a + c``, ``a`` the activations of
    the block before and ``W_{2,l−1} c = b_{2,l−1}`` (for the first block ``y`` is the input and the
    identity stands for ``W_2``). The target's are the same with its own weights, and both networks
    are equal when all of the following are, and ``c`` is.

    Attributes
    ----------
    query_key : scores are ``yᵀ M y`` with ``M = W_2ᵀ W_Kᵀ W_Q W_2``; ``[..., L, H]``.
    value_output : the ReLU receives ``Σ_h M_h y`` with ``M = W_1 W_O W_V W_2``; ``[..., L, H]``.
    output : ``W_out W_{2,L}``; ``[...]``.
    shift : ``c`` of the target, for all blocks but the first; ``[..., L − 1, D]``.
    """

    query_key: Segment
    value_output: Segment
    output: Segment
    shift: Float[Tensor, "*batch _ width"]


def segments(frozen: Transformer, target: Transformer) -> Segments:
    """The segments of two transformers, side by side.

    Raises `InputError` for transformers of different sizes or types, for a ReLU layer that is not
    as wide as the tokens, and for ``W_1`` or ``W_2`` singular in working precision: those of the
    frozen network, and the target's ``W_2`` of all blocks but the last.
    """
    _checks.kind(Transformer, frozen=frozen, target=target)
    batch = _check(frozen, target)
    for owner, network, kinds in (("", frozen, ("W_1", "W_2")), ("target's ", target, ("W_2",))):
        for kind in kinds:
            blocks = getattr(network, kind)
            _require_regular(owner + kind, blocks if kind == "W_1" else blocks[..., :-1, :, :])
    ours, theirs = _chains(frozen, batch), _chains(target, batch)
    shift = lowrank.solve(target.W_2[..., :-1, :, :], target.b_2[..., :-1, :, None])[..., 0]
    query_key, value_output, output = (Segment(*pair) for pair in zip(ours, theirs, strict=True))
    shift = shift.expand(*batch, *shift.shape[-2:])
    return Segments(query_key, value_output, output, shift)


def _chains(network: Transformer, batch: torch.Size) -> list[LinearNetwork]:
    width = network.width
    identity = torch.eye(width, dtype=network.dtype).expand(*network.batch_shape, 1, -1, -1)
    before = torch.cat([identity, network.W_2[..., :-1, :, :]], dim=-3)[..., None, :, :]
    after = network.W_1[..., None, :, :]
    chains = [
        [before, network.W_Q, network.W_K.mT, before.mT],
        [before, network.W_V, network.W_O, after],
    ]
    inner = [
        LinearNetwork([w.expand(*batch, *network.W_Q.shape[-4:-2], *w.shape[-2:]) for w in chain])
        for chain in chains
    ]
    outputs = (network.W_2[..., -1, :, :], network.W_out)
    return [*inner, LinearNetwork([w.expand(*batch, *w.shape[-2:]) for w in outputs])]


def _check(frozen: Transformer, target: Transformer) -> torch.Size:
    for side, size in frozen.sizes.items():
        if target.sizes[side] != size:
            raise InputError(
                f"target's {side}",
                allowed=f"{size}, as in the frozen network",
                given=target.sizes[side],
                remedy="segments are matched one to one, and adapters leave all sizes as they are",
            )
    _checks.like_frozen(target.dtype, frozen.dtype)
    if frozen.sizes["hidden"] != frozen.width:
        raise InputError(
            "W_1",
            allowed=f"square, with as many units as a token has coordinates ({frozen.width})",
            given=f"{frozen.sizes['hidden']} units",
            remedy="only then can adapters of the attention reach everything that the ReLU sees",
        )
    shapes = [tuple(network.batch_shape) for network in (frozen, target)]
    return _checks.common_shape("frozen and target", shapes)


def _require_regular(name: str, stack: Float[Tensor, "*batch blocks width width"]) -> None:
    if not stack.shape[-3]:
        return
    conditions = lowrank.condition_number(stack)
    limit = 1 / (stack.shape[-1] * torch.finfo(stack.dtype).eps)
    bad = (conditions > limit).nonzero()
    if len(bad):
        *member, block = bad[0].tolist()
        where = f" in batch member {tuple(member)}" if member else ""
        raise InputError(
            f"{name} of block {block + 1}{where}",
            allowed="non-singular",
            given=f"condition number {float(conditions[tuple(bad[0])]):.1e}",
            remedy="the theorem inverts it (chapter 4); perturb it",
        )
