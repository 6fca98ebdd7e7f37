"""Rank thresholds and error bounds of ReLU networks.

Errors are ``(E‖f(x) − f̄(x)‖²)^{1/2}`` for inputs on which the adapted network's inner layers are
linear. Block ``ℬ_i`` has the error matrix ``E_i = W̄_i − ∏_{l∈ℬ_i} W_l``, of which adapters leave
``ε_i = σ_{r_i+1}(E_i)``, ``r_i = Σ_{l∈ℬ_i} R_l``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..networks.gap import Gap
from ..networks.layers import FNN
from ..networks.partition import Partition, blocks

# Samples, or the trace of their second moment.
Inputs = Float[Tensor, "*#batch in samples"] | Float[Tensor, ""] | float | np.integer


def fnn_threshold(
    frozen: FNN, target: FNN, partition: Partition | None = None
) -> Int[Tensor, "*batch"]:
    """Compute ``max_i ⌈rank(E_i) / M_i⌉``, at which a partition is exact [thm-partition].

    Block ``ℬ_i`` of ``M_i`` layers is cut to the target layer's rows and columns; the partition is
    uniform by default. The rank is enough where [ass-nonsingular] holds in every block. Raises what
    `networks.Gap.threshold` raises.

    Examples
    --------
    >>> from lorapower.bounds import fnn_threshold
    >>> from lorapower.networks import FNN
    >>> int(fnn_threshold(FNN.random(6, 8), FNN.random(2, 8, seed=1)))
    3
    """
    needed = [gap.threshold for gap in blocks(frozen, target, partition)]
    return torch.stack(torch.broadcast_tensors(*needed)).amax(0)


def fnn_error(
    frozen: FNN,
    target: FNN,
    ranks: _checks.Ranks,
    inputs: Inputs,
    partition: Partition | None = None,
) -> Float[Tensor, "*batch"]:
    """Bound the error by ``Σ_i [∏_{j>i} (‖W̄_j‖_2 + ε_j)] ε_i (E‖z̄_{i−1}‖²)^{1/2}``.

    ``z̄_i`` are the target's activations on inputs ``[..., in, samples]``; for a number in place of
    inputs, the trace ``E‖x‖²`` of their second moment, they are bounded by
    ``(E‖z̄_i‖²)^{1/2} ≤ ‖W̄_i‖_2 (E‖z̄_{i−1}‖²)^{1/2} + ‖b̄_i‖_2``. Ranks and partition are as in
    `constructions.adapt_relu`. Source: [thm-partition-error], [thm-one-layer].

    Examples
    --------
    Inputs of width 8 and variance 1 have the trace 8.

    >>> from lorapower.bounds import fnn_error
    >>> from lorapower.networks import FNN
    >>> frozen, target = FNN.random(4, 8), FNN.random(2, 8, seed=1)
    >>> bounds = [float(fnn_error(frozen, target, R, inputs=8)) for R in (0, 2, 4)]
    >>> bounds[0] > bounds[1] > bounds[2] == 0
    True
    """
    gaps = blocks(frozen, target, partition)
    parts = zip(gaps, _totals(gaps, frozen, ranks), _activation_sizes(target, inputs), strict=True)
    return _accumulate(
        (gap.target.norm + gap.error(rank), gap.error(rank) * size) for gap, rank, size in parts
    )


def fnn_error_on(
    frozen: FNN,
    target: FNN,
    ranks: _checks.Ranks,
    inputs: Float[Tensor, "*#batch in samples"],
    partition: Partition | None = None,
) -> Float[Tensor, "*batch"]:
    """Bound the error on samples by ``Σ_i [∏_{j>i} ‖M_j‖_2] (E‖(M_i − W̄_i) z̄_{i−1}‖²)^{1/2}``.

    ``M_i = W̄_i − E_i + LR_{r_i}(E_i)`` is the adapted map of block ``i``. Parameters are as in
    `fnn_error`, which is never below it on the same samples. Source: [thm-partition-error].
    """
    gaps = blocks(frozen, target, partition)
    before = _activations(target, target.as_inputs(inputs, "inputs"))
    terms = []
    for gap, rank, z in zip(gaps, _totals(gaps, frozen, ranks), before, strict=True):
        undone = gap.undone(rank)
        terms.append((lowrank.norm(gap.target.product() - undone), _root_mean_square(undone @ z)))
    return _accumulate(terms)


def _activation_sizes(target: FNN, inputs: Inputs) -> list[Float[Tensor, "*batch"]]:
    """Compute ``(E‖z̄_{i−1}‖²)^{1/2}`` per layer, or its bound in `fnn_error`."""
    _checks.kind(FNN, target=target)
    x = _checks.numbers("inputs", inputs)
    if x.ndim:
        return [_root_mean_square(z) for z in _activations(target, x)]
    if x < 0:
        raise InputError("inputs", allowed="samples, or a trace of at least 0", given=float(x))
    sizes = [x.to(target.device, target.dtype).sqrt()]
    for weight, bias in zip(target.weights[:-1], target.biases[:-1], strict=True):
        sizes.append(lowrank.norm(weight) * sizes[-1] + torch.linalg.vector_norm(bias, dim=-1))
    return sizes


def _activations(target: FNN, inputs: Tensor) -> list[Tensor]:
    """Compute what each layer of the target reads."""
    return [inputs, *(p.relu() for p in target.preactivations(inputs)[:-1])]


def _totals(gaps: list[Gap], frozen: FNN, ranks: _checks.Ranks) -> list[int]:
    """Compute ``r_i`` of each block."""
    per_layer = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    slices = Partition(gap.frozen.depth for gap in gaps).slices
    return [sum(gap.ranks(per_layer[p])) for gap, p in zip(gaps, slices, strict=True)]


def _accumulate(terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum ``Σ_i (∏_{j>i} g_j) p_i`` of gains ``g_i`` and new errors ``p_i``, first block first."""
    (_, total), *later = terms
    for gain, added in later:
        total = gain * total + added
    return total


def _root_mean_square(z: Tensor) -> Tensor:
    """Compute ``(E‖z‖²)^{1/2}`` over samples in the last dimension."""
    return torch.linalg.vector_norm(z, dim=-2).square().mean(-1).sqrt()
