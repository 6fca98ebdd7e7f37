"""The gap between a piece of a frozen network and the target's, and the rank that closes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..lowrank import SVD, LowRank
from .layers import LinearNetwork


class Gap:
    """The gap ``E = W̄ − ∏_l W_l`` that the adapters of a frozen piece have to close.

    Pieces are deep linear networks, or what `LinearNetwork.of` takes, of equal inputs, outputs and
    type; ``batch_shape`` is that to which theirs broadcast. Decompositions are kept: do not change
    weights in place. Raises `InputError` for pieces that do not match and, with ``E``, for products
    that overflow.
    """

    def __init__(self, frozen: LinearNetwork | Any, target: LinearNetwork | Any) -> None:
        self.frozen = LinearNetwork.of(frozen, "frozen")
        self.target = LinearNetwork.of(target, "target")
        needed, given = ((n.widths[0], n.widths[-1]) for n in (self.frozen, self.target))
        if given != needed:
            allowed = f"of {needed} inputs and outputs, like the frozen network"
            raise InputError("target", allowed=allowed, given=given)
        _checks.like_frozen(self.target, self.frozen)
        shapes = [self.frozen.batch_shape, self.target.batch_shape]
        self.batch_shape = _checks.common_shape("frozen and target", shapes)

    @cached_property
    def matrix(self) -> Float[Tensor, "*batch out in"]:
        """``E`` itself."""
        difference = self.target.product() - self.frozen.product()
        overflows = ~difference.isfinite().all((-2, -1))
        if overflows.any():
            name = f"frozen and target{_checks.failed_members(overflows)}"
            raise InputError(name, allowed="of finite products", given="a product that overflows")
        return difference

    @cached_property
    def svd(self) -> SVD:
        """The singular value decomposition of ``E``."""
        return lowrank.svd(self.matrix)

    @cached_property
    def spectrum(self) -> Float[Tensor, "*batch k"]:
        """``σ_1 ≥ σ_2 ≥ …`` of ``E``."""
        return self.svd.S if "svd" in vars(self) else lowrank.spectrum(self.matrix)

    @cached_property
    def rounding_scale(self) -> Float[Tensor, "*batch"]:
        """The sum of both products' `LinearNetwork.rounding_scale`."""
        return self.frozen.rounding_scale + self.target.rounding_scale

    @property
    def noise(self) -> Float[Tensor, "*batch"]:
        """``max(out, in, L) · eps · rounding_scale``; up to this, values may be rounding."""
        sides = self.frozen.widths[0], self.frozen.widths[-1]
        largest = max(*sides, self.frozen.depth, self.target.depth)
        return largest * torch.finfo(self.frozen.dtype).eps * self.rounding_scale

    @property
    def rank(self) -> Int[Tensor, "*batch"]:
        """``rank E``, the number of singular values above `noise`; 0 where all may be rounding."""
        return (self.spectrum > self.noise[..., None]).sum(-1)

    def error(self, rank: int, ord: Literal[2, "fro"] = 2) -> Float[Tensor, "*batch"]:
        """Compute the least error of adapters of total rank ``r`` [thm-optimal-adaptation].

        ``σ_{r+1}(E)`` in the spectral norm, ``(Σ_{d>r} σ_d²)^{1/2}`` in the Frobenius norm.
        """
        _checks.choice("ord", ord, (2, "fro"))
        tail = self.spectrum[..., _checks.integer("rank", rank, 0) :]
        if ord == "fro":
            return torch.linalg.vector_norm(tail, dim=-1)
        return torch.nn.functional.pad(tail, (0, 1))[..., 0]

    def best(self, rank: int) -> LowRank:
        """Compute ``LR_r(E)`` as ``A = U Σ, B = V``, of at most ``min(out, in)`` columns."""
        U, S, V = (part[..., : _checks.integer("rank", rank, 0)] for part in self.svd)
        return LowRank(U * S[..., None, :], V)

    def undone(self, rank: int) -> Float[Tensor, "*batch out in"]:
        """Compute ``E − LR_r(E)``, what the best adapters of total rank ``r`` leave."""
        U, S, V = (part[..., _checks.integer("rank", rank, 0) :] for part in self.svd)
        return (U * S[..., None, :]) @ V.mT

    def reached(self, rank: int) -> Float[Tensor, "*batch out in"]:
        """Compute ``∏_l W_l + LR_r(E)``, the map with the best adapters of total rank ``r``."""
        return self.target.product() - self.undone(rank)

    @property
    def threshold(self) -> Int[Tensor, "*batch"]:
        """``⌈rank(E) / L⌉``, the least rank for all layers that can close the gap [cor-threshold].

        It is enough where the layers are non-singular [ass-nonsingular]. Raises what `ranks` raises
        where a hidden layer is narrower than inputs or outputs.
        """
        self.ranks([1] * self.frozen.depth)
        return -(-self.rank // self.frozen.depth)

    def ranks(self, ranks: Sequence[int]) -> list[int]:
        """Cut the ``ranks`` of the frozen layers, each to its weight's smaller side.

        A layer that a narrower one cuts off from inputs or outputs has rank 0 where ``E = 0``;
        otherwise its rank must be 0, or `InputError` is raised.
        """
        inputs, *hidden, outputs = self.frozen.widths
        usable = []
        for l, (rank, weight) in enumerate(zip(ranks, self.frozen.weights, strict=True)):
            cut_off = any(w < inputs for w in hidden[:l]) or any(w < outputs for w in hidden[l:])
            if rank and cut_off and self.rank.any():
                allowed = (
                    f"at least {outputs} (the outputs) after each layer of a rank above 0 and at "
                    f"least {inputs} (the inputs) before it"
                )
                remedy = "give rank 0 to the layers that narrower ones cut off"
                raise InputError("hidden widths", allowed, hidden, remedy)
            usable.append(0 if cut_off else min(rank, *weight.shape[-2:]))
        return usable
