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

# The bytes of the state of torch's Mersenne Twister that hold its words, each in 64 bits.
_WORDS = slice(24, 24 + 8 * 624)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Make the generator of random numbers for a seed and a purpose.

    The purpose says in words what is drawn, and in numbers which of several:
    ``generator(seed, "inputs", 3)``. A `numpy.random.SeedSequence` of seed and purpose fills all
    624 words of the generator's state, since torch itself uses 32 bits of a seed on processors.
    Raises `InputError` for a seed that is not an integer from 0.
    """
    made = torch.Generator()
    state = made.get_state()
    words = np.random.MT19937(_sequence(seed, purpose)).state["state"]["key"]
    state[_WORDS] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    made.set_state(state)
    return made


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Draw torch's global random numbers from `generator` inside a ``with`` block.

    For code that takes no generator, such as `torch.nn.Linear`; the global state is restored.
    """
    state = generator(seed, *purpose).get_state()
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield


def number(seed: int, *purpose: str | int) -> int:
    """Draw a seed of 32 bits for libraries that take nothing else."""
    return int(_sequence(seed, purpose).generate_state(1)[0])


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


def _sequence(seed: int, purpose: tuple[str | int, ...]) -> np.random.SeedSequence:
    """Make the root of the stream of a seed and a purpose."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=16).digest()
    spawn_key = np.frombuffer(digest, np.uint32).tolist()
    return np.random.SeedSequence(_checks.integer("seed", seed, 0, None), spawn_key=spawn_key)
