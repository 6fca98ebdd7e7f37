"""Adapters in few bits: quantized, written as a code that ends by itself, and read back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _checks, lowrank
from ..errors import InputError
from ..lowrank import LowRank
from ..networks.base import Network
from .core import Adapters

# A scale is in half precision.
SCALE_BITS = 16
# A scale is one of these parts of the largest entry.
CLIPS = tuple(np.linspace(0.0, 1.0, 41).tolist())
LARGEST = float(np.finfo(np.float16).max)
# A core's scale is one of these, by its number in five bits.
CORE_SCALES = tuple(2.0 ** (number / 4 - 5) for number in range(32))


class _Code(NamedTuple):
    """A code of ``length`` bits, see `encode`."""

    data: bytes
    length: int


def quantize(part: Tensor, bits: int) -> Tensor:
    """Round each column of a matrix to ``2^bits`` levels, as `encode` does.

    Level ``k`` is the column's scale times ``(2k − m)/m``, ``m = 2^bits − 1``. The scale, in half
    precision, is the one of least squared error among 41 from 0 to the largest entry. Raises
    `InputError` for entries beyond half precision, and for bits outside 1 to 12.
    """
    scale, numbers = _levels(part, bits)
    return _values(scale, numbers, bits)


def _levels(part: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Each column's scale, and the numbers of its entries' levels, ``0 … 2^bits − 1``."""
    bits = _checks.integer("bits", bits, 1, 12)
    if isinstance(part, Tensor) and part.ndim == 2 and not part.shape[1]:
        return part.new_zeros(0), part.long()
    part = _checks.real_tensor("part", part, min_dims=2)
    if (largest := float(part.abs().max())) > LARGEST:
        raise InputError("part", allowed=f"of entries up to {LARGEST:.0f}", given=f"{largest:.3g}")
    steps = 2**bits - 1
    clips = torch.tensor(CLIPS).to(part).reshape(-1, *[1] * part.ndim)
    tried = (clips * part.abs().amax(-2, keepdim=True)).half().to(part)
    ratio = part / torch.where(tried > 0, tried, 1)
    numbers = ((ratio + 1) / 2 * steps).round().clamp(0, steps)
    missed = (tried * (2 * numbers - steps) / steps - part).square().sum(-2, keepdim=True)
    best = missed.argmin(0, keepdim=True)
    scale = tried.gather(0, best)[0, ..., 0, :]
    return scale, numbers.gather(0, best.expand(1, *part.shape))[0].long()


def _values(scale: Tensor, numbers: Tensor, bits: int) -> Tensor:
    steps = 2**bits - 1
    return scale[..., None, :] * (2 * numbers.to(scale) - steps) / steps


def encode(adapters: Adapters, bits: int) -> _Code:
    """Write adapters, rounded to so many bits a number, as a prefix code: none begins another.

    It holds the number of bits, the ranks and whether there are biases, in Elias's gamma code; for
    each column of a factor and each bias a scale of 16 bits; then the numbers. Zeros fill up the
    last byte of its ``data``, which `decode` takes; `bounds.samples.kl_bound` takes its ``length``
    in bits. Rounding is coarse: adapters that were not trained through it may lose everything,
    first those of constructions, whose biases are large. Raises `InputError` for batches, bits
    outside 1 to 12, ranks above a weight's smaller side, and entries beyond half precision.
    """
    bits = _checks.integer("bits", bits, 1, 12)
    if adapters.batch_shape:
        raise InputError("adapters", allowed="of one network", given=adapters)
    _checks.ranks_per_layer(adapters.ranks, adapters.shapes)
    parts = [factor for u in adapters.updates for factor in (u.left, u.right)]
    parts += [bias[:, None] for bias in adapters.bias_updates]
    written = [_gamma(bits), *(_gamma(rank + 1) for rank in adapters.ranks)]
    written.append(_gamma(1 + bool(adapters.bias_updates)))
    for part in parts:
        scale, numbers = _levels(part, bits)
        halves = scale.cpu().numpy().astype(np.float16).view(np.uint16)
        written += [f"{half:0{SCALE_BITS}b}" for half in halves.tolist()]
        written += [f"{number:0{bits}b}" for number in numbers.flatten().tolist()]
    return _pack("".join(written))


def decode(data: bytes, network: Network) -> Adapters:
    """Read a network's adapters from a code, with the numbers that `encode` rounded.

    Raises `InputError` for what is no code for adapters of a network of these sizes.
    """
    code = _unpack(data)
    bits = _read_gamma(code, 12)
    ranks = [_read_gamma(code, min(weight.shape[-2:]) + 1) - 1 for weight in network.weights]
    biases = _read_gamma(code, 2) - 1
    like = network.weights[0]

    def part(rows: int, columns: int) -> Tensor:
        halves = [_read(code, SCALE_BITS) for _ in range(columns)]
        scale = torch.from_numpy(np.array(halves, np.uint16).view(np.float16).astype(np.float64))
        if not scale.isfinite().all():
            raise _no_code("a scale that is no number")
        numbers = torch.tensor([_read(code, bits) for _ in range(rows * columns)])
        return _values(scale, numbers.reshape(rows, columns), bits).to(like)

    updates = tuple(
        LowRank(*(part(side, rank) for side in weight.shape[-2:]))
        for weight, rank in zip(network.weights, ranks, strict=True)
    )
    changes = [part(bias.shape[-1], 1)[:, 0] for bias in network.biases] if biases else []
    _require_end(code)
    return Adapters(updates, tuple(changes))


def quantize_core(core: Tensor, bits: int) -> Tensor:
    """Round a square matrix to ``2^bits`` levels of one scale, as `encode_cores` does.

    Levels are those of `quantize`; the scale is the one of least squared error among 32, each
    ``2^{1/4}`` times the one before, from 1/32 on. Raises `InputError` for bits outside 1 to 12.
    """
    number, numbers = _core_levels(core, bits)
    return _core_values(number, numbers, bits).to(core)


def encode_cores(cores: Sequence[Tensor], bits: int) -> _Code:
    """Write the cores ``C_l`` of adapters ``U C_l Vᵀ`` between singular vectors, a prefix code.

    ``U`` and ``V`` are the leading singular vectors of the frozen weights, which cost nothing.
    The code has the number of bits and the largest core's rank plus 1, in Elias's gamma code; for
    each core a scale of five bits, and its entries. No core, of rank 0, is ``[]``. Raises
    `InputError` for cores that are not square, and for bits outside 1 to 12.
    """
    bits = _checks.integer("bits", bits, 1, 12)
    if any(core.ndim != 2 or core.shape[0] != core.shape[1] for core in cores):
        raise InputError("cores", allowed="square", given=[tuple(core.shape) for core in cores])
    text = _gamma(bits) + _gamma(1 + max((len(core) for core in cores), default=0))
    for core in cores:
        number, numbers = _core_levels(core, bits)
        text += f"{number:05b}" + "".join(f"{n:0{bits}b}" for n in numbers.flatten().tolist())
    return _pack(text)


def decode_cores(data: bytes, network: Network) -> Adapters:
    """Read a network's adapters ``U C_l Vᵀ`` from a code, with the cores that were rounded.

    A weight whose smaller side is below the rank has a core of that side. Raises `InputError` for
    what is no such code.
    """
    code = _unpack(data)
    bits = _read_gamma(code, 12)
    most = _read_gamma(code, 1 + max(min(weight.shape[-2:]) for weight in network.weights)) - 1
    updates = []
    for weight in network.weights:
        left, right = core_sides(weight, most)
        if most:
            number, rank = _read(code, 5), left.shape[1]
            numbers = torch.tensor([_read(code, bits) for _ in range(rank * rank)])
            left = left @ _core_values(number, numbers.reshape(rank, rank), bits).to(left)
        updates.append(LowRank(left, right))
    _require_end(code)
    return Adapters(tuple(updates))


def core_sides(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of a weight, left and right, that a core stands between."""
    parts = lowrank.svd(weight)
    return parts.U[:, :rank], parts.V[:, :rank]


def _core_levels(core: Tensor, bits: int) -> tuple[int, Tensor]:
    """The number of a core's scale, and the numbers of its entries' levels."""
    steps = 2 ** _checks.integer("bits", bits, 1, 12) - 1
    scales = torch.tensor(CORE_SCALES).to(core)[:, None, None]
    numbers = ((core / scales + 1) / 2 * steps).round().clamp(0, steps)
    missed = (scales * (2 * numbers - steps) / steps - core).square().sum((-2, -1))
    best = int(missed.argmin())
    return best, numbers[best].long()


def _core_values(number: int, numbers: Tensor, bits: int) -> Tensor:
    steps = 2**bits - 1
    return CORE_SCALES[number] * (2 * numbers.double() - steps) / steps


def _pack(text: str) -> _Code:
    """Bits as bytes, the last one filled up with zeros."""
    size = -(-len(text) // 8)
    return _Code(int(text.ljust(8 * size, "0"), 2).to_bytes(size, "big"), len(text))


def _unpack(data: bytes) -> Iterator[str]:
    if not isinstance(data, bytes):
        raise InputError("data", allowed="bytes, as `encode` writes them", value=data)
    return iter("".join(f"{byte:08b}" for byte in data))


def _require_end(code: Iterator[str]) -> None:
    """Refuse anything but the zeros that fill up the last byte."""
    rest = "".join(code)
    if len(rest) >= 8 or "1" in rest:
        raise _no_code("more behind it")


def _gamma(number: int) -> str:
    """Elias's gamma code of a number from 1: zeros for its length, then its digits."""
    digits = f"{number:b}"
    return "0" * (len(digits) - 1) + digits


def _read(code: Iterator[str], bits: int) -> int:
    """The number in the next bits of a code."""
    digits = "".join(islice(code, bits))
    if len(digits) < bits:
        raise _no_code("a part of one")
    return int(digits, 2) if bits else 0


def _read_gamma(code: Iterator[str], most: int) -> int:
    """The next number in Elias's gamma code."""
    zeros = 0
    while not _read(code, 1):
        zeros += 1
    number = (1 << zeros) | _read(code, zeros)
    if number > most:
        raise _no_code(f"{number} where {most} is the most")
    return number


def _no_code(given: str) -> InputError:
    return InputError("data", allowed="a code for adapters of this network", given=given)
