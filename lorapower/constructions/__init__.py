"""For each theorem of the book, the adapters that its proof builds.

Each module's ``adapt`` is the construction of its theorem and raises `InputError` for networks of
another kind; `adapt` here takes every network to the one for its kind.
"""

from . import fitted, fnn, fused, linear, transformer
from .attention import attention_only
from .general import adapt, rank_for_error
from .linear import Adaptation

__all__ = [
    "Adaptation",
    "adapt",
    "attention_only",
    "fitted",
    "fnn",
    "fused",
    "linear",
    "rank_for_error",
    "transformer",
]
