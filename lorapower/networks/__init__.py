"""Networks as tensors in the paper's notation: weights act on columns ``[..., in, samples]``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
