"""Constructions: for each theorem of the book, the adapters that its proof builds.

`adapt` takes networks of every kind, `rank_for_error` says which rank they need. All others
raise `InputError` for a network of another kind than the one they are for.
"""

from . import attention, fitted, fnn, fused, heads, linear, narrow, partition, residual, transformer
from .adaptation import Adaptation
from .general import adapt
from .ranks import NeededRank, rank_for_error

__all__ = [
    "Adaptation",
    "NeededRank",
    "adapt",
    "attention",
    "fitted",
    "fnn",
    "fused",
    "heads",
    "linear",
    "narrow",
    "partition",
    "rank_for_error",
    "residual",
    "transformer",
]
