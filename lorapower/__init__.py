"""The expressive power of low-rank adaptation: networks, adapters, constructions and bounds.

`adapt` makes the adapters that a theorem promises, `rank_for_error` says which rank an error needs.
`adapters`, `bounds`, `constructions` and `networks` are the mathematics, built on `lowrank`;
`regions` are sets of inputs, `randomness` has the random streams. `training` is by gradient,
`experiments` repeats the study, and `book` serves the chapters.
"""

from . import adapters, bounds, constructions, lowrank, networks, regions
from .constructions import adapt, rank_for_error
from .errors import InputError, LorapowerError, PrecisionError, ResultsError, SingularError

__all__ = [
    "InputError",
    "LorapowerError",
    "PrecisionError",
    "ResultsError",
    "SingularError",
    "adapt",
    "adapters",
    "bounds",
    "constructions",
    "lowrank",
    "networks",
    "rank_for_error",
    "regions",
]
