"""The expressive power of low-rank adaptation: networks, adapters, constructions and bounds.

``adapters``, ``bounds``, ``constructions`` and ``networks`` are the mathematics, built on
``lowrank``; ``regions`` are sets of inputs. ``sweeps`` runs experiments, and
``finetuning`` adapts text encoders; ``figures``, ``claims``
and ``parameters`` serve the book's chapters.
"""

from . import adapters, bounds, constructions, lowrank, networks, regions
from .errors import InputError, LorapowerError, PrecisionError, ResultsError, SingularError

__all__ = [
    "InputError",
    "LorapowerError",
    "PrecisionError",
    "ResultsError",
    "SingularError",
    "adapters",
    "bounds",
    "constructions",
    "lowrank",
    "networks",
    "regions",
]
