"""Transformers cut at their non-linearities [lem-segments]."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Generic, NamedTuple, TypeVar, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from .decoder import Decoder
from .gap import Gap
from .layers import LinearNetwork
from .transformer import Transformer

T = TypeVar("T")
AnyTransformer = Transformer | Decoder

#: The adapted weights of each segment, in the order in which they act.
ADAPTED: dict[str, tuple[str, ...]] = {
    "query_key": ("W_Q", "W_K"),
    "value_output": ("W_V", "W_O"),
    "query": ("W_Q",),
    "key": ("W_K",),
    "value": ("W_V",),
    "sent": ("W_O",),
    "inner": ("W_1",),
    "up": ("W_3",),
    "outer": ("W_2",),
    "output": ("W_2", "W_out"),
}
#: How many dimensions, of blocks and heads, the numbers of each segment have.
DIMENSIONS = dict.fromkeys(ADAPTED, 2) | {"inner": 1, "up": 1, "outer": 1, "output": 0}


def parts_of(segments: tuple[Any, ...]) -> dict[str, Any]:
    """Return what there is of some `PlainSegments` or `DecoderSegments`, by the segment's name."""
    named: Any = segments
    return {name: part for name, part in named._asdict().items() if part is not None}


def _largest(segments: tuple[Any, ...]) -> Tensor:
    flat = []
    for name, part in parts_of(segments).items():
        dims = DIMENSIONS[name]
        flat.append(part.flatten(-dims).amax(-1) if dims else part)
    return torch.stack(torch.broadcast_tensors(*flat)).amax(0)


class PlainSegments(NamedTuple, Generic[T]):
    """Something for each segment of a `Transformer`.

    Segments multiply ``y``, where the tokens of block ``l`` are ``z = W_{2,l−1} y``,
    ``y = a + c``, with ``a`` the activations before and ``W_{2,l−1} c = b_{2,l−1}``; in the first
    block ``y`` is the input and ``W_2 = I``. Networks with equal segments and equal ``c`` are
    equal.

    Attributes
    ----------
    query_key
        Scores are ``yᵀ M y``, ``M = W_2ᵀ W_Kᵀ W_Q W_2``; ``[..., L, H]``.
    value_output
        The activation receives ``Σ_h M_h y``, ``M = W_1 W_O W_V W_2``; ``[..., L, H]``.
    output
        ``W_out W_{2,L}``; ``[...]``.
    """

    query_key: T
    value_output: T
    output: T

    def largest(self) -> Tensor:
        """Find the largest of a network's numbers, where each part is numbers; ``[...]``."""
        return _largest(self)


class DecoderSegments(NamedTuple, Generic[T]):
    """Something for each segment of a `Decoder`; ``None`` for those that it does not have.

    Let ``B = diag(g) V``: ``V`` is an orthonormal basis of the space of normalized tokens, ``g``
    the gains of the norm before; without norms ``B = I``. ``S = Vᵀ`` under a final LayerNorm, which
    ignores means; otherwise ``S = I``. Weights that several heads share, or that rotations
    separate, have a segment each. Networks with equal segments and equal vectors are equal.

    Attributes
    ----------
    query_key
        Scores are ``Bᵀ W_Kᵀ W_Q B``; ``[..., L, H]``.
    query, key
        With rotary positions or grouped heads instead: ``W_Q B`` and ``W_K B``; ``[..., L, H]`` and
        ``[..., L, groups]``.
    value_output
        Tokens receive ``S W_O W_V B``; ``[..., L, H]``.
    value, sent
        With grouped heads instead: ``W_V B`` and ``S W_O``; ``[..., L, groups]`` and
        ``[..., L, H]``.
    inner
        The activation receives ``W_1 B``; ``[..., L]``.
    up
        If gated, the activation is multiplied by ``W_3 B``; ``[..., L]``.
    outer
        Tokens receive ``S W_2``; ``[..., L]``.
    """

    query_key: T | None = None
    query: T | None = None
    key: T | None = None
    value_output: T | None = None
    value: T | None = None
    sent: T | None = None
    inner: T | None = None
    up: T | None = None
    outer: T | None = None

    def largest(self) -> Tensor:
        """Find the largest of a network's numbers, where each part is numbers; ``[...]``."""
        return _largest(self)


Segments = PlainSegments[T] | DecoderSegments[T]


@overload
def segments(
    frozen: Transformer, target: Transformer, *, throw: bool = True
) -> PlainSegments[Gap]: ...
@overload
def segments(frozen: Decoder, target: Decoder, *, throw: bool = True) -> DecoderSegments[Gap]: ...
def segments(frozen: Any, target: Any, *, throw: bool = True) -> Segments[Gap]:
    """Cut two transformers into the linear maps between non-linearities [lem-segments].

    Segments of a `Decoder` use the target's gains, which the adapted network takes on.

    Raises `InputError` for transformers of different kinds, sizes, types or settings; for a
    `Transformer` also where the feed-forward layer is not as wide as the tokens and, unless
    ``throw`` is false, where `is_regular` fails.
    """
    _checks.kind(Transformer, Decoder, frozen=frozen)
    _checks.kind(type(frozen), target=target)
    _require_alike(frozen, target)
    batch = torch.broadcast_shapes(frozen.batch_shape, target.batch_shape)
    if throw:
        for name, conditions in _inverted(frozen, target).items():
            bad = conditions > _largest_condition(frozen)
            if bad.any():
                block = int(bad.reshape(-1, bad.shape[-1]).any(0).nonzero()[0])
                raise InputError(
                    f"{name} of block {block + 1}{_checks.failed_members(bad[..., block])}",
                    allowed="non-singular",
                    given=f"condition number {float(conditions[..., block].max()):.1e}",
                    remedy="the theorem inverts it; perturb it",
                )
    if isinstance(target, Transformer):
        sides: list[Any] = [_cut_plain(network, batch) for network in (frozen, target)]
    else:
        first, second = target.readings
        ignores_means = target.settings.final_norm and target.settings.norm == "layer"
        written = target.basis().mT if ignores_means else torch.eye(target.width).to(first)
        sides = [_cut(network, first, second, written, batch) for network in (frozen, target)]
    gaps = {name: Gap(part, getattr(sides[1], name)) for name, part in parts_of(sides[0]).items()}
    return type(sides[0])(**gaps)


def is_regular(frozen: AnyTransformer, target: AnyTransformer) -> Bool[Tensor, "*batch"]:
    """Say whether the weights that the theorem inverts are non-singular [ass-regular].

    In a `Transformer` ``W_1``, ``W_2`` and the target's ``W_2`` of all blocks but the last.
    """
    limit, batch = _largest_condition(frozen), (frozen.batch_shape, target.batch_shape)
    good = torch.ones(torch.broadcast_shapes(*batch), dtype=torch.bool).to(frozen.device)
    for conditions in _inverted(frozen, target).values():
        good = good & (conditions <= limit).all(-1)
    return good


def _largest_condition(network: AnyTransformer) -> float:
    return 1 / (network.width * torch.finfo(network.dtype).eps)


def _inverted(
    frozen: AnyTransformer, target: AnyTransformer
) -> dict[str, Float[Tensor, "*batch _"]]:
    """Compute condition numbers of each kind of weight that is inverted."""
    if isinstance(frozen, Decoder):
        return {}
    return {
        "W_1": lowrank.condition_number(frozen.W_1),
        "W_2": lowrank.condition_number(frozen.W_2)[..., :-1],
        "target's W_2": lowrank.condition_number(target.W_2)[..., :-1],
    }


def _cut_plain(network: Transformer, batch: torch.Size) -> PlainSegments[LinearNetwork]:
    identity = torch.eye(network.width).to(network.W_2).expand(*network.batch_shape, 1, -1, -1)
    before = torch.cat([identity, network.W_2[..., :-1, :, :]], dim=-3)[..., None, :, :]
    after = network.W_1[..., None, :, :]
    of_heads = (*batch, network.depth, network.heads)
    return PlainSegments(
        query_key=_chain(of_heads, before, network.W_Q, network.W_K.mT, before.mT),
        value_output=_chain(of_heads, before, network.W_V, network.W_O, after),
        output=_chain(batch, network.W_2[..., -1, :, :], network.W_out),
    )


def _cut(
    network: Decoder, first: Tensor, second: Tensor, written: Tensor, batch: torch.Size
) -> DecoderSegments[LinearNetwork]:
    """Make segments that read through both norms' matrices and write through ``written``."""
    of_blocks = (*batch, network.depth)
    of_heads, of_groups = (*of_blocks, network.heads), (*of_blocks, network.groups)
    grouped = network.groups < network.heads
    parts = {}
    if grouped or network.settings.rotary is not None:
        parts["query"] = _chain(of_heads, first, network.W_Q)
        parts["key"] = _chain(of_groups, first, network.W_K)
    else:
        parts["query_key"] = _chain(of_heads, first, network.W_Q, network.W_K.mT, first.mT)
    if grouped:
        parts["value"] = _chain(of_groups, first, network.W_V)
        parts["sent"] = _chain(of_heads, network.W_O, written)
    else:
        parts["value_output"] = _chain(of_heads, first, network.W_V, network.W_O, written)
    parts["inner"] = _chain(of_blocks, second, network.W_1)
    if network.settings.gated:
        parts["up"] = _chain(of_blocks, second, network.W_3)
    parts["outer"] = _chain(of_blocks, network.W_2, written)
    return DecoderSegments(**parts)


def _chain(batch: tuple[int, ...], *weights: Tensor) -> LinearNetwork:
    return LinearNetwork([w.expand(*batch, *w.shape[-2:]) for w in weights], checked=False)


def _require_alike(frozen: AnyTransformer, target: AnyTransformer) -> None:
    """Refuse two networks whose segments do not correspond."""
    names = [field.name for field in fields(frozen.settings)]
    if isinstance(frozen, Decoder) and frozen.settings.norm is None:
        names.remove("eps")
    target.require_like(frozen, names)
    for side, size in frozen.sizes.items():
        if target.sizes[side] != size:
            raise InputError(
                f"target's {side}",
                allowed=f"{size}, as in the frozen network",
                given=target.sizes[side],
                remedy="segments are matched one to one, and adapters leave all sizes as they are",
            )
    if isinstance(frozen, Transformer) and frozen.sizes["hidden"] != frozen.width:
        raise InputError(
            "W_1",
            allowed=f"square, with as many units as a token has coordinates ({frozen.width})",
            given=f"{frozen.sizes['hidden']} units",
            remedy="only then can adapters of the attention reach everything that the ReLU sees",
        )
