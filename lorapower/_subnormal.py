"""Subnormal numbers taken as zeros: on some processors arithmetic with them is many times as slow.

Saturated softmaxes make products below 1e−38, of which nothing is felt in a sum.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushing() -> Iterator[None]:
    """Within it the calling thread computes with zeros in the place of subnormal numbers.

    Threads that are started within it do so too, those that torch has started before do not. Also a
    decorator of functions.
    """
    before = is_flushing()
    flush()
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flush() -> None:
    """From now on; for the threads of a pool, as its initializer."""
    torch.set_flush_denormal(True)


def is_flushing() -> bool:
    """Whether the calling thread takes subnormal numbers as zeros."""
    return sys.float_info.min / 2 == 0
