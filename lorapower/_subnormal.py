"""Subnormal numbers as zeros: some processors are slow with them, and sums do not feel them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushing() -> Iterator[None]:
    """Take subnormal numbers as zeros in this thread and those it starts (but not torch's)."""
    before = is_flushing()
    flush()
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def flush() -> None:
    """Take subnormal numbers as zeros from now on; an initializer for pools."""
    torch.set_flush_denormal(True)


def is_flushing() -> bool:
    """Whether the calling thread takes subnormal numbers as zeros."""
    return sys.float_info.min / 2 == 0
