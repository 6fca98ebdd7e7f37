"""Constructions: for each theorem of the book, the adapters that its proof builds."""

from . import fnn, linear

__all__ = ["fnn", "linear"]
