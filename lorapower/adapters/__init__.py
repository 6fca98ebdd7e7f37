"""Adapters: which weight gets which low-rank update ``ΔW = A Bᵀ``, which bias which ``Δb``.

`coding` writes them in few bits.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
