"""Adapters in few bits: quantized, written as a code that ends by itself, and read back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _checks, _objects
from ..errors import InputError, brief
from ..lowrank import LowRank
from ..networks import Network
from .core import Adapters

# Of a number of single precision that scales what is written beside it.
SCALE_BITS = 16
# Parts of the largest number that the outermost level may stand for; the nearest to all is taken.
CLIPS = tuple(np.linspace(0.2, 1.0, 33).tolist())


@_objects.held
class Code(NamedTuple):
    """What is written.

    Attributes
    ----------
    data : the code; the last byte is filled up with zeros.
    length : its number of bits.
    """

    data: bytes
    length: int


def levels(part: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """For each column its scale and the numbers of its entries' levels, ``0 … 2^bits − 1``.

    Level ``k`` stands for the scale times ``(2k − m)/m``, ``m = 2^bits − 1``. The scale is that of
    some whose squared error is least, rounded to half precision.
    """
    bits = _checks.integer("bits", bits, 1, 12)
    if isinstance(part, Tensor) and part.ndim == 2 and not part.shape[1]:
        return part.new_zeros(0), part.long()
    part = _checks.real_tensor("part", part, min_dims=2)
    steps = 2**bits - 1
    clips = torch.tensor(CLIPS).to(part).reshape(-1, *[1] * part.ndim)
    tried = (clips * part.abs().amax(-2, keepdim=True)).half().to(part)
    ratio = part / torch.where(tried > 0, tried, 1)
    numbers = ((ratio + 1) / 2 * steps).round().clamp(0, steps)
    missed = (tried * (2 * numbers - steps) / steps - part).square().sum(-2, keepdim=True)
    best = missed.argmin(0, keepdim=True)
    scale = tried.gather(0, best)[0, ..., 0, :]
    return scale, numbers.gather(0, best.expand(1, *part.shape))[0].long()


def quantized(part: Tensor, bits: int) -> Tensor:
    """The nearest of a part's columns that `encode` can write."""
    scale, numbers = levels(part, bits)
    return _values(scale, numbers, bits)


def _values(scale: Tensor, numbers: Tensor, bits: int) -> Tensor:
    steps = 2**bits - 1
    return scale[..., None, :] * (2 * numbers.to(scale) - steps) / steps


def encode(adapters: Adapters, bits: int) -> Code:
    """Adapters rounded to so many bits a number, as a code of which none begins another.

    It has the number of bits, the ranks and whether there are biases, each in Elias's gamma code;
    for each column of a factor, and for each bias, a scale of 16 bits; and the numbers themselves.

    Raises `InputError` for batches, and for bits outside 1 to 12.
    """
    _checks.kind(Adapters, adapters=adapters)
    bits = _checks.integer("bits", bits, 1, 12)
    if adapters.batch_shape:
        raise InputError("adapters", allowed="of one network", given=adapters)
    parts = [factor for u in adapters.updates for factor in (u.left, u.right)]
    parts += [bias[:, None] for bias in adapters.bias_updates]
    written = [_gamma(bits), *(_gamma(rank + 1) for rank in adapters.ranks)]
    written.append(_gamma(1 + bool(adapters.bias_updates)))
    for part in parts:
        scale, numbers = levels(part, bits)
        halves = scale.cpu().numpy().astype(np.float16).view(np.uint16)
        written += [f"{half:0{SCALE_BITS}b}" for half in halves.tolist()]
        written += [f"{number:0{bits}b}" for number in numbers.flatten().tolist()]
    text = "".join(written)
    data = int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    return Code(data, len(text))


def decode(data: bytes, network: Network) -> Adapters:
    """The adapters of a network that a code stands for, as `encode` has rounded them.

    Raises `InputError` for what is no code for this network.
    """
    _checks.kind(Network, network=network)
    if not isinstance(data, bytes):
        raise InputError("data", allowed="bytes, as `encode` writes them", given=brief(data))
    reader = _Reader(data)
    bits = reader.gamma()
    ranks = [reader.gamma() - 1 for _ in network.weights]
    biases = reader.gamma() - 1
    like = network.weights[0]

    def part(rows: int, columns: int) -> Tensor:
        halves = [reader.number(SCALE_BITS) for _ in range(columns)]
        scale = torch.from_numpy(np.array(halves, np.uint16).view(np.float16).astype(np.float64))
        numbers = torch.tensor([reader.number(bits) for _ in range(rows * columns)])
        return _values(scale, numbers.reshape(rows, columns), bits).to(like)

    updates = tuple(
        LowRank(*(part(side, rank) for side in weight.shape[-2:]))
        for weight, rank in zip(network.weights, ranks, strict=True)
    )
    changes = [part(bias.shape[-1], 1)[:, 0] for bias in network.biases] if biases else []
    return Adapters(updates, tuple(changes))


def _gamma(number: int) -> str:
    """Elias's gamma code of a number from 1: zeros for its length, then its digits."""
    digits = f"{number:b}"
    return "0" * (len(digits) - 1) + digits


class _Reader:
    """Numbers one after the other from a code."""

    def __init__(self, data: bytes) -> None:
        self.text = "".join(f"{byte:08b}" for byte in data)
        self.at = 0

    def number(self, bits: int) -> int:
        piece = self.text[self.at : self.at + bits]
        if len(piece) < bits:
            raise InputError("data", allowed="a whole code for this network", given="a part")
        self.at += bits
        return int(piece, 2)

    def gamma(self) -> int:
        zeros = 0
        while self.number(1) == 0:
            zeros += 1
        return (1 << zeros) | (self.number(zeros) if zeros else 0)
