"""Adapters: which weight gets which low-rank update ``ΔW = A Bᵀ``, which bias which ``Δb``.

`coding` writes them in few bits.
"""

from .core import Adapters, N, Tuned

__all__ = ["Adapters", "N", "Tuned"]
