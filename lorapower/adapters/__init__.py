"""Adapters: which weight gets which low-rank update ``ΔW = A Bᵀ``, which bias which ``Δb``."""

from .coding import Code, decode, encode, quantized
from .core import Adapters, N, Tuned

__all__ = ["Adapters", "Code", "N", "Tuned", "decode", "encode", "quantized"]
