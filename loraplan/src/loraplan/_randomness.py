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
    """Make the generator for a seed and a purpose, of which all 624 words are drawn from both.

    Torch itself uses 32 bits of a seed on processors. Raises `InputError` for a seed below 0.
    """
    stream = torch.Generator()
    state = stream.get_state()
    words = np.random.MT19937(_sequence(seed, purpose)).state["state"]["key"]
    state[_WORDS] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    stream.set_state(state)
    return stream


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Draw torch's global random numbers from `generator` inside a ``with`` block."""
    state = generator(seed, *purpose).get_state()
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield


def number(seed: int, *purpose: str | int) -> int:
    """Draw a seed of 32 bits for libraries that take nothing else."""
    return int(_sequence(seed, purpose).generate_state(1)[0])


def normal(
    generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "*shape"]:
    """Draw standard normal numbers, on the processor so that they are equal on all devices."""
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


def _sequence(seed: int, purpose: tuple[str | int, ...]) -> np.random.SeedSequence:
    """Make the root of the stream of a seed and a purpose."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=16).digest()
    spawn_key = np.frombuffer(digest, np.uint32).tolist()
    return np.random.SeedSequence(_checks.integer("seed", seed, 0, 2**128), spawn_key=spawn_key)
