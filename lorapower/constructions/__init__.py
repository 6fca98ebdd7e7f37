"""For each theorem of the book, the adapters that its proof builds; `adapt` takes every network."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
