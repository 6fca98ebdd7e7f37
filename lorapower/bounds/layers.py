"""Rank thresholds and error bounds of linear and ReLU networks; errors to first order.

Errors of ReLU networks are ``(E‖f(x) − f̄(x)‖²)^{1/2}`` for inputs on which the adapted network's
inner layers are linear; squared and divided by the number of outputs they bound the mean squared
error. Block ``ℬ_i`` has the error matrix ``E_i = W̄_i − ∏_{l∈ℬ_i} W_l``, of which adapters leave
``ε_i = σ_{r_i+1}(E_i)``, ``r_i = Σ_{l∈ℬ_i} R_l``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.autograd.functional import jvp

from .. import _checks, lowrank
from ..errors import InputError
from ..networks.base import Network
from ..networks.gap import Gap
from ..networks.layers import FNN, LinearNetwork
from ..networks.partition import Partition, blocks
from ..networks.transformer import Transformer

# Samples, or the trace of their second moment.
Inputs = Float[Tensor, "*#batch in samples"] | Float[Tensor, ""] | float
# From what one stage of a network leaves to what the next one leaves.
_Stage = Callable[..., tuple[Tensor, ...]]


def linear_threshold(frozen: LinearNetwork, target: LinearNetwork) -> Int[Tensor, "*batch"]:
    """``⌈rank(E) / L⌉``, ``E = W̄ − ∏_l W_l``: the least rank of exact adapters [cor-threshold].

    Raises `InputError` where a hidden layer is narrower than inputs or outputs.
    """
    return Gap(frozen, target).threshold


class _Norms(NamedTuple):
    """Spectral and Frobenius norm of a matrix."""

    spectral: Float[Tensor, "*batch"]
    frobenius: Float[Tensor, "*batch"]


def linear_error(frozen: LinearNetwork, target: LinearNetwork, total_rank: int) -> _Norms:
    """Least ``spectral`` and ``frobenius`` error of adapters of total rank ``r = Σ_l R_l``.

    They are ``σ_{r+1}(E)`` and ``(Σ_{d>r} σ_d(E)²)^{1/2}``; as lower bounds they need no
    assumption. Source: [thm-optimal-adaptation].
    """
    gap = Gap(frozen, target)
    return _Norms(gap.error(total_rank), gap.error(total_rank, "fro"))


def fnn_threshold(
    frozen: FNN, target: FNN, partition: Partition | None = None
) -> Int[Tensor, "*batch"]:
    """``max_i ⌈rank(E_i) / M_i⌉``, the least rank that makes a partition exact [thm-partition].

    Block ``ℬ_i`` of ``M_i`` layers is cut to the target layer's rows and columns; the partition is
    uniform by default. The rank is enough where [ass-nonsingular] holds in every block. Raises
    `InputError` where a block's hidden layer is narrower than its inputs or outputs.
    """
    needed = [gap.threshold for gap in blocks(frozen, target, partition)]
    return torch.stack(torch.broadcast_tensors(*needed)).amax(0)


def fnn_data_threshold(
    frozen: FNN,
    target: FNN,
    inputs: Float[Tensor, "*#batch in samples"],
    partition: Partition | None = None,
) -> Int[Tensor, "*batch"]:
    """``max_i ⌈rank(E_i C_{i−1}^{1/2}) / M_i⌉``: a rank that is enough on inputs.

    ``C_{i−1}`` is the covariance over the inputs of the target's activations before layer ``i``. It
    is the least rank at which each block alone can reach the target's pre-activations on the
    inputs; never above `fnn_threshold`, and far below where activations span little. Source:
    [cor-data-threshold].
    """
    needed = []
    for gap, z in _with_activations(blocks(frozen, target, partition), target, inputs):
        missing = gap.matrix @ (z - z.mean(-1, keepdim=True))
        size = gap.rounding_scale * torch.linalg.matrix_norm(z, ord=2)
        needed.append(-(-lowrank.rank(missing, scale=size) // gap.frozen.depth))
    return torch.stack(torch.broadcast_tensors(*needed)).amax(0)


def fnn_error(
    frozen: FNN,
    target: FNN,
    ranks: _checks.Ranks,
    inputs: Inputs,
    partition: Partition | None = None,
) -> Float[Tensor, "*batch"]:
    """``Σ_i [∏_{j>i} (‖W̄_j‖_2 + ε_j)] ε_i (E‖z̄_{i−1}‖²)^{1/2}``, with the target's ``z̄_i``.

    ``z̄_i`` are activations. Ranks are one for all or one per layer; partitions uniform by default.
    The bound holds on inputs ``[..., in, samples]``, or for inputs with trace ``E‖x‖²`` of the
    second moment by ``(E‖z̄_i‖²)^{1/2} ≤ ‖W̄_i‖_2 (E‖z̄_{i−1}‖²)^{1/2} + ‖b̄_i‖_2``. Source:
    [thm-partition-error], [thm-one-layer].
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
    """``Σ_i [∏_{j>i} ‖M_j‖_2] (E‖(M_i − W̄_i) z̄_{i−1}‖²)^{1/2}``, a sharper bound on samples.

    ``M_i = W̄_i − E_i + LR_{r_i}(E_i)`` is the adapted map of block ``i``. Parameters are as in
    `fnn_error`, which is never below it on the same samples. Source: [thm-partition-error].
    """
    gaps = blocks(frozen, target, partition)
    terms = []
    for (gap, z), rank in zip(
        _with_activations(gaps, target, inputs), _totals(gaps, frozen, ranks), strict=True
    ):
        undone = gap.undone(rank)
        terms.append((lowrank.norm(gap.target.product() - undone), _root_mean_square(undone @ z)))
    return _accumulate(terms)


@dataclass(frozen=True)
class OptimalPartition:
    """The best partition of each member, block sizes ``[..., L̄]``, and its rank or error."""

    sizes: Int[Tensor, "*batch blocks"]
    value: Num[Tensor, "*batch"]

    def partition(self, *member: int) -> Partition:
        """The partition of one member of the batch, by its indices."""
        return Partition(self.sizes[member].tolist())


def least_rank(frozen: FNN, target: FNN) -> OptimalPartition:
    """Find the partition of the least `fnn_threshold`, the rank at which it is exact.

    Blocks with a hidden layer too narrow for their target layer are left out. Raises `InputError`
    for a target deeper or wider than the frozen network. Source: [prop-optimal-partition].
    """

    def step(i: int, layers: slice, gap: Gap, before: Tensor) -> Tensor:
        return torch.maximum(before, gap.threshold.to(before.dtype))

    best = _search(frozen, target, step)
    return replace(best, value=best.value.long())


def least_error(frozen: FNN, target: FNN, ranks: _checks.Ranks, inputs: Inputs) -> OptimalPartition:
    """Find the partition of the least `fnn_error` at given ranks [prop-optimal-partition].

    Raises `InputError` for ranks out of range, and for a target deeper or wider than ``frozen``.
    """
    per_layer = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    sizes = _activation_sizes(target, inputs)

    def step(i: int, layers: slice, gap: Gap, before: Tensor) -> Tensor:
        error = gap.error(sum(gap.ranks(per_layer[layers])))
        return (gap.target.norm + error) * before + error * sizes[i]

    return _search(frozen, target, step)


def first_order(
    adapted: Network, target: Network, inputs: Float[Tensor, "*batch width n"]
) -> Float[Tensor, ""]:
    """``E‖Σ_s J_s δ_s‖²`` over the variance of the target's outputs: a relative error.

    At the target's activations, ``δ_s`` is the difference of segment ``s`` between the adapted
    network and the target, and ``J_s`` the derivative of what follows ``s`` in the adapted network.
    A segment ends before a ReLU, a softmax, or the next block. The error is exact for linear
    networks, and not finite where the target is constant on the inputs.

    The networks are of one kind, of equal sizes and without batches, as in a
    `constructions.fused.Fused`. Inputs are columns ``[in, samples]`` or, for transformers,
    sequences ``[..., width, tokens]``. Source: [prop-first-order].
    """
    _checks.same_sizes(adapted, target)
    state: tuple[Tensor, ...] = (target.as_inputs(inputs, "inputs"),)
    moved = torch.zeros((), dtype=target.dtype, device=target.device)
    stages = _stages(adapted)
    for s, target_stage in enumerate(_stages(target)):
        reached, state = stages[s](*state), target_stage(*state)

        def follow(*state: Tensor, s: int = s) -> Tensor:
            return reduce(lambda state, stage: stage(*state), stages[s + 1 :], state)[0]

        missed = tuple(a - b for a, b in zip(reached, state, strict=True))
        # Twice backward: forward, torch would compile what it deprecates.
        moved = moved + jvp(follow, state, missed)[1]
    return moved.square().mean() / variance(state[0])


def variance(outputs: Float[Tensor, "*samples out n"]) -> Float[Tensor, ""]:
    """Variance over samples and tokens, averaged over outputs; `InputError` if not finite."""
    y = _checks.real_tensor("outputs", outputs, min_dims=2)
    return y.movedim(-2, 0).flatten(1).var(-1, correction=0).mean()


def _activation_sizes(target: FNN, inputs: Inputs) -> list[Float[Tensor, "*batch"]]:
    """``(E‖z̄_{i−1}‖²)^{1/2}`` per layer, or its bound in `fnn_error` [thm-partition-error]."""
    _checks.kind(FNN, target=target)
    given = _checks.real_tensor("inputs", inputs, min_dims=0)
    if given.ndim:
        activations = [given, *(p.relu() for p in target.preactivations(given)[:-1])]
        return [_root_mean_square(z) for z in activations]
    if given < 0:
        raise InputError("inputs", allowed="samples, or a trace of at least 0", given=float(given))
    sizes = [given.to(target.device, target.dtype).sqrt()]
    for weight, bias in zip(target.weights[:-1], target.biases[:-1], strict=True):
        sizes.append(lowrank.norm(weight) * sizes[-1] + torch.linalg.vector_norm(bias, dim=-1))
    return sizes


def _with_activations(gaps: list[Gap], target: FNN, inputs: Tensor) -> Iterable[tuple[Gap, Tensor]]:
    """Each gap with the target's activations before it."""
    z = target.as_inputs(inputs, "inputs")
    for i, gap in enumerate(gaps):
        yield gap, z
        z = target.layers(slice(i, i + 1))(z)


def _totals(gaps: list[Gap], frozen: FNN, ranks: _checks.Ranks) -> list[int]:
    """``r_i`` of each block."""
    per_layer = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    slices = Partition(gap.frozen.depth for gap in gaps).slices
    return [sum(gap.ranks(per_layer[p])) for gap, p in zip(gaps, slices, strict=True)]


def _accumulate(terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """``Σ_i (∏_{j>i} g_j) p_i`` of gains ``g_i`` and new errors ``p_i``, first block first."""
    (_, total), *later = terms
    for gain, added in later:
        total = gain * total + added
    return total


def _root_mean_square(z: Tensor) -> Tensor:
    """``(E‖z‖²)^{1/2}`` over samples in the last dimension."""
    return torch.linalg.vector_norm(z, dim=-2).square().mean(-1).sqrt()


def _search(
    frozen: FNN, target: FNN, step: Callable[[int, slice, Gap, Tensor], Tensor]
) -> OptimalPartition:
    """Least value over partitions; ``step``, which adds a block, is monotone in the value."""
    # Norms of a piece of either network are computed once.
    pieces: dict[tuple[int, ...], LinearNetwork] = {}

    def gap(i: int, layers: slice) -> Gap:
        (found,) = blocks(frozen.layers(layers), target.layers(slice(i, i + 1)))
        run = layers.start, layers.stop, *found.target.widths
        return Gap(pieces.setdefault(run, found.frozen), pieces.setdefault((i,), found.target))

    def fits(i: int, layers: slice) -> bool:
        """Whether no frozen layer's side is too narrow for the target layer."""
        outputs, inputs = target.weights[i].shape[-2:]
        first, *inner, last = frozen.widths[layers.start : layers.stop + 1]
        return first >= inputs and last >= outputs and all(w >= max(inputs, outputs) for w in inner)

    values = {0: torch.zeros((), dtype=frozen.dtype, device=frozen.device)}
    starts: list[dict[int, Tensor]] = []
    for i in range(target.depth):
        reached, chosen = {}, {}
        # Each of the later blocks needs a layer, and the last takes all that are left.
        later = target.depth - i - 1
        for end in range(i + 1 if later else frozen.depth, frozen.depth - later + 1):
            runs = [slice(start, end) for start in values if start < end]
            runs = [layers for layers in runs if fits(i, layers)]
            if runs:
                options = [step(i, run, gap(i, run), values[run.start]) for run in runs]
                reached[end], best = torch.stack(torch.broadcast_tensors(*options)).min(0)
                firsts = [layers.start for layers in runs]
                chosen[end] = torch.tensor(firsts, device=best.device)[best]
        values = reached
        starts.append(chosen)
    if frozen.depth not in values:
        allowed = f"no deeper and no wider than the frozen network of widths {frozen.widths}"
        raise InputError("target", allowed=allowed, given=f"widths {target.widths}")

    value = values[frozen.depth]
    ends = [torch.full_like(value, frozen.depth, dtype=torch.long)]
    for chosen in reversed(starts):
        table = ends[0].new_zeros(frozen.depth + 1, *value.shape)
        for layer, start in chosen.items():
            table[layer] = start
        ends.append(table.gather(0, ends[-1][None])[0])
    return OptimalPartition(torch.stack(ends[::-1], dim=-1).diff(dim=-1), value)


def _stages(network: Network) -> list[_Stage]:
    """The network as a chain of stages that end where segments end."""
    if isinstance(network, Transformer):
        return _transformer(network)
    if isinstance(network, FNN):
        return _fnn(network)
    return [lambda x: (network(x),)]


def _fnn(network: FNN) -> list[_Stage]:
    def layer(l: int) -> _Stage:
        W, b = network.weights[l], network.biases[l][:, None]
        return lambda z: (W @ (z.relu() if l else z) + b,)

    stages = [layer(l) for l in range(network.depth)]
    return stages if network.linear_last else [*stages, lambda p: (p.relu(),)]


def _transformer(network: Transformer) -> list[_Stage]:
    def block(l: int) -> list[_Stage]:
        def score(z: Tensor) -> tuple[Tensor, Tensor]:
            return network.scores(l, network.reads(z, "1", l)), z

        def attend(scores: Tensor, z: Tensor) -> Tensor:
            return network.attend(l, z, network.patterns(scores))

        if network.is_plain:
            # Attention and W_1 are one segment, and nothing is added to what is fed forward.
            return [
                score,
                lambda scores, z: (network.hidden(l, attend(scores, z)),),
                lambda p: (network.feed_forward(l, p, p),),
            ]
        return [
            score,
            lambda scores, z: (attend(scores, z),),
            lambda u: (network.hidden(l, u), u),
            lambda p, u: (network.feed_forward(l, u, p),),
        ]

    blocks = [stage for l in range(network.depth) for stage in block(l)]
    return [*blocks, lambda z: (network.end(z),)]
