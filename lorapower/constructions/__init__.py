"""Constructions: for each theorem of the book, the adapters that its proof builds.

`adapt` takes networks of every kind, `rank_for_error` says which rank they need. All others
raise `InputError` for a network of another kind than the one they are for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
