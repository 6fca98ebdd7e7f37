"""For each theorem of the book, the adapters that its proof builds; `adapt` takes every network.

The others raise `InputError` for networks of another kind than theirs.
"""

from . import fitted, fnn, fused, linear, transformer
from ._blocks import nearest_scores
from .general import adapt, rank_for_error
from .linear import Adaptation

__all__ = [
    "Adaptation",
    "adapt",
    "fitted",
    "fnn",
    "fused",
    "linear",
    "nearest_scores",
    "rank_for_error",
    "transformer",
]
