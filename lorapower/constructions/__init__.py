"""Constructions: for each theorem of the book, the adapters that its proof builds."""

from . import fnn, linear, partition

__all__ = ["fnn", "linear", "partition"]
