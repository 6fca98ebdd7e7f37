"""Random streams: one for each seed and purpose, independent of all others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import _checks


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Make the generator of random numbers for a seed and a purpose.

    The purpose says in words what is drawn, and in numbers which of several:
    ``generator(seed, "inputs", 3)``. `number` is its seed, of which torch uses 32 bits on
    processors. Raises `InputError` for a seed that is not an integer from 0.
    """
    return torch.Generator().manual_seed(number(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Draw torch's global random numbers as `generator` does inside a ``with`` block.

    For code that takes no generator, such as `torch.nn.Linear`; the global state is restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(number(seed, *purpose))
        yield


def number(seed: int, *purpose: str | int) -> int:
    """Draw 32 bits from a `numpy.random.SeedSequence` of a seed and a purpose."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=16).digest()
    spawn_key = np.frombuffer(digest, np.uint32).tolist()
    entropy = _checks.integer("seed", seed, 0, None)
    sequence = np.random.SeedSequence(entropy, spawn_key=spawn_key)
    return int(sequence.generate_state(1)[0])


def normal(
    generator: torch.Generator,
    *shape: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Float[Tensor, "*shape"]:
    """Draw standard normal numbers, on the processor so that they are equal on all devices."""
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(device)


def uniform(
    generator: torch.Generator,
    *shape: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Float[Tensor, "*shape"]:
    """Draw numbers uniform from 0 to 1, on the processor as `normal` does."""
    return torch.rand(shape, generator=generator, dtype=dtype, device="cpu").to(device)
