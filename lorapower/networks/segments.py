"""Segments of a transformer: what lies between two of its non-linearities [lem-segments]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from .gap import Gap
from .linear import LinearNetwork
from .transformer import Transformer

T = TypeVar("T")
# Ranks or errors.
NUMBERS = (*_checks.PRECISIONS, torch.int64)


class Segments(NamedTuple, Generic[T]):
    """A transformer cut at its non-linearities: something for each kind of segment.

    The tokens of block ``l`` are ``z = W_{2,l−1} y`` with ``y = a + c``, ``a`` the activations of
    the block before and ``W_{2,l−1} c = b_{2,l−1}`` (for the first block ``y`` is the input and the
    identity stands for ``W_2``). In these coordinates nothing is absorbed. The target's are the
    same with its own weights, and both networks are equal when all segments are, and ``c`` is.

    Attributes
    ----------
    query_key
        Scores are ``yᵀ M y`` with ``M = W_2ᵀ W_Kᵀ W_Q W_2``; ``[..., L, H]``.
    value_output
        The ReLU receives ``Σ_h M_h y`` with ``M = W_1 W_O W_V W_2``; ``[..., L, H]``.
    output
        ``W_out W_{2,L}``; ``[...]``.
    """

    query_key: T
    value_output: T
    output: T

    def largest(self: Segments[Any]) -> Tensor:
        """The largest of a network's numbers, where something is one number; ``[...]``."""
        for name, part in self._asdict().items():
            _checks.tensor(name, part, min_dims=0 if name == "output" else 2, types=NUMBERS)
        heads = torch.maximum(self.query_key, self.value_output).amax((-2, -1))
        return torch.maximum(heads, self.output)


def segments(frozen: Transformer, target: Transformer, *, throw: bool = True) -> Segments[Gap]:
    """The segments of a frozen against those of a target transformer.

    Raises `InputError` for transformers of different sizes or types, for a ReLU layer that is not
    as wide as the tokens, and, unless ``throw`` is false, where the two are not `regular`.
    """
    _checks.kind(Transformer, frozen=frozen, target=target)
    batch = _check(frozen, target)
    if throw:
        for name, conditions, limit in _inverted(frozen, target):
            _require_regular(name, conditions, limit)
    pairs = zip(_chains(frozen, batch), _chains(target, batch), strict=True)
    return Segments(*(Gap(ours, theirs) for ours, theirs in pairs))


def regular(frozen: Transformer, target: Transformer) -> Bool[Tensor, "*batch"]:
    """Whether what the theorem inverts is non-singular in working precision [ass-regular].

    That is, ``W_1`` and ``W_2`` of the frozen network, and the target's ``W_2`` of all blocks but
    the last.
    """
    _checks.kind(Transformer, frozen=frozen, target=target)
    parts = [(c <= limit).all(-1) for _, c, limit in _inverted(frozen, target)]
    return torch.stack(torch.broadcast_tensors(*parts)).all(0)


def missing_shift(target: Transformer) -> Float[Tensor, "*batch _ width"]:
    """``c`` with ``W_{2,l} c = b_{2,l}`` for all blocks but the last; ``[..., L − 1, D]``."""
    _checks.kind(Transformer, target=target)
    return lowrank.solve(target.W_2[..., :-1, :, :], target.b_2[..., :-1, :, None])[..., 0]


def _inverted(
    frozen: Transformer, target: Transformer
) -> Iterator[tuple[str, Float[Tensor, "*batch _"], float]]:
    """Name, condition numbers and their limit for each kind of weight that has to be inverted."""
    limit = 1 / (frozen.width * torch.finfo(frozen.dtype).eps)
    first = slice(None, -1)
    yield "W_1", lowrank.condition_number(frozen.W_1), limit
    yield "W_2", lowrank.condition_number(frozen.W_2)[..., first], limit
    yield "target's W_2", lowrank.condition_number(target.W_2)[..., first], limit


def _chains(network: Transformer, batch: torch.Size) -> list[LinearNetwork]:
    width = network.width
    identity = torch.eye(width, dtype=network.dtype, device=network.device)
    identity = identity.expand(*network.batch_shape, 1, -1, -1)
    before = torch.cat([identity, network.W_2[..., :-1, :, :]], dim=-3)[..., None, :, :]
    after = network.W_1[..., None, :, :]
    chains = [
        [before, network.W_Q, network.W_K.mT, before.mT],
        [before, network.W_V, network.W_O, after],
    ]
    inner = [
        LinearNetwork.unchecked(
            [w.expand(*batch, *network.W_Q.shape[-4:-2], *w.shape[-2:]) for w in chain]
        )
        for chain in chains
    ]
    outputs = (network.W_2[..., -1, :, :], network.W_out)
    return [*inner, LinearNetwork.unchecked([w.expand(*batch, *w.shape[-2:]) for w in outputs])]


def _check(frozen: Transformer, target: Transformer) -> torch.Size:
    for side, size in frozen.sizes.items():
        if target.sizes[side] != size:
            raise InputError(
                f"target's {side}",
                allowed=f"{size}, as in the frozen network",
                given=target.sizes[side],
                remedy="segments are matched one to one, and adapters leave all sizes as they are",
            )
    _checks.like_frozen(target, frozen)
    if frozen.sizes["hidden"] != frozen.width:
        raise InputError(
            "W_1",
            allowed=f"square, with as many units as a token has coordinates ({frozen.width})",
            given=f"{frozen.sizes['hidden']} units",
            remedy="only then can adapters of the attention reach everything that the ReLU sees",
        )
    shapes = [tuple(network.batch_shape) for network in (frozen, target)]
    return _checks.common_shape("frozen and target", shapes)


def _require_regular(name: str, conditions: Float[Tensor, "*batch _"], limit: float) -> None:
    bad = conditions > limit
    if bad.any():
        block = (
            int(bad.flatten(0, -2).any(0).nonzero()[0]) if bad.ndim > 1 else int(bad.nonzero()[0])
        )
        raise InputError(
            f"{name} of block {block + 1}{_checks.failed_members(bad[..., block])}",
            allowed="non-singular",
            given=f"condition number {float(conditions[..., block].max()):.1e}",
            remedy="the theorem inverts it; perturb it",
        )
