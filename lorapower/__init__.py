"""The expressive power of low-rank adaptation: networks, adapters, constructions and bounds.

``adapters``, ``bounds``, ``constructions`` and ``networks`` are the mathematics, built on
``lowrank``; ``figures``, ``claims`` and ``parameters`` serve the book's chapters.
"""

from . import adapters, bounds, constructions, lowrank, networks
from .errors import InputError, LorapowerError, SingularError

__all__ = [
    "InputError",
    "LorapowerError",
    "SingularError",
    "adapters",
    "bounds",
    "constructions",
    "lowrank",
    "networks",
]
