"""Figures: one function for each kind, all in one style.

All raise `InputError` where what is to be drawn is no mapping, or an empty one.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
