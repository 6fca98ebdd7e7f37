"""Rank threshold and error bounds of an adapted ReLU network.

All errors are ``(E‖f(x) − f̄(x)‖²)^{1/2}`` for inputs on which the adapted network's inner layers
are linear: squared and divided by the number of outputs they bound the mean squared error. For a
target of one layer they are those of [thm-one-layer], for deeper ones [thm-partition-error].
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..networks.fnn import FNN
from ..networks.partition import Partition, blocks, shares

# Samples, or the trace of their second moment.
Inputs = Float[Tensor, "*#batch in samples"] | Float[Tensor, ""] | float


def fnn_threshold(
    frozen: FNN, target: FNN, partition: Partition | None = None
) -> Int[Tensor, "*batch"]:
    """``max_i ⌈rank(E_i) / M_i⌉``: the least rank for all layers at which the partition is exact.

    ``E_i = W̄_i − ∏_{l∈P_i} W_l`` for block ``P_i`` of ``M_i`` layers, its last weight cut to the
    rows and its first to the columns that the target layer has. The uniform partition by default.
    It is exact where [ass-nonsingular] holds in every block, and no smaller rank is. Raises
    `InputError` where a hidden layer of a block is narrower than its inputs or outputs. Source:
    [thm-partition].
    """
    needed = [gap.threshold for gap in blocks(frozen, target, partition)]
    return torch.stack(torch.broadcast_tensors(*needed)).amax(0)


def fnn_block_errors(
    frozen: FNN, target: FNN, ranks: _checks.Ranks, partition: Partition | None = None
) -> Float[Tensor, "*batch blocks"]:
    """``ε_i = σ_{r_i+1}(E_i)`` with ``r_i = Σ_{l∈P_i} R_l``: what each block leaves undone."""
    gaps = blocks(frozen, target, partition)
    ranks = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    pairs = zip(gaps, shares(gaps, ranks), strict=True)
    errors = torch.broadcast_tensors(*(gap.error(sum(share)) for gap, share in pairs))
    return torch.stack(errors, dim=-1)


def fnn_error(
    frozen: FNN,
    target: FNN,
    ranks: _checks.Ranks,
    inputs: Inputs,
    partition: Partition | None = None,
) -> Float[Tensor, "*batch"]:
    """``Σ_i [∏_{j>i} (‖W̄_j‖_2 + ε_j)] ε_i (E‖z̄_{i−1}‖²)^{1/2}``, ``z̄_i`` the target's activations.

    Source: [thm-partition-error]; for a target of one layer [thm-one-layer].

    Parameters
    ----------
    inputs : Inputs
        Samples, whose own moments are taken: the bound then holds for the error on them. Or the
        trace of the inputs' second moment, ``tr E[x xᵀ] = E‖x‖²``: the closed form, in which
        ``(E‖z̄_i‖²)^{1/2} ≤ ‖W̄_i‖_2 (E‖z̄_{i−1}‖²)^{1/2} + ‖b̄_i‖_2``.
    """
    gaps = blocks(frozen, target, partition)
    ranks = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    sizes = activation_sizes(target, inputs)
    terms = []
    for gap, share, size in zip(gaps, shares(gaps, ranks), sizes, strict=True):
        error = gap.error(sum(share))
        terms.append((gap.target.norm + error, error * size))
    return accumulate_errors(terms)


def fnn_error_on(
    frozen: FNN,
    target: FNN,
    ranks: _checks.Ranks,
    inputs: Float[Tensor, "*#batch in samples"],
    partition: Partition | None = None,
) -> Float[Tensor, "*batch"]:
    """``Σ_i [∏_{j>i} ‖M_j‖_2] (E‖(M_i − W̄_i) z̄_{i−1}‖²)^{1/2}``, a sharper bound on given samples.

    ``M_i = W̄_i − E_i + LR_{r_i}(E_i)`` is the map of block ``i`` when it is adapted. Never above
    `fnn_error` on the same samples. Source: [thm-partition-error].
    """
    gaps = blocks(frozen, target, partition)
    ranks = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    z, terms = target.as_inputs(inputs), []
    for i, (gap, share) in enumerate(zip(gaps, shares(gaps, ranks), strict=True)):
        left = gap.undone(sum(share))
        gain = lowrank.norm(gap.target.product() - left)
        terms.append((gain, _size(left @ z)))
        z = target.layers(slice(i, i + 1))(z)
    return accumulate_errors(terms)


def activation_sizes(target: FNN, inputs: Inputs) -> list[Float[Tensor, "*batch"]]:
    """``(E‖z̄_{i−1}‖²)^{1/2}`` before each layer: measured on samples, or bounded from ``E‖x‖²``."""
    _checks.kind(FNN, target=target)
    given = _checks.real_tensor("inputs", inputs, min_dims=0)
    if given.ndim:
        return [_size(z) for z in (given, *(p.relu() for p in target.preactivations(given)[:-1]))]
    if given < 0:
        raise InputError("inputs", allowed="samples, or a trace of at least 0", given=float(given))
    sizes = [given.to(target.device, target.dtype).sqrt()]
    for weight, bias in zip(target.weights[:-1], target.biases[:-1], strict=True):
        sizes.append(lowrank.norm(weight) * sizes[-1] + torch.linalg.vector_norm(bias, dim=-1))
    return sizes


def accumulate_errors(terms: Iterable[tuple[Tensor, Tensor]]) -> Float[Tensor, "*batch"]:
    """``Σ_i (∏_{j>i} g_j) p_i`` of gains ``g_i`` and new errors ``p_i``, first block first.

    Raises `InputError` for none.
    """
    pairs = _checks.several("terms", terms, tuple, what="pair of a gain and an error")
    (_, error), *later = pairs
    return reduce(lambda error, term: term[0] * error + term[1], later, error)


def _size(z: Tensor) -> Tensor:
    """``(E‖z‖²)^{1/2}`` over samples in the last dimension."""
    return torch.linalg.vector_norm(z, dim=-2).square().mean(-1).sqrt()
