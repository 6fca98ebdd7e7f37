"""Rank thresholds and error bounds, each with the statement of the book that proves it.

All raise `InputError` for networks of another kind than theirs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
