"""Constructions: for each theorem of the book, the adapters that its proof builds."""

from . import linear

__all__ = ["linear"]
