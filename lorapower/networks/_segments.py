"""Transformers cut at their non-linearities [lem-segments], and with fused segments [def-fused]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isclose
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from .gap import Gap
from .layers import LinearNetwork, pad

if TYPE_CHECKING:
    from .transformer import Transformer

# The two factors of a segment of a head: the one that holds their product, and the other.
_FACTORS = {"query size": ("W_Q", "W_K"), "value size": ("W_O", "W_V")}

T = TypeVar("T")
S = TypeVar("S")


class Segments(Mapping[str, T]):
    """Something for each kind of segment; kinds are keys and attributes.

    Segments of a plain transformer multiply ``y``, where the tokens of block ``l`` are
    ``z = W_{2,l−1} y``, ``y = a + c``, with ``a`` the activations before and
    ``W_{2,l−1} c = b_{2,l−1}``; in the first block ``y`` is the input and ``W_2 = I``:

    - ``query_key``: scores are ``yᵀ M y``, ``M = W_2ᵀ W_Kᵀ W_Q W_2``; ``[..., L, H]``;
    - ``value_output``: the activation receives ``Σ_h M_h y``, ``M = W_1 W_O W_V W_2``;
      ``[..., L, H]``;
    - ``output``: ``W_out W_{2,L}``; ``[...]``.

    For any other transformer let ``B = diag(g) V``: ``V`` is an orthonormal basis of the space of
    normalized tokens, ``g`` the gains of the norm before; without norms ``B = I``. ``S = Vᵀ`` under
    a final LayerNorm, which ignores means; otherwise ``S = I``:

    - ``query_key``: scores are ``Bᵀ W_Kᵀ W_Q B``; ``[..., L, H]``;
    - ``value_output``: tokens receive ``S W_O W_V B``; ``[..., L, H]``;
    - ``inner``: the activation receives ``W_1 B``; ``[..., L]``;
    - ``up``, if gated: what it gives is multiplied by ``W_3 B``; ``[..., L]``;
    - ``outer``: tokens receive ``S W_2``; ``[..., L]``.

    Weights that several heads share, or that positions part, have a segment each:

    - ``query``, ``key`` in place of ``query_key`` for rotary positions or grouped heads: ``W_Q B``
      and ``W_K B``; ``[..., L, H]`` and ``[..., L, groups]``;
    - ``value``, ``sent`` in place of ``value_output`` for grouped heads: ``W_V B`` and ``S W_O``;
      ``[..., L, groups]`` and ``[..., L, H]``.

    Networks with equal segments and equal ``c`` or vectors are equal.
    """

    #: The adapted weights of each kind of segment, in the order in which they act.
    WEIGHTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
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
    #: How many dimensions, of blocks and heads, each kind of segment has.
    DIMENSIONS: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("query_key", "value_output", "query", "key", "value", "sent"), 2),
        **dict.fromkeys(("inner", "up", "outer"), 1),
        "output": 0,
    }

    def __init__(self, parts: Mapping[str, T]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> T:
        return self._parts[name]

    def __getattr__(self, name: str) -> T:
        if name.startswith("_") or name not in self._parts:
            raise AttributeError(name)
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return f"Segments({', '.join(f'{name}={part}' for name, part in self.items())})"

    def map(self, change: Callable[[str, T], S]) -> Segments[S]:
        """Apply a function to each name and part."""
        return Segments({name: change(name, part) for name, part in self.items()})

    def largest(self: Segments[Any]) -> Tensor:
        """The largest of a network's numbers, where each part is numbers; ``[...]``."""
        flat = []
        for name, part in self.items():
            dims = self.DIMENSIONS[name]
            flat.append(part.flatten(-dims).amax(-1) if dims else part)
        return torch.stack(torch.broadcast_tensors(*flat)).amax(0)


def cut(frozen: Transformer, target: Transformer, *, throw: bool) -> Segments[Gap]:
    """What `Transformer.segments` returns."""
    _require_alike(frozen, target)
    batch = torch.broadcast_shapes(frozen.batch_shape, target.batch_shape)
    if throw:
        for name, conditions, limit in inverted(frozen, target):
            _require_regular(name, conditions, limit)
    if frozen.is_plain:
        sides = [_plain(network, batch) for network in (frozen, target)]
    else:
        V = target.basis()
        first = second = V
        if target.norm is not None:
            first, second = target.g_1[..., None, :, None] * V, target.g_2[..., None] * V
        identity = torch.eye(frozen.width, dtype=V.dtype, device=V.device)
        into = identity[:, : target.width]
        narrower = target.width < frozen.width
        written = frozen.fill(identity[: target.width, : target.width])
        if target.final_norm and target.norm == "layer" and not narrower:
            identity = written = V.mT
        sides = [
            _of_tokens(frozen, into @ first, into @ second, identity, batch),
            _of_tokens(target, first, second, written, batch),
        ]
    return Segments({name: Gap(part, sides[1][name]) for name, part in sides[0].items()})


def require_alike(
    target: Transformer,
    frozen: Transformer,
    settings: Sequence[str],
    sides: Sequence[str] = (),
) -> None:
    """Refuse a target that differs from the frozen network in one of these settings or sizes."""
    for name in settings:
        given, allowed = getattr(target, name), getattr(frozen, name)
        if given != allowed:
            words = f"with {name} {allowed!r}, like the frozen network"
            raise InputError("target", allowed=words, given=given)
    for side in sides:
        size, allowed = target.sizes[side], frozen.sizes[side]
        if size != allowed:
            words = f"{allowed}, as in the frozen network"
            raise InputError(f"target's {side}", allowed=words, given=size)
    _checks.like_frozen(target, frozen)
    shapes = [tuple(network.batch_shape) for network in (frozen, target)]
    _checks.common_shape("frozen and target", shapes)


def inverted(
    frozen: Transformer, target: Transformer
) -> Iterator[tuple[str, Float[Tensor, "*batch _"], float]]:
    """Name, condition numbers and their limit for each kind of weight that is inverted."""
    if frozen.is_plain:
        limit = 1 / (frozen.width * torch.finfo(frozen.dtype).eps)
        first = slice(None, -1)
        yield "W_1", lowrank.condition_number(frozen.W_1), limit
        yield "W_2", lowrank.condition_number(frozen.W_2)[..., first], limit
        yield "target's W_2", lowrank.condition_number(target.W_2)[..., first], limit


class PairRanks(NamedTuple):
    """What two adapted factors ``X Y`` need for a target ``M``, and the ranks behind it."""

    #: Of the factor that acts first, of the other, and of both together.
    inner: Int[Tensor, "*batch"]
    outer: Int[Tensor, "*batch"]
    together: Int[Tensor, "*batch"]
    #: ``rank M``, ``rank(M − X Y)``, ``rank Y`` and ``rank X``.
    target: Int[Tensor, "*batch"]
    difference: Int[Tensor, "*batch"]
    rows: Int[Tensor, "*batch"]
    columns: Int[Tensor, "*batch"]
    #: Dimensions of ``Y ker M`` in ``ker X``, and of ``Xᵀ ker Mᵀ`` in ``ker Yᵀ``.
    hidden: Int[Tensor, "*batch"]
    hidden_outer: Int[Tensor, "*batch"]


def pair_ranks(gap: Gap) -> PairRanks:
    """What the middle two of four layers need [prop-narrow-heads]."""
    (Y, X), (Y_target, X_target) = gap.frozen.halves(), gap.target.halves()
    Q_Y, of_Y = torch.linalg.qr(Y_target.mT)
    Q_X, of_X = torch.linalg.qr(X_target)
    core, size, none = of_X @ of_Y.mT, Y.shape[-2], torch.zeros_like(gap.rank)
    scale = lowrank.norm(of_X) * lowrank.norm(of_Y)
    rank = lowrank.rank(core, scale=scale)
    of_frozen = lowrank.rank(Y), lowrank.rank(X)
    if size >= max(Y.shape[-1], X.shape[-2]):
        wide = none, none, gap.rank, rank, gap.rank, *of_frozen, none, none
        return PairRanks(*(r.expand_as(none) for r in wide))
    U, S, V = lowrank.svd(core)
    counts = torch.arange(S.shape[-1], device=S.device) < rank[..., None]
    full, kept = rank == size, counts[..., None, :]
    # Rounding of the product, as it turns its range.
    off = (scale / torch.where(counts, S, torch.inf).amin(-1)).clamp(min=1)
    Y, X = (_of_norm_one(side) for side in (Y, X))
    product = X @ Y

    def beside(exact: Tensor, turned: Tensor, frozen: Tensor) -> Tensor:
        """The rank of the target's rows or columns beside the frozen ones."""
        of_exact = _rank_beside(_of_norm_one(exact), frozen)
        return torch.where(full, of_exact, _rank_beside(turned * kept, frozen, off))

    sides = (Y_target.mT, Q_Y @ V, Y.mT, product.mT), (X_target, Q_X @ U, X, product)
    least, hidden = [], []
    for (exact, turned, own, both), of_own, of_other in zip(
        sides, of_frozen, of_frozen[::-1], strict=True
    ):
        seen = beside(exact, turned, own)
        least.append((seen - of_own).clamp(min=0))
        lost = (seen - beside(exact, turned, both)).clamp(min=0)
        hidden.append(torch.where(of_other == size, 0, lost))
    extra = (hidden[0] + hidden[1] + rank - size).clamp(min=0)
    ranks = (*least, gap.rank + extra, rank, gap.rank, *of_frozen, *hidden)
    return PairRanks(*(r.expand_as(none) for r in ranks))


def _of_norm_one(matrix: Tensor) -> Tensor:
    return (matrix / lowrank.norm(matrix)[..., None, None]).nan_to_num()


def _rank_beside(left: Tensor, right: Tensor, off: Tensor | float = 1.0) -> Int[Tensor, "*batch"]:
    """The rank of two matrices side by side, up to rounding that is larger by a factor."""
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    both = torch.cat([m.expand(*batch, *m.shape[-2:]) for m in (left, right)], dim=-1)
    return lowrank.rank(both, scale=off * lowrank.norm(both))


def fuse(network: Transformer, frozen: Transformer) -> Transformer:
    """What `Transformer.fuse` returns."""
    if network.gated or network.groups < network.heads or network.rotary is not None:
        raise InputError(
            "frozen",
            allowed="without gated layers, grouped heads and rotary positions",
            given=network,
            remedy="a fused network has no such parts; constructions.transformer.adapt takes them",
        )
    if network.is_plain and network.sizes["outputs"] > network.width:
        raise InputError(
            "frozen",
            allowed=f"of at most {network.width} outputs, the coordinates of a token",
            given=network.sizes["outputs"],
            remedy="fewer coordinates cannot hold a bias for all of them",
        )
    identity = torch.eye(network.width, dtype=network.dtype, device=network.device)
    parts = network.parts
    if network.is_plain:
        kept = frozen.W_2[:-1]
        turned = torch.linalg.solve(kept.mT, network.W_2[:-1].mT).mT
        before = torch.cat([identity[None], turned])[:, None]
        values = network.W_1[:, None] @ network.W_O @ network.W_V @ before
        parts |= {name: parts[name] @ before for name in ("W_Q", "W_K", "W_V")}
        last = pad(network.W_out @ network.W_2[-1], network.width)
        bias = pad(network.W_out @ network.b_2[-1, :, None], network.width)
        parts |= {
            "W_O": network.W_1[:, None] @ network.W_O,
            "W_1": identity.expand(network.depth, -1, -1),
            "W_2": torch.cat([kept, last[None]]),
            "b_2": torch.cat([torch.linalg.solve(turned, network.b_2[:-1]), bias.mT]),
            "W_out": identity[: network.sizes["outputs"]],
        }
    else:
        values = network.W_O @ network.W_V
    if not network.is_narrow("query size"):
        rows = network.sizes["query size"]
        scores = parts["W_K"].mT @ parts["W_Q"]
        if not network.is_plain:
            parts["b_Q"] = pad(network.W_K.mT @ network.b_Q[..., None], rows)[..., 0]
        parts |= {"W_Q": pad(scores, rows), "W_K": pad(identity.expand_as(scores), rows)}
    if not network.is_narrow("value size"):
        rows = network.sizes["value size"]
        parts |= {
            "W_O": pad(values.mT, rows).mT,
            "W_V": pad(identity.expand_as(values), rows),
        }
    return type(network)(**parts, **network.settings)


def fused_ranks(network: Transformer, ranks: Mapping[str, int]) -> tuple[int, ...]:
    """What `Transformer.fused_ranks` returns."""
    reach = dict(ranks)
    for side, (kept, gone) in _FACTORS.items():
        if not network.is_narrow(side):
            reach |= {kept: min(ranks[kept] + ranks[gone], network.width), gone: 0}
    if not network.is_plain:
        return tuple(reach[name.split()[0]] for name in network.weight_names)
    outputs = min(ranks["W_2"] + ranks["W_out"], network.sizes["outputs"])
    reach |= {"W_1": 0, "W_2": 0, "W_out": 0, f"W_2 of block {network.depth}": outputs}
    return tuple(reach.get(name, reach[name.split()[0]]) for name in network.weight_names)


def _plain(network: Transformer, batch: torch.Size) -> dict[str, LinearNetwork]:
    identity = torch.eye(network.width, dtype=network.dtype, device=network.device)
    identity = identity.expand(*network.batch_shape, 1, -1, -1)
    before = torch.cat([identity, network.W_2[..., :-1, :, :]], dim=-3)[..., None, :, :]
    after = network.W_1[..., None, :, :]
    of_heads = (*batch, network.depth, network.heads)
    return {
        "query_key": _chain(of_heads, before, network.W_Q, network.W_K.mT, before.mT),
        "value_output": _chain(of_heads, before, network.W_V, network.W_O, after),
        "output": _chain(batch, network.W_2[..., -1, :, :], network.W_out),
    }


def _of_tokens(
    network: Transformer, first: Tensor, second: Tensor, written: Tensor, batch: torch.Size
) -> dict[str, LinearNetwork]:
    of_blocks = (*batch, network.depth)
    of_heads, of_groups = (*of_blocks, network.heads), (*of_blocks, network.groups)
    parts = {}
    if network.rotary is not None or network.groups < network.heads:
        parts["query"] = _chain(of_heads, first, network.W_Q)
        parts["key"] = _chain(of_groups, first, network.W_K)
    else:
        parts["query_key"] = _chain(of_heads, first, network.W_Q, network.W_K.mT, first.mT)
    if network.groups < network.heads:
        parts["value"] = _chain(of_groups, first, network.W_V)
        parts["sent"] = _chain(of_heads, network.W_O, written)
    else:
        parts["value_output"] = _chain(of_heads, first, network.W_V, network.W_O, written)
    parts["inner"] = _chain(of_blocks, second, network.W_1)
    if network.gated:
        parts["up"] = _chain(of_blocks, second, network.W_3)
    return parts | {"outer": _chain(of_blocks, network.W_2, written)}


def _chain(batch: tuple[int, ...], *weights: Tensor) -> LinearNetwork:
    return LinearNetwork.unchecked([w.expand(*batch, *w.shape[-2:]) for w in weights])


def _require_alike(frozen: Transformer, target: Transformer) -> None:
    """Refuse two networks whose segments do not correspond."""
    settings = ("residual", "norm", "activation", "final_norm", "causal", "gated", "rotary")
    require_alike(target, frozen, settings)
    narrow = target.width < frozen.width and not frozen.is_plain
    for side, size in frozen.sizes.items():
        if target.sizes[side] != size and not (narrow and side == "width"):
            raise InputError(
                f"target's {side}",
                allowed=f"{size}, as in the frozen network",
                given=target.sizes[side],
                remedy="segments are matched one to one, and adapters leave all sizes as they are"
                if frozen.is_plain
                else "networks.rewriting.enlarge writes a smaller target as one of these sizes",
            )
    eps = target.eps * target.width / frozen.width
    if frozen.norm is not None and not isclose(frozen.eps, eps, rel_tol=1e-9):
        raise InputError("frozen", allowed=f"with eps {eps:.3g}, the target's", given=frozen.eps)
    if frozen.is_plain and frozen.sizes["hidden"] != frozen.width:
        raise InputError(
            "W_1",
            allowed=f"square, with as many units as a token has coordinates ({frozen.width})",
            given=f"{frozen.sizes['hidden']} units",
            remedy="only then can adapters of the attention reach everything that the ReLU sees",
        )


def _require_regular(name: str, conditions: Float[Tensor, "*batch _"], limit: float) -> None:
    bad = conditions > limit
    if bad.any():
        block = int(bad.reshape(-1, bad.shape[-1]).any(0).nonzero()[0])
        raise InputError(
            f"{name} of block {block + 1}{_checks.failed_members(bad[..., block])}",
            allowed="non-singular",
            given=f"condition number {float(conditions[..., block].max()):.1e}",
            remedy="the theorem inverts it; perturb it",
        )
