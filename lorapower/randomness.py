"""Random streams: one for each seed and purpose, independent of all others by construction.

Everything random in this package is drawn from `generator`, `seeded` or `number`, so that no two
things share a stream: what is drawn for one purpose says nothing of what is drawn for another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import _checks

# Where the state of torch's Mersenne Twister keeps its words, each in 64 bits.
_WORDS = slice(24, 24 + 8 * 624)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Make the generator of random numbers that belongs to a seed and a purpose.

    All 624 words of its state come from a `numpy.random.SeedSequence` of both. Seeding torch's
    generator itself would not do: on processors it takes 32 bits of a seed, whatever it is given.

    Raises `InputError` for a seed that is no integer from 0.

    Parameters
    ----------
    seed : int
        An integer from 0, of any size.
    purpose : str or int
        What is drawn, in words, and which of several, in numbers:
        ``generator(seed, "inputs", 3)``.
    """
    made = torch.Generator()
    state = made.get_state()
    words = np.random.MT19937(_sequence(seed, purpose)).state["state"]["key"]
    state[_WORDS] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    made.set_state(state)
    return made


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Let torch's global random numbers come from `generator` inside a ``with`` block.

    Afterwards the global state is what it was before. This is for code that takes no generator,
    such as the initial weights of `torch.nn.Linear`.
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
    """Draw standard normal numbers.

    They are drawn on the processor and then moved to ``device``, so that equal seeds give equal
    numbers on all devices.
    """
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(device)


def uniform(
    generator: torch.Generator,
    *shape: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Float[Tensor, "*shape"]:
    """Draw numbers uniformly from 0 to 1, on the processor like `normal`."""
    return torch.rand(shape, generator=generator, dtype=dtype, device="cpu").to(device)


def _sequence(seed: int, purpose: tuple[str | int, ...]) -> np.random.SeedSequence:
    """The root of the stream of a seed and a purpose."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=16).digest()
    spawn_key = np.frombuffer(digest, np.uint32).tolist()
    return np.random.SeedSequence(_checks.seed(seed), spawn_key=spawn_key)
