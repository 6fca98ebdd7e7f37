"""Gradient training: of many adapters at once by Adam, and of single ones to high precision."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
