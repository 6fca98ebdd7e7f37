"""Networks as plain tensors in the paper's notation: weights act on column vectors.

Layer ``l`` maps ``z`` to ``W_l z``; inputs are columns, ``x`` has shape ``[..., in, samples]``.
Every tensor may carry leading batch dimensions: one network or a thousand, one code path.
"""

from .linear import LinearNetwork, product

__all__ = ["LinearNetwork", "product"]
