"""Constructions: for each theorem of the book, the adapters that its proof builds."""

from . import fnn, linear, narrow, partition, transformer

__all__ = ["fnn", "linear", "narrow", "partition", "transformer"]
