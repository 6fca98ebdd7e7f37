"""Networks as plain tensors in the paper's notation; inputs are columns, ``[..., in, samples]``.

Layer ``l`` maps ``z`` to ``W_l z`` (linear) or ``ReLU(W_l z + b_l)`` (FNN). Leading dimensions of
tensors are a batch of networks.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
