"""The expressive power of low-rank adaptation: networks, adapters, constructions and bounds.

`adapt` makes the adapters that a theorem promises, `rank_for_error` says which rank an error needs.
`adapters`, `bounds`, `constructions` and `networks` are the mathematics, built on `lowrank`;
`regions` are sets of inputs, `randomness` has the random streams. `training` is by gradient,
`experiments` repeats the study, and `book` serves the chapters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
