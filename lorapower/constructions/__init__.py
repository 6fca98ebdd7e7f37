"""Constructions: for each theorem of the book, the adapters that its proof builds.

All raise `InputError` for a network of another kind than the one they are for.
"""

from . import fnn, linear, narrow, partition, transformer

__all__ = ["fnn", "linear", "narrow", "partition", "transformer"]
