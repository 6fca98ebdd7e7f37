"""For each theorem of the book, the adapters that its proof builds; `adapt` takes every network.

The others raise `InputError` for networks of another kind than theirs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
