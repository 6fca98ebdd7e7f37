"""Random streams: one for each seed and purpose, independent of all others by construction.

Everything random in this package is drawn from `generator`, `seeded` or `number`, so that no two
things share a stream: what is drawn for one purpose says nothing of what is drawn for another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import _checks
from .errors import InputError, brief

# Where the state of torch's Mersenne Twister keeps its words, each in 64 bits.
_WORDS = slice(24, 24 + 8 * 624)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """The random numbers of this seed for this purpose.

    All 624 words of its state come from a `numpy.random.SeedSequence` of both. Seeding torch's
    generator itself would not do: on processors it takes 32 bits of a seed, whatever it is given.

    Raises `InputError` for a seed that is no integer from 0.

    Parameters
    ----------
    seed : int
        An integer from 0.
    purpose : str or int
        What is drawn, in words, and which one of several, in numbers: ``generator(seed, "inputs",
        3)``.
    """
    made = torch.Generator()
    state = made.get_state()
    words = np.random.MT19937(_sequence(seed, purpose)).state["state"]["key"]
    state[_WORDS] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    made.set_state(state)
    return made


def seeded(seed: int, *purpose: str | int) -> AbstractContextManager[None]:
    """Within it, torch's global numbers are those of `generator`; afterwards as if never drawn.

    For code that takes no generator, such as the first weights of `torch.nn.Linear`.
    """
    return _in_state(generator(seed, *purpose).get_state())


@contextmanager
def _in_state(state: Tensor) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield


def number(seed: int, *purpose: str | int) -> int:
    """A seed of 32 bits for libraries that take nothing else."""
    return int(_sequence(seed, purpose).generate_state(1)[0])


def normal(
    generator: torch.Generator,
    *shape: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Float[Tensor, "*shape"]:
    """Standard normal numbers on ``device``, as `generator` gives them.

    As with `uniform`, they are drawn where the generator is, on processors, so that equal seeds
    give equal numbers wherever these are needed.
    """
    return _drawn(torch.randn, generator, shape, dtype).to(device)


def uniform(
    generator: torch.Generator,
    *shape: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Float[Tensor, "*shape"]:
    """Numbers that are uniform on 0 to 1; else like `normal`."""
    return _drawn(torch.rand, generator, shape, dtype).to(device)


def _drawn(
    draw: Callable[..., Tensor], generator: torch.Generator, shape: Any, dtype: torch.dtype
) -> Tensor:
    if not isinstance(generator, torch.Generator):
        raise InputError("generator", allowed="one of `generator`", given=brief(generator))
    shape, dtype = _checks.sizes("shape", shape), _checks.precision(dtype)
    return draw(shape, generator=generator, dtype=dtype, device="cpu")


def _sequence(seed: int, purpose: tuple[str | int, ...]) -> np.random.SeedSequence:
    seed = _checks.seed(seed)
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=16).digest()
    return np.random.SeedSequence(seed, spawn_key=np.frombuffer(digest, np.uint32).tolist())
