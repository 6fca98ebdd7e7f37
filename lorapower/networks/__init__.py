"""Networks as plain tensors in the paper's notation: weights act on column vectors.

Layer ``l`` maps ``z`` to ``W_l z`` (linear) or ``ReLU(W_l z + b_l)`` (FNN); inputs are columns,
``x`` has shape ``[..., in, samples]``. Every tensor may carry leading batch dimensions: one network
or a thousand, one code path.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
