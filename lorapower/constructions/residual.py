"""Residual transformers cut at their norms and non-linearities [thm-residual]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks, lowrank
from .._subnormal import flushing
from ..adapters.core import Adapters
from ..bounds import residual as residual_bounds
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.gap import Gap
from ..networks.residual.network import ResidualTransformer
from ..networks.residual.rewriting import basis
from ..networks.residual.segments import ResidualSegments, residual_segments
from . import heads, linear
from .linear import Adaptation


@dataclass(frozen=True, eq=False, repr=False)
class ResidualAdaptation(Adaptation):
    """Adapters, biases, gains and shifts of a residual transformer, with the evidence for them.

    Success speaks of rounding, and of narrow heads and query biases, not of ranks that are too low
    otherwise: where all of ``errors`` are 0 but for rounding, the networks are equal.

    Attributes
    ----------
    query_key, value_output : LinearAdaptation
        What was done in each head's segments; ``[..., L, H]``.
    errors : ResidualSegments
        Distance ``‖M̂ − M̄‖_2`` of each adapted segment from the target's: the predicted one, 0
        where the rank suffices, plus the measured rounding error of attention.
    """

    query_key: linear.LinearAdaptation
    value_output: linear.LinearAdaptation
    errors: ResidualSegments[Tensor]


@torch.no_grad()
@flushing()
def adapt(
    frozen: ResidualTransformer,
    target: ResidualTransformer,
    ranks: int | Mapping[str, int] | ResidualSegments[Tensor],
    *,
    rtol: float | None = None,
    throw: bool = True,
    seed: int = 0,
) -> ResidualAdaptation:
    """Adapters that make a residual transformer imitate another, segment by segment.

    Gains and shifts become the target's. Then each segment (`networks.residual.residual_segments`)
    comes as near to the target's as its ranks allow: those of attention by the construction for
    linear networks, or exactly for narrow heads; ``ΔW_1 = LR_R(E) B⁺`` and ``ΔW_2 = Sᵀ LR_R(E)``.
    What a weight makes of the target's shifts goes to the biases: ``b̂_1 = b̄_1 + (W̄_1 − Ŵ_1) s̄_2``,
    ``b̂_O = b̄_O + Σ_h (M̄ − M̂) s̄_1``, and ``b̂_Q`` such that ``(Ŵ_K B)ᵀ (Ŵ_Q s̄_1 + b̂_Q)`` is the
    target's.

    Source: [thm-residual].

    Parameters
    ----------
    frozen, target : ResidualTransformer
        Of equal sizes and type, or a target of narrower tokens, which then stand among the frozen's
        (`networks.residual.ResidualTransformer.filled`); batch shapes broadcast. See
        `networks.residual.enlarged` for a smaller one, and beside it ``relabelled`` and ``aligned``
        for what lowers the ranks, ``with_gains`` for gains that stay.
    ranks : int or mapping or ResidualSegments
        One for all, of which no weight takes more than its smaller side; or one for each of ``W_Q,
        W_K, W_V, W_O, W_1, W_2``, of every head and block; or what `bounds.residual.ranks` returns,
        of whose kinds the largest are taken.
    rtol : float, optional
        Largest acceptable rounding error of a segment of attention, relative to the product of the
        norms of its factors plus that of the target's; by default half of the digits.
    throw : bool
        Raise an error where a member of the batch is not adapted acceptably, or else go on and say
        so in ``success``: narrow heads then come as near as their ranks allow.
    seed : int
        Of random rotations.

    Raises
    ------
    InputError
        Ranks out of range; transformers that do not fit; heads narrower than the tokens with less
        rank than their exact adaptation needs (`bounds.residual.ranks`), or wider than a narrower
        target's; a target whose ``Bᵀ W_Kᵀ W_Q B`` is so singular that no query bias completes its
        scores.
    SingularError
        A segment of attention is not reached within ``rtol``; names it.
    """
    throw = _checks.flag("throw", throw)
    _require_heads(frozen, target)
    cut = residual_segments(frozen, target)
    if isinstance(ranks, ResidualSegments):
        pairs = zip(ranks, (("W_Q", "W_K"), ("W_V", "W_O"), ("W_1",), ("W_2",)), strict=True)
        ranks = {name: int(part.max()) for part, names in pairs for name in names}
    each = heads.ranks_by_name(ranks, frozen, frozen.weight_kinds)
    parts = [
        (gap, {inner: each[inner], outer: each[outer]}, words)
        for gap, inner, outer, words in (
            (cut.query_key, "W_Q", "W_K", "query–key"),
            (cut.value_output, "W_V", "W_O", "value–output"),
        )
    ]
    for gap, pair, _ in parts if throw else ():
        heads.require_ranks(gap, pair)
    query_key, value_output = (
        heads.adapt(*part, rtol=rtol, throw=throw, seed=seed) for part in parts
    )
    _, of_Q, of_KT, _ = query_key.adapters.updates
    _, of_V, of_O, _ = value_output.adapters.updates
    stacks = {"W_Q": of_Q, "W_K": LowRank(of_KT.right, of_KT.left), "W_V": of_V, "W_O": of_O}
    inner, outer = cut.inner.best(each["W_1"]), cut.outer.best(each["W_2"])
    back = torch.linalg.pinv(cut.inner.frozen.weights[0]).mT
    stacks["W_1"] = LowRank(inner.left, back @ inner.right)
    stacks["W_2"] = LowRank(cut.outer.frozen.weights[1].mT @ outer.left, outer.right)
    updates = [one for name, stack in stacks.items() for one in _singles(name, stack, frozen)]
    plain = Adapters(tuple(updates)).merge(frozen)
    tuned, missed, wanted = _vectors(plain, frozen, target, cut)
    query_key = _completed(query_key, cut.query_key, missed, wanted, rtol, throw)
    adapters = Adapters(
        tuple(updates), tuple(b - a for a, b in zip(frozen.biases, tuned.biases, strict=True))
    )
    success = (query_key.success & value_output.success).all((-2, -1))
    errors = ResidualSegments(
        query_key.spectral_error + query_key.rounding_error,
        value_output.spectral_error + value_output.rounding_error,
        cut.inner.error(each["W_1"]),
        cut.outer.error(each["W_2"]),
    )
    return ResidualAdaptation(adapters, success, query_key, value_output, errors)


@torch.no_grad()
def attention_only(
    frozen: ResidualTransformer, target: ResidualTransformer, tokens: Float[Tensor, "width samples"]
) -> Adapters:
    """Adapters of attention alone, and ``b_O``, with the least error far out on single tokens.

    The ``W_O`` of the first head of the first block takes on, at any rank, the affine map that
    `bounds.residual.attention_floor` finds, and what attention of both networks adds to far tokens.
    As tokens grow their error tends to the floor.

    Raises what `bounds.residual.attention_floor` raises, and `InputError` for batches and for heads
    narrower than the tokens.

    Source: [prop-floor-attention].
    """
    best = residual_bounds.attention_floor(frozen, target, tokens)
    if best.value.ndim:
        raise InputError("frozen and target", allowed="one of each", given="a batch")
    if frozen.sizes["value size"] < frozen.width:
        raise InputError(
            "frozen",
            allowed="with heads as wide as the tokens",
            given=frozen.sizes["value size"],
            remedy="narrower ones cannot add every linear map",
        )
    V = basis(frozen)
    read = frozen.g_1[0][:, None] * V
    for name, matrix in (("W_V", frozen.W_V[0, 0].mT), ("first gains", read)):
        if lowrank.rank(matrix) < matrix.shape[-1]:
            raise InputError(
                f"frozen's {name} of block 1",
                allowed="of full rank",
                given="one that hides directions",
                remedy="perturb it",
            )
    slope, offset = best.slope, best.offset
    for network, sign in ((target, 1), (frozen, -1)):
        M = (network.W_O @ network.W_V).sum(-3)
        slope = slope + sign * (M * network.g_1[:, None]).sum(0)
        moved = (M @ network.s_1[..., None])[..., 0] + network.b_O + network.b_2
        offset = offset + sign * moved.sum(0)
    K = slope @ V @ torch.linalg.pinv(read)
    first = frozen.W_V[0, 0]
    updates = [LowRank(w[:, :0], w.mT[:, :0]) for w in frozen.weights]
    place = frozen.weight_names.index("W_O of block 1, head 1")
    one = torch.eye(len(first), dtype=first.dtype, device=first.device)
    updates[place] = LowRank(K @ torch.linalg.pinv(first), one)
    changes = [torch.zeros_like(b) for b in frozen.biases]
    changes[frozen.bias_names.index("b_O of block 1")] = offset - K @ frozen.s_1[0]
    return Adapters(tuple(updates), tuple(changes))


def _singles(name: str, stack: LowRank, network: ResidualTransformer) -> list[LowRank]:
    if "heads" in network.SHAPES[name]:
        return heads.one_by_one(stack)
    pairs = zip(stack.left.unbind(-3), stack.right.unbind(-3), strict=True)
    return [LowRank(*pair) for pair in pairs]


def _require_heads(frozen: ResidualTransformer, target: ResidualTransformer) -> None:
    _checks.kind(ResidualTransformer, frozen=frozen, target=target)
    for side in ("query size", "value size"):
        size = frozen.sizes[side]
        if target.dimension < size < frozen.width and target.width < frozen.width:
            raise InputError(
                f"frozen's {side}",
                allowed=f"at most {target.dimension}, as a narrower target reads, or at least "
                f"{frozen.width}",
                given=size,
                remedy="no construction covers heads in between",
            )


def _completed(
    found: linear.LinearAdaptation,
    gap: Gap,
    missed: Float[Tensor, "*batch blocks heads"],
    wanted: Float[Tensor, "*batch blocks heads"],
    rtol: float | None,
    throw: bool,
) -> linear.LinearAdaptation:
    """The adaptation with what query biases missed of what is wanted among its rounding errors."""
    rounding = found.rounding_error + missed
    limit = torch.finfo(missed.dtype).eps ** 0.5 if rtol is None else rtol
    # Below the threshold the biases make up for the nearest that is reached.
    exact = found.spectral_error <= gap.noise
    bad = exact & (missed > limit * (gap.rounding_scale + wanted))
    if throw and bad.any():
        block, head = bad.reshape(-1, *bad.shape[-2:]).nonzero()[0].tolist()[-2:]
        raise InputError(
            f"target's query–key product of block {block + 1}, head {head + 1}",
            allowed="non-singular on what norms let through",
            given=f"one whose scores no query bias completes, by {float(missed.max()):.1e}",
            remedy="perturb the target's W_Q and W_K",
        )
    return replace(found, rounding_error=rounding, success=found.success & ~bad)


def _vectors(
    plain: ResidualTransformer,
    frozen: ResidualTransformer,
    target: ResidualTransformer,
    cut: ResidualSegments[Gap],
) -> tuple[ResidualTransformer, Tensor, Tensor]:
    """Adapted weights with the target's gains and shifts, and biases that make up for the rest.

    And what the biases of queries do not make up for, in each head, and of how much.
    """
    extra = frozen.width - target.width

    def widened(vector: Tensor) -> Tensor:
        return pad(vector, (0, extra))

    shifts = [widened(s) for s in (target.s_1, target.s_2)]
    # Norms divide by the root of the width.
    ratio = (target.width / frozen.width) ** 0.5
    vectors = {"g_1": ratio * widened(target.g_1), "s_1": shifts[0]}
    vectors |= {"g_2": ratio * widened(target.g_2), "s_2": shifts[1]}
    if frozen.final_norm:
        vectors |= {"g_f": ratio * widened(target.g_f), "s_f": widened(target.s_f)}

    def applied(W: Tensor, s: Tensor) -> Tensor:
        return (W @ s[..., None])[..., 0]

    of_heads = shifts[0].unsqueeze(-2)
    vectors["b_1"] = target.b_1 + applied(target.W_1, target.s_2) - applied(plain.W_1, shifts[1])

    def written(vector: Tensor) -> Tensor:
        return frozen.filled(vector[..., None])[..., 0]

    vectors["b_2"] = written(target.b_2)
    values = written(applied(target.W_O, applied(target.W_V, target.s_1.unsqueeze(-2))))
    own = applied(plain.W_O, applied(plain.W_V, of_heads))
    vectors["b_O"] = written(target.b_O) + (values - own).sum(-2)
    # Queries: what all keys are multiplied by, whatever the token.
    ours = cut.query_key.frozen.weights[3] @ plain.W_K.mT
    wanted = applied(
        cut.query_key.target.weights[3] @ target.W_K.mT,
        applied(target.W_Q, target.s_1.unsqueeze(-2)) + target.b_Q,
    )
    reached = applied(plain.W_Q, of_heads)
    queries = applied(torch.linalg.pinv(ours), wanted)
    sizes = [torch.linalg.vector_norm(v, dim=-1) for v in (applied(ours, queries) - wanted, wanted)]
    vectors["b_Q"] = queries - reached
    stacks = {name: getattr(plain, name) for name in plain.weight_kinds}
    return ResidualTransformer(**stacks, **vectors, **frozen.settings), *sizes


def far_error(
    network: ResidualTransformer,
    target: ResidualTransformer,
    tokens: Float[Tensor, "width samples"],
    size: float,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Mean squared error of single tokens ``c v``, and its standard error.

    Each token is a sequence of its own, all of mean square ``c²``. Tokens other than those that a
    floor was computed from differ from it by chance, as its standard error says.

    Raises `InputError` for networks and tokens that do not fit, for a single token, and for a size
    that leaves fewer than three digits of what a network adds to it.
    """
    n = residual_bounds.directions(network, target, tokens)
    size, most = _checks.positive("size", size), 1e-3 / torch.finfo(n.dtype).eps
    if size > most:
        raise InputError("size", allowed=f"at most {most:.0e} in {n.dtype}", given=size)
    _checks.integer("number of tokens", n.shape[-1], 2)
    x = size * n.movedim(-1, 0)[..., None]
    batch = len(torch.broadcast_shapes(network.batch_shape, target.batch_shape))
    x = x.reshape(len(x), *[1] * batch, *x.shape[-2:])
    each = (network(x) - target(x)).square().mean((-2, -1))
    return each.mean(0), each.std(0) / len(x) ** 0.5
