"""Round adapters to few bits, and count the bits of a code in which no word begins another.

The code of factors and biases has the number of bits, the ranks, and whether there are biases, in
Elias's gamma code; then, for each column of a factor and each bias, a scale of 16 bits and the
numbers of its entries. The code of cores has the number of bits and the largest rank plus 1 in
gamma code; then, for each core, a scale of five bits and its entries. All lengths follow from what
was read before, so that a word ends where no other goes on: this is what [thm-occam] asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import lowrank
from ..adapters import Adapters
from ..errors import InputError

SCALE_BITS, CORE_SCALE_BITS = 16, 5
# A column's scale is one of these parts of its largest entry.
CLIPS = torch.tensor(np.linspace(0.0, 1.0, 41), dtype=torch.float32)
LARGEST = torch.finfo(torch.float16).max
# A core's scale is one of these.
CORE_SCALES = torch.tensor(
    [2.0 ** (number / 4 - 5) for number in range(2**CORE_SCALE_BITS)], dtype=torch.float64
)


def quantize(part: Float[Tensor, "rows columns"], bits: int) -> Float[Tensor, "rows columns"]:
    """Round each column of a matrix to ``2^bits`` levels.

    Level ``k`` is the column's scale times ``(2k − m)/m``, ``m = 2^bits − 1``. The scale, in half
    precision, is the one of least squared error among 41 from 0 to the largest entry. Raises
    `InputError` for entries beyond half precision.
    """
    if not part.numel():
        return part
    if (largest := float(part.abs().max())) > LARGEST:
        raise InputError("part", allowed=f"of entries up to {LARGEST:.0f}", given=f"{largest:.3g}")
    scales = (CLIPS.to(part)[:, None, None] * part.abs().amax(0)).half().to(part)
    levels = _levels(part / torch.where(scales > 0, scales, 1), bits)
    values = scales * levels / (2**bits - 1)
    best = (values - part).square().sum(1, keepdim=True).argmin(0, keepdim=True)
    return values.gather(0, best.expand(1, *part.shape))[0]


def quantize_core(core: Float[Tensor, "R R"], bits: int) -> Float[Tensor, "R R"]:
    """Round a square matrix to ``2^bits`` levels of one scale, in double precision.

    Levels are those of `quantize`; the scale is the one of least squared error among 32, each
    ``2^{1/4}`` times the one before, from 1/32 on.
    """
    scales = CORE_SCALES.to(core)[:, None, None]
    levels = _levels(core / scales, bits)
    values = scales * levels / (2**bits - 1)
    best = int((values - core).square().sum((-2, -1)).argmin())
    return CORE_SCALES[best] * levels[best].double() / (2**bits - 1)


def _levels(ratio: Tensor, bits: int) -> Tensor:
    """The nearest of ``2^bits`` levels ``m·ratio``, from −m to m."""
    steps = 2**bits - 1
    return 2 * ((ratio + 1) / 2 * steps).round().clamp(0, steps) - steps


def core_sides(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of a weight, left and right, that a core stands between."""
    parts = lowrank.svd(weight)
    return parts.U[:, :rank], parts.V[:, :rank]


def code_length(adapters: Adapters, bits: int) -> int:
    """Count the bits of the code of adapters."""
    header = [bits, *(rank + 1 for rank in adapters.ranks), 1 + bool(adapters.bias_updates)]
    parts = [factor for u in adapters.updates for factor in (u.left, u.right)]
    columns = 2 * sum(adapters.ranks) + len(adapters.bias_updates)
    numbers = sum(part.numel() for part in [*parts, *adapters.bias_updates])
    return sum(map(_gamma, header)) + SCALE_BITS * columns + bits * numbers


def cores_length(cores: Sequence[Tensor], bits: int) -> int:
    """Count the bits of the code of cores; no core, of rank 0, is ``[]``."""
    header = _gamma(bits) + _gamma(1 + max((len(core) for core in cores), default=0))
    return header + sum(CORE_SCALE_BITS + bits * core.numel() for core in cores)


def _gamma(number: int) -> int:
    """Bits of a number from 1 in Elias's gamma code."""
    return 2 * number.bit_length() - 1
