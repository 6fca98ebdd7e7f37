"""ReLU networks from deeper ones: linearization, block by block [lem-linearization]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _checks
from ..adapters import Adapters
from ..errors import PrecisionError
from ..lowrank import LowRank
from ..networks.gap import Gap
from ..networks.layers import FNN, product
from ..networks.partition import Partition, blocks
from ..regions import Ball, Region, as_region
from .linear import Adaptation, adapt_gap


@dataclass(frozen=True, eq=False, repr=False)
class FNNAdaptation(Adaptation):
    """Hold adapters and biases of a ReLU network, and the evidence for them.

    With ``success`` each block loses at most half of the type's digits. ``regions`` hold the
    activations before, between and after the blocks.

    Attributes
    ----------
    block_errors : Tensor
        Predicted ``ε_i = ‖∏_{l∈ℬ_i}(W_l + ΔW_l) − W̄_i‖_2``; ``[..., L̄]``.
    rounding_errors : Tensor
        Measured deviation of each block's product from the predicted one; ``[..., L̄]``.
    digits_lost : Tensor
        Decimal digits that each block's biases should cost, beyond the target layer, on
        `regions.Region.typical` inputs; ``[..., L̄]``.
    """

    partition: Partition
    regions: tuple[Region, ...]
    block_errors: Float[Tensor, "*batch blocks"]
    rounding_errors: Float[Tensor, "*batch blocks"]
    digits_lost: Float[Tensor, "*batch blocks"]

    @property
    def region(self) -> Region:
        """The inputs for which the predictions hold.

        With `regions.Samples` and a target of several layers, only the samples themselves.
        """
        return self.regions[0]

    def covers(
        self, frozen: FNN, x: Float[Tensor, "*#batch in samples"]
    ) -> Bool[Tensor, "*batch samples"]:
        """Say whether inner units are active and surplus outputs of blocks inactive at each input.

        This holds in the region, as the proof needs, and may hold outside.
        """
        x = _checks.columns("x", x, self.region.width)
        preactivations = self.adapters.merge(frozen).preactivations(frozen.fill(x))
        holds = []
        for layers, region in zip(self.partition.slices, self.regions[1:], strict=True):
            *inner, last = preactivations[layers]
            holds += [(p >= 0).all(-2) for p in inner]
            surplus = region.width if layers.stop <= frozen.relus else frozen.widths[-1]
            holds.append((last[..., surplus:, :] <= 0).all(-2))
        return torch.stack(holds).all(0)


@torch.no_grad()
def adapt_relu(
    frozen: FNN | Any,
    target: FNN | Any,
    ranks: _checks.Ranks,
    on: Any = None,
    partition: Partition | None = None,
    *,
    throw: bool = True,
) -> FNNAdaptation:
    """Make a ReLU network imitate a shallower one over a region, by adapters and biases.

    Block ``ℬ_i`` of the frozen layers imitates target layer ``i``; its weights are adapted as a
    deep linear network (`adapt_linear`). The least biases that keep its inner units active over the
    region make its layers affine, the last one takes them back, and the next block's region holds
    the image of this one. Only the first units at the end of a block imitate a narrower target
    (inputs: `Network.fill`); biases switch the others off, except after a linear last layer.

    Raises what `adapt_linear` raises, and `PrecisionError` where biases should cost more than half
    of the type's digits. Source: [thm-one-layer], [thm-partition]; for regions [prop-regions].

    Parameters
    ----------
    frozen, target
        Networks, or what `networks.as_network` takes, of one type, both or neither with a ReLU at
        the end; all batch shapes broadcast.
    on : Region or Tensor
        Where the result holds: everywhere in a `regions.Ball` or `regions.Box`; columns
        ``[..., width, samples]`` become `regions.Samples`. May be left out without ReLUs.
    partition
        Uniform by default.
    ranks, throw
        See `adapt_linear`.

    Examples
    --------
    >>> from lorapower.constructions import adapt_relu
    >>> from lorapower.networks import FNN
    >>> from lorapower.regions import Ball
    >>> frozen, target = FNN.random(4, 8), FNN.random(2, 8, seed=1)
    >>> found = adapt_relu(frozen, target, ranks=4, on=Ball(3.0))
    >>> adapted, x = found.adapters.merge(frozen), Ball(3.0).fit(8, frozen.dtype).sample(100)
    >>> adapted(x).allclose(target(x))
    True
    """
    frozen, target = FNN.of(frozen, "frozen"), FNN.of(target, "target")
    gaps = blocks(frozen, target, partition)
    per_layer = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in frozen.weights])
    if on is None and not frozen.relus:
        on = Ball(1.0)
    region = as_region(on, target.widths[0], frozen.dtype)
    batches = [frozen.batch_shape, target.batch_shape, region.batch_shape]
    batch = _checks.common_shape("frozen, target and on", batches)
    partition = Partition([gap.frozen.depth for gap in gaps])
    limit = -math.log10(torch.finfo(frozen.dtype).eps) / 2
    regions, typical = [region], region.typical(1.0)
    updates, bias_updates, solutions, digits_lost = [], [], [], []
    for i, (gap, layers) in enumerate(zip(gaps, partition.slices, strict=True)):
        block, layer = frozen.layers(layers), target.layers(slice(i, i + 1))
        solution = adapt_gap(gap, per_layer[layers], throw=throw, first=layers.start)
        own, biases, lost, image = _adapt_block(
            block, layer, gap, solution.adapters, regions[-1], typical
        )
        digits_lost.append(lost.expand(batch))
        if throw and (failed := digits_lost[-1] > limit).any():
            worst, member = float(digits_lost[-1][failed][0]), _checks.failed_members(failed)
            raise PrecisionError(i + 1, worst, limit=limit, dtype=frozen.dtype, member=member)
        updates += own
        bias_updates += biases
        solutions.append(solution)
        regions.append(image)
        typical = layer(typical)

    def stack(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value.expand(batch) for value in values], dim=-1)

    accepted = stack(solution.success for solution in solutions) & (stack(digits_lost) <= limit)
    return FNNAdaptation(
        Adapters(tuple(updates), tuple(bias_updates)),
        success=accepted.all(-1),
        partition=partition,
        regions=tuple(regions),
        block_errors=stack(solution.spectral_error for solution in solutions),
        rounding_errors=stack(solution.rounding_error for solution in solutions),
        digits_lost=stack(digits_lost),
    )


def _adapt_block(
    block: FNN,
    layer: FNN,
    gap: Gap,
    adapters: Adapters,
    region: Region,
    typical: Tensor,
) -> tuple[list[LowRank], list[Tensor], Float[Tensor, "*batch"], Region]:
    """Find the biases with which a block, its weights adapted, imitates a target layer.

    Return the updates of its weights and biases, the digits lost, and the region after it.
    """
    updates = [
        LowRank(_pad(update.left, weight.shape[-2]), _pad(update.right, weight.shape[-1]))
        for update, weight in zip(adapters.updates, block.weights, strict=True)
    ]
    weights = [w + update.matrix() for w, update in zip(block.weights, updates, strict=True)]
    reached = gap.reached(sum(adapters.ranks))
    at_centre = reached @ region.centre + layer.biases[0][..., None]
    biases, values = _biases(weights, block, region, at_centre)
    lost = _digits_lost(weights, biases, values, layer, typical)
    # Where all is lost nothing can be said of what comes after.
    sound = lost.isfinite()[..., None, None]
    matrix = product(weights)[..., : at_centre.shape[-2], : region.width]
    image = region.image(torch.where(sound, matrix, 0), torch.where(sound, at_centre, 0))
    changes = [(new - b[..., None])[..., 0] for new, b in zip(biases, block.biases, strict=True)]
    return updates, changes, lost, image.relu() if layer.relus else image


def _biases(
    weights: Sequence[Tensor], block: FNN, region: Region, at_centre: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Make a block's inner layers affine over the region, and its last one right.

    Return biases as columns, and at the region's centre the inputs of the layers and the output.
    """
    # Rounding must not switch off a unit at the edge, even where the region is a single point.
    eps = torch.finfo(region.centre.dtype).eps
    beyond = 1 + eps**0.5
    inputs = weights[0].shape[-1]
    matrix = torch.eye(inputs, region.width).to(region.centre)
    biases, values = [], [_pad(region.centre, inputs)]
    for l, (weight, old) in enumerate(zip(weights, block.biases, strict=True), start=1):
        bias, matrix, before = old[..., None], weight @ matrix, weight @ values[-1]
        slack = (weight.shape[-1] + 4) * eps * (weight.abs() @ values[-1].abs() + bias.abs())
        if l < len(weights):
            shifted = slack - beyond * region.lowest(matrix) - before
        else:
            # Outputs that the target does not have stay as they are, or are switched off.
            surplus = bias
            if block.relus == l:
                surplus = beyond * region.lowest(-matrix) - slack - before
            used = torch.arange(weight.shape[-2], device=bias.device)
            used = used[:, None] < at_centre.shape[-2]
            shifted = torch.where(used, _pad(at_centre, weight.shape[-2]) - before, surplus)
        # What is added to the frozen bias rounds: the sum counts.
        biases.append(bias + (shifted - bias))
        values.append(before + biases[-1])
    return biases, values


def _digits_lost(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    values: Sequence[Tensor],
    layer: FNN,
    typical: Tensor,
) -> Float[Tensor, "*batch"]:
    """Compare a block's expected rounding error with the target layer's, by ``log10``.

    Units count as independent.
    """
    inputs = weights[0].shape[-1]
    covariance = weights[0].new_zeros(inputs, inputs)
    for weight, bias, value in zip(weights, biases, values[:-1], strict=True):
        new = weight.square() @ value.square() + bias.square()
        covariance = weight @ covariance @ weight.mT + torch.diag_embed(new[..., 0])
    outputs = layer.widths[-1]
    of_block = covariance.diagonal(dim1=-2, dim2=-1)[..., :outputs].mean(-1)
    moments = typical.square().mean(-1, keepdim=True)
    of_layer = layer.weights[0].square() @ moments + layer.biases[0].square()[..., None]
    of_layer = of_layer.mean((-2, -1))
    # Sums that overflow tell nothing: all may be lost.
    lost = torch.where(of_block <= of_layer, 0, (of_block / of_layer).log10() / 2)
    return lost.nan_to_num(torch.inf, torch.inf)


def _pad(matrix: Tensor, rows: int) -> Tensor:
    """Append rows of zeros."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, rows - matrix.shape[-2]))
