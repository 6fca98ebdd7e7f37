"""Heads of transformers far out, and what adapters must leave of their differences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..networks.decoder import Decoder


class Heads(NamedTuple):
    """All heads of all blocks as they act on far tokens, as factors.

    Of head ``h``, ``A = keys @ queries`` is ``[m, m]`` and ``M = outputs @ values`` is ``[D, m]``;
    a query of direction ``η`` gives a key of direction ``ξ`` the score ``ξᵀ(A η + a)``.
    """

    keys: Float[Tensor, "heads m query_size"]
    queries: Float[Tensor, "heads query_size m"]
    a: Float[Tensor, "heads m"]
    outputs: Float[Tensor, "heads width value_size"]
    values: Float[Tensor, "heads value_size m"]


class HeadTails(NamedTuple):
    """Squared distances that adapters of a rank must leave between two heads.

    ``scores[g, h, R]`` is ``Σ_{i>R} σ_i²`` of ``A`` of the target's head ``h`` minus that of the
    frozen head ``g``, and ``values[g, h, R]`` the same for ``M``, for all ``R`` from 0 to the
    largest rank that such a difference can have.
    """

    scores: Float[Tensor, "frozen target rank"]
    values: Float[Tensor, "frozen target rank"]

    def least(self, scores_rank: int, values_rank: int) -> tuple[float, Int[Tensor, " frozen"]]:
        """Find ``T``, the least sum over bijections of heads, and the target's head of each head.

        ``scores_rank`` is ``R_Q + R_K`` of each head, ``values_rank`` is ``R_V + R_O``. The mean
        squared error of such adapters is at least a constant times ``T`` [thm-far-error],
        [thm-moderate-error]. Raises `InputError` for ranks below 0.
        """
        ranks = [
            _checks.integer("scores_rank", scores_rank, 0),
            _checks.integer("values_rank", values_rank, 0),
        ]
        scores, values = (
            tail[..., min(rank, tail.shape[-1] - 1)] for tail, rank in zip(self, ranks, strict=True)
        )
        cost = scores + values
        rows, order = linear_sum_assignment(cost)
        return float(cost[rows, order].sum()), torch.from_numpy(order)


def heads(network: Decoder) -> Heads:
    """Read all heads of a transformer with norms, as factors of ``A``, ``a`` and ``M``.

    `networks.from_decoder` makes a `Decoder` of one from ``transformers``.
    With ``B = diag(g_1) V`` for the norm before attention, ``A = Bᵀ W_Kᵀ W_Q B``,
    ``a = Bᵀ W_Kᵀ (W_Q s_1 + b_Q)`` and ``M = W_O W_V B``, in the order of the blocks; under a final
    norm ``Vᵀ M`` takes the place of ``M``. With rotary positions scores are those at distance 0.
    Source: [thm-every-network]. Raises `InputError` for networks without norms or residual
    connections, and for batches.
    """
    _checks.kind(Decoder, network=network)
    _checks.single(network=network)
    settings = network.settings
    if settings.norm is None or not settings.residual:
        raise InputError("network", allowed="with residual connections and norms", given=network)
    B, s = network.readings[0], network.s_1[:, None, :, None]
    keys = (network.each_head(network.W_K) @ B).mT
    a = keys @ (network.W_Q @ s + network.b_Q[..., None])
    outputs = network.basis().mT @ network.W_O if settings.final_norm else network.W_O
    values = network.each_head(network.W_V) @ B
    parts = keys, network.W_Q @ B, a[..., 0], outputs, values
    return Heads(*(part.flatten(0, 1) for part in parts))


def head_tails(frozen: Decoder, target: Decoder) -> HeadTails:
    """Compute what adapters of each rank must leave of the difference of any two heads.

    Adapters change ``A`` of a head by rank ``R_Q + R_K`` at most and ``M`` by ``R_V + R_O``, so
    they leave at least the smaller singular values of a difference [thm-eckart-young]. Frozen heads
    count rows, the target's count columns, in the order of the blocks; depths and sizes of heads
    may differ. Computed in float64. Raises what `heads` raises, and `InputError` for networks of
    other widths, norms or rotary positions, and for other numbers of heads.

    Examples
    --------
    A target whose heads are the frozen ones in the other order, with queries changed by rank 1:

    >>> from lorapower.bounds import head_tails
    >>> from lorapower.networks import Decoder
    >>> frozen = Decoder.random(1, 6, 2, residual=True, norm="rms")
    >>> W_Q, W_K, W_V, W_O = (frozen.parameters[f"W_{kind}"].flip(1) for kind in "QKVO")
    >>> W_Q[:, :, 0] += 1.0
    >>> target = frozen.replace(W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=W_O)
    >>> tails = head_tails(frozen, target)
    >>> [round(tails.least(rank, 0)[0], 6) for rank in (0, 1)]
    [4.988143, 0.0]
    >>> tails.least(1, 0)[1].tolist()
    [1, 0]
    """
    ours, theirs = heads(frozen), heads(target)
    target.require_like(frozen, ("norm", "final_norm", "rotary"), ("width",))
    if len(ours.a) != len(theirs.a):
        allowed = f"with {len(ours.a)} heads in all, as frozen has"
        raise InputError("target", allowed=allowed, given=len(theirs.a))
    ours, theirs = (Heads(*(part.double() for part in each)) for each in (ours, theirs))
    of_scores = [lowrank.LowRank(one.keys, one.queries.mT) for one in (ours, theirs)]
    of_values = [lowrank.LowRank(one.outputs, one.values.mT) for one in (ours, theirs)]
    return HeadTails(_tails(*of_scores), _tails(*of_values))


def _tails(ours: lowrank.LowRank, theirs: lowrank.LowRank) -> Float[Tensor, "frozen target rank"]:
    """Sum the squared singular values beyond each rank, of each of theirs minus each of ours."""
    sides = (-ours.left, theirs.left), (ours.right, theirs.right)
    inner = [(one.mT @ one, other.mT @ other) for one, other in sides]
    found = []
    for g in range(len(ours.left)):
        grams = []
        for (one, other), (own, others) in zip(sides, inner, strict=True):
            mixed = one[g].mT @ other
            top = torch.cat([own[g].expand(len(other), -1, -1), mixed], -1)
            grams.append(torch.cat([top, torch.cat([mixed.mT, others], -1)], -2))
        G, H = grams
        # The squares are eigenvalues of C Cᵀ H, as of Cᵀ H C; columns of factors may be dependent.
        ridge = 1e-14 * G.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        C = torch.linalg.cholesky(G + ridge * torch.eye(G.shape[-1]).to(G))
        squares = torch.linalg.eigvalsh(C.mT @ H @ C).clamp(min=0).flip(-1)
        # In the same place heads of a tuned network differ by little, as eigenvalues by rounding.
        first, second = (
            torch.linalg.qr(torch.cat([one[g], other[g]], -1)).R for one, other in sides
        )
        exact = lowrank.spectrum(first @ second.mT).square()
        squares = squares[:, : len(exact)]
        squares[g] = exact
        found.append(squares)
    tails = torch.stack(found).flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(tails, (0, 1))
