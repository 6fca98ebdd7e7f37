"""The expressive power of low-rank adaptation: networks, adapters, constructions and bounds.

`adapters`, `bounds`, `constructions` and `networks` are the mathematics, built on `lowrank`;
`regions` are sets of inputs, `randomness` has the random streams. `training` is by gradient,
`experiments` repeats the study, and `book` serves the chapters.
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
