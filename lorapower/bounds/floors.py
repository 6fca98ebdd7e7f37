"""What adapters leave far out, of one part of the blocks [prop-floor-attention] or of all.

As tokens ``c n`` grow, norms see directions alone: what blocks add to them tends to a function of
``n``. Attention adds an affine map of it, feed-forward layers have kinks that no attention moves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, lowrank, randomness
from ..adapters import Adapters
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.transformer import WEIGHTS, Transformer
from ..regression import reduced_rank


class _AttentionFloor(NamedTuple):
    value: Float[Tensor, "*batch"]
    standard_error: Float[Tensor, "*batch"]
    slope: Float[Tensor, "*batch width width"]
    offset: Float[Tensor, "*batch width"]


def attention_floor(
    frozen: Transformer,
    target: Transformer,
    tokens: Float[Tensor, "width samples"],
    ranks: int | Sequence[int] | None = None,
) -> _AttentionFloor:
    """Estimate the least error of far tokens with attention adapted [prop-floor-attention].

    With ``Y(n) = lim f̄(c n) − f(c n)`` for frozen ``f`` and target ``f̄``, and whatever attention,
    ``b_O`` and ``b_2`` become: as tokens ``c n`` grow, the limit of the mean squared error is at
    least what the best affine map leaves of ``Y``. Adapters of limited rank, at frozen first gains,
    change its slope by a matrix of their total rank [thm-attention-rank]. This bounds the largest
    error over sizes of tokens, not the mean at one size. It is exact for the mean over these
    directions; for others of their kind it is too low, by about one part in
    ``samples / (r (D + m − r) / D + 1)`` at rank ``r``.

    Returns ``value``, ``min E‖Y(n) − K n − k‖² / D`` over matrices ``K`` of the given rank and
    vectors ``k``, and its ``standard_error``, the spread over tokens, each ``[...]``. The best
    ``K``, which attention has to add, is ``slope``, ``[..., D, D]``; ``k`` is ``offset``,
    ``[..., D]``. The networks have equal width, norm and activation, any depth and no final norm.
    Raises `InputError` for networks and ranks that do not fit, too few tokens, and constant ones.

    Parameters
    ----------
    tokens : Tensor
        Directions as columns, more than ``m + 1``, which span the space of normalized tokens.
    ranks : int or sequence of int, optional
        The total rank of all ``W_V`` and ``W_O``, or the rank of each of ``frozen.weights``, as by
        `Transformer.ranks`. By default any rank.
    """
    n = directions(frozen, target, tokens)
    m, V, samples = target.dimension, target.basis(), n.shape[-1]
    rank, inner = sum(_value_ranks(frozen, ranks).values()), V.mT @ n
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


def _value_ranks(network: Transformer, ranks: int | Sequence[int] | None) -> dict[str, int]:
    """Read the rank of each ``W_V`` and ``W_O`` by name; a total goes to one of them."""
    if not isinstance(ranks, Sequence):
        total = network.width if ranks is None else _checks.integer("ranks", ranks, 0)
        return {"W_O of block 1, head 1": total}
    each = _each_rank(network, ranks)
    kinds = zip(network.weight_names, network.kind_of_weight, each, strict=True)
    return {name: rank for name, kind, rank in kinds if kind in ("W_V", "W_O")}


def _each_rank(network: Transformer, ranks: Sequence[int]) -> tuple[int, ...]:
    """Read the rank of each of the network's weights."""
    return _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in network.weights])


class _WholeFloor(NamedTuple):
    value: Float[Tensor, "*batch"]
    values: Float[Tensor, "*batch"]
    feed_forward: Float[Tensor, "*batch"]


def whole_floor(
    frozen: Transformer,
    target: Transformer,
    ranks: int | Sequence[int],
    tokens: Float[Tensor, "width samples"] | None = None,
) -> _WholeFloor:
    """Compute an error that adapters on all modules leave far out [prop-whole-floor].

    A sequence has ``N − 1`` equal tokens ``c k`` and at last ``c n``; ``k`` and ``n`` are random
    directions, independent, and ``n`` is uniform on ``S``. Let ``c`` and then ``N`` grow: the limit
    of the mean squared error of the last token is at least ``D`` times ``value``, which adds up two
    parts. It does not bound the error at a given ``N``, where scores above ``log N`` can turn
    attention away from ``k``.

    - ``values``: ``Σ_{i>r} σ_i((M̄ − M) C^{1/2})² / D``, with ``M`` the sum of ``W_O W_V diag(g_1)``
      over all heads and blocks, ``C`` the covariance of ``k`` and ``r`` the total rank of all
      ``W_V`` and ``W_O``. It assumes that first gains are frozen, and nothing else.
    - ``feed_forward``, which is 0 unless both networks are ungated, or both gated, and have neither
      hidden biases ``b_1``, ``b_3`` nor second shifts ``s_2``. It assumes that adapted networks
      have none either, and that second gains are frozen too. *Ungated*: ``Σ_{i>r} σ_i(T̄ − T)² / m``
      with ``T`` half the sum of ``W_2 W_1 diag(g_2) V`` and ``r`` the total rank of all ``W_1`` and
      ``W_2``. *Gated*: ``2D / (m(m+2))`` times what is positive of
      ``‖X‖² − Σ_{i≤r} o_i² − 2 Σ_{i≤t} s_i²``. ``X`` is the traceless part of the
      difference of the networks' quadratic forms ``½ Σ_l W_2((W_1 g_2 ⊙ n) ⊙ (W_3 g_2 ⊙ n))``, one
      for each output; ``o`` and ``s`` are its singular values, unfolded by outputs and by inputs;
      ``r`` is the total rank of all ``W_2``, and ``t`` that of all ``W_1`` and ``W_3``.

    Each is ``[...]``. The networks have equal width, norm and activation, any depth and no final
    norm. Raises `InputError` for networks, ranks and tokens that do not fit.

    Parameters
    ----------
    ranks : int or sequence of int
        One rank for ``W_Q``, …, ``W_2`` of each block, all heads in one matrix as PEFT adapts them,
        up to its smaller side. Or the rank of each of ``frozen.weights``, as `Transformer.ranks`
        gives them.
    tokens : Tensor, optional
        Directions ``k`` as columns. By default they are uniform on ``S``.
    """
    _require_one_sphere(frozen, target)
    rank, (D, m) = _ranks_by_kind(frozen, ranks), (frozen.width, frozen.dimension)
    V = frozen.basis()
    root = V * (D / m) ** 0.5
    if tokens is not None:
        n = directions(frozen, target, tokens)
        root = (n - n.mean(-1, keepdim=True)) / n.shape[-1] ** 0.5
    spectrum = lowrank.spectrum((_value_map(target) - _value_map(frozen)) @ root)
    values = spectrum[..., rank["W_V"] + rank["W_O"] :].square().sum(-1) / D
    holds, both = torch.ones_like(values, dtype=torch.bool), (frozen, target)
    for network in both:
        for kind in {"b_1", "b_3", "s_2"} & {*network.kinds}:
            holds = holds & (getattr(network, kind) == 0).flatten(-2).all(-1)
    left = torch.zeros_like(values)
    if len({network.settings.gated for network in both}) == 2 or not holds.any():
        return _WholeFloor(values, values, left)
    if not frozen.settings.gated:
        T = [torch.einsum("...lof,...lfi,...li->...oi", n.W_2, n.W_1, n.g_2) / 2 for n in both]
        spectrum = lowrank.spectrum((T[1] - T[0]) @ V)
        left = spectrum[..., rank["W_1"] + rank["W_2"] :].square().sum(-1) / m
    else:
        outer, inner = _form_spectra(frozen, target)
        left = outer[..., rank["W_2"] :].sum(-1)
        left = left - 2 * inner[..., : rank["W_1"] + rank["W_3"]].sum(-1)
        left = left.clamp(min=0) * 2 * D / (m * (m + 2))
    left = torch.where(holds, left, 0)
    return _WholeFloor(values + left, values, left)


def _ranks_by_kind(network: Transformer, ranks: int | Sequence[int]) -> dict[str, int]:
    """Add up ranks by kind of weight; a single one is of each block's packed weight."""
    total = dict.fromkeys(network.weight_kinds, 0)
    if isinstance(ranks, Sequence):
        for kind, rank in zip(network.kind_of_weight, _each_rank(network, ranks), strict=True):
            total[kind] += rank
        return total
    R, sizes = _checks.integer("ranks", ranks, 0), network.sizes
    for kind in total:
        other = math.prod(sizes[side] for side in WEIGHTS[kind][1:] if side != "width")
        total[kind] = network.depth * min(R, network.width, other)
    return total


def _value_map(network: Transformer) -> Float[Tensor, "*batch width width"]:
    """Sum ``W_O W_V diag(g_1)`` over heads and blocks."""
    W_V = network.each_head(network.W_V)
    return torch.einsum("...lhoi,...lhij,...lj->...oj", network.W_O, W_V, network.g_1)


# It takes minutes for real models, and serves all ranks and tokens.
@functools.lru_cache(maxsize=1)
def _form_spectra(frozen: Transformer, target: Transformer) -> tuple[Tensor, Tensor]:
    """Square the singular values of the two unfoldings of what gated layers' forms differ by."""
    batch = torch.broadcast_shapes(frozen.batch_shape, target.batch_shape)
    V, (D, m) = frozen.basis(), (frozen.width, frozen.dimension)
    forms = V.new_zeros(*batch, D, m, m)
    for sign, network in ((0.25, target), (-0.25, frozen)):
        for l in range(network.depth):
            gains = network.g_2[..., l, :, None] * V
            gate, up = ((W[..., l, :, :] @ gains).mT for W in (network.W_1, network.W_3))
            for i in range(0, m, 32):
                # Forms are symmetric: of rows i to i + 31, what is left of the diagonal is known.
                products = gate[..., i : i + 32, None, :] * up[..., None, i:, :]
                products += up[..., i : i + 32, None, :] * gate[..., None, i:, :]
                made = network.W_2[..., l, :, :] @ products.flatten(-3, -2).mT
                forms[..., i : i + 32, i:] += sign * made.unflatten(-1, (-1, m - i))
    forms.triu_()
    forms += forms.triu(1).mT
    trace = forms.diagonal(dim1=-2, dim2=-1)
    trace -= trace.mean(-1, keepdim=True)
    outer, inner = forms.flatten(-2), forms.flatten(-3, -2)
    grams = outer @ outer.mT, inner.mT @ inner
    first, second = (torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0) for gram in grams)
    return first, second


class _FeedForwardFloor(NamedTuple):
    value: Float[Tensor, "*batch"]
    standard_error: Float[Tensor, "*batch"]


def feed_forward_floor(
    frozen: Transformer,
    target: Transformer,
    tokens: Float[Tensor, "width samples"],
    length: int,
    *,
    seed: int = 0,
) -> _FeedForwardFloor:
    """Estimate the least error of far sequences, attention frozen [prop-floor-feed-forward].

    Whatever feed-forward layers and second norms become, of any size: as all tokens of sequences
    grow, the limit of the mean squared error is at least ``E tr Cov(Δ_j | n_j) / D``. Here ``Δ_j``
    is what the target's attention adds to token ``j`` minus what the frozen one adds. The estimate
    is unbiased for sequences whose tokens are drawn independently from ``tokens``: half the mean
    squared difference of ``Δ`` for one token in two sequences, at random places.

    Returns its ``value`` and ``standard_error``, each ``[...]``. The networks have equal width,
    norm and activation, any depth and no final norm. Raises `InputError` for networks that do not
    fit, fewer than two tokens, and constant ones.

    Parameters
    ----------
    tokens : Tensor
        Directions as columns; each is put into two sequences.
    length : int
        The number of tokens of a sequence; with one the floor is 0.
    """
    n = directions(frozen, target, tokens)
    samples = _checks.integer("number of tokens", n.shape[-1], 2)
    length = _checks.integer("length", length, 1)
    draw = randomness.generator(seed, "contexts")
    own = torch.arange(samples, device=n.device)[:, None]
    sides = []
    for _ in range(2):
        chosen = torch.randint(samples, (samples, length), generator=draw).to(n.device)
        place = torch.randint(length, (samples, 1), generator=draw).to(n.device)
        x = _sequences(n.mT[chosen.scatter(1, place, own)].mT, frozen, target)
        gap = _added(target, x, attention_only=True) - _added(frozen, x, attention_only=True)
        index = place.reshape(samples, *[1] * (gap.ndim - 1)).expand(*gap.shape[:-1], 1)
        sides.append(gap.gather(-1, index)[..., 0])
    each = (sides[0] - sides[1]).square().mean(-1) / 2
    return _FeedForwardFloor(each.mean(0), each.std(0) / samples**0.5)


def directions(
    frozen: Transformer, target: Transformer, tokens: Float[Tensor, "width samples"]
) -> Float[Tensor, "width samples"]:
    """Put tokens on the sphere ``‖n‖² = D``; `InputError` where the networks' spheres differ."""
    _require_one_sphere(frozen, target)
    v = target.as_inputs(tokens, "tokens")
    if v.ndim != 2:
        raise InputError("tokens", allowed="of shape [width, samples]", given=tuple(v.shape))
    rounding = 16 * torch.finfo(v.dtype).eps * torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    if target.settings.norm == "layer":
        v = v - v.mean(-2, keepdim=True)
    size = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    if not (size > rounding).all():
        raise InputError("tokens", allowed="of different coordinates", given="one without variance")
    return v / size * target.width**0.5


def _require_one_sphere(frozen: Transformer, target: Transformer) -> None:
    """Refuse networks without a limit for far tokens, and a pair whose spheres differ."""
    _checks.kind(Transformer, frozen=frozen, target=target)
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


def _sequences(x: Tensor, *networks: Transformer) -> Tensor:
    """Give sequences ``[samples, width, N]`` a dimension for each of the networks' batch."""
    batch = torch.broadcast_shapes(*(network.batch_shape for network in networks))
    return x.reshape(len(x), *[1] * len(batch), *x.shape[1:])


def _added(network: Transformer, n: Tensor, *, attention_only: bool = False) -> Tensor:
    """Compute what blocks, or their attention, add to far tokens of these directions."""
    # Far out, norms see directions alone.
    limit, added = network.replace(eps=0.0), torch.zeros_like(n)
    for l in range(network.depth):
        patterns = limit.patterns(limit.scores(l, n))
        added = added + (limit.attend(l, n, patterns) - n)
        if not attention_only:
            added = added + (limit.feed_forward(l, n, limit.hidden(l, n)) - n)
    return added


@torch.no_grad()
def attention_only(
    frozen: Transformer,
    target: Transformer,
    tokens: Float[Tensor, "width samples"],
    ranks: int | Sequence[int] | None = None,
) -> Adapters:
    """Adapt attention alone, and ``b_O``, with the least error on single tokens far out.

    ``W_V`` and ``W_O`` take the singular triplets of the slope of `attention_floor` in turn.
    On normalized tokens ``W_O ΔW_V diag(g_1)`` is such a part, and so is ``ΔW_O Ŵ_V diag(g_1)``
    with what ``W_V`` has become. So the error tends to the floor. A total rank, by default any,
    goes to ``W_O`` of the first head of the first block.

    Raises what `attention_floor` raises, and `InputError` for batches, for heads narrower
    than the tokens, and for weights and gains that hide directions. Source: [prop-floor-attention],
    [thm-attention-rank].
    """
    best, given = attention_floor(frozen, target, tokens, ranks), _value_ranks(frozen, ranks)
    _checks.single(frozen=frozen, target=target)
    if frozen.sizes["value size"] < frozen.width:
        raise InputError(
            "frozen",
            allowed="with heads as wide as the tokens",
            given=frozen.sizes["value size"],
            remedy="narrower ones cannot add every linear map",
        )
    V, values = frozen.basis(), frozen.W_V.clone()
    # Heads of a group share their values.
    outputs = frozen.W_O.unflatten(1, (frozen.groups, -1)).sum(2)
    updates = {
        name: LowRank(w[:, :0], w.mT[:, :0])
        for name, w in zip(frozen.weight_names, frozen.weights, strict=True)
    }
    U, S, right = lowrank.svd(best.slope @ V)
    left, offset = U * S, best.offset.clone()
    used = 0
    for kind in ("W_V", "W_O"):
        names = [n for n, k in zip(updates, frozen.kind_of_weight, strict=True) if k == kind]
        for i, name in enumerate(names):
            l, h = divmod(i, len(names) // frozen.depth)
            columns = slice(used, used + given.get(name, 0))
            used = columns.stop
            out, into = left[:, columns], right[:, columns]
            if not out.any():
                continue
            read = (frozen.g_1[l][:, None] * V).mT
            if kind == "W_V":
                into = _solve(read, into, f"gains before {name}")
                updates[name] = LowRank(_solve(outputs[l, h], out, f"partner of {name}"), into)
                values[l, h] += updates[name].matrix()
            else:
                of_head = values[l, h * frozen.groups // frozen.heads]
                into = _solve(read @ of_head.mT, into, f"partner of {name}, or the gains")
                updates[name], into = LowRank(out, into), of_head.mT @ into
            offset -= out @ (into.mT @ frozen.s_1[l])
    changes = [torch.zeros_like(b) for b in frozen.biases]
    changes[frozen.bias_names.index("b_O of block 1")] = offset
    return Adapters(tuple(updates.values()), tuple(changes))


def _solve(matrix: Tensor, columns: Tensor, name: str) -> Tensor:
    """Find the least columns that a matrix maps to these; refuse if there are none."""
    eps = torch.finfo(matrix.dtype).eps
    solution = torch.linalg.pinv(matrix, rtol=eps ** (2 / 3)) @ columns
    if (matrix @ solution - columns).norm() > eps**0.5 * columns.norm():
        raise InputError(
            f"frozen's {name}",
            allowed="of full rank",
            given="one that hides directions",
            remedy="perturb it",
        )
    return solution


def far_error(
    network: Transformer,
    target: Transformer,
    tokens: Float[Tensor, "width samples"],
    size: float,
    length: int = 1,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Measure the mean squared error at tokens ``c n``, ``‖n‖² = D``, and its standard error.

    Single tokens of all directions ``n``, or as many sequences of ``length`` drawn from them.
    Raises `InputError` for networks and tokens that do not fit, for a single token, and for a size
    ``c`` that leaves fewer than three digits of what a network adds to it.
    """
    n = directions(network, target, tokens)
    size, most = _checks.positive("size", size), 1e-3 / torch.finfo(n.dtype).eps
    if size > most:
        raise InputError("size", allowed=f"at most {most:.0e} in {n.dtype}", given=size)
    samples = _checks.integer("number of tokens", n.shape[-1], 2)
    length = _checks.integer("length", length, 1)
    x = size * n.mT[..., None]
    if length > 1:
        draw = randomness.generator(0, "far sequences")
        x = size * n.mT[torch.randint(samples, (samples, length), generator=draw)].mT
    x = _sequences(x, network, target)
    each = (network(x) - target(x)).square().mean((-2, -1))
    return each.mean(0), each.std(0) / len(x) ** 0.5
