"""Networks as plain tensors in the paper's notation: weights act on column vectors.

Layer ``l`` maps ``z`` to ``W_l z`` (linear) or ``ReLU(W_l z + b_l)`` (FNN); inputs are columns,
``x`` has shape ``[..., in, samples]``. Every tensor may carry leading batch dimensions: one network
or a thousand, one code path.
"""

from .base import Network
from .conversion import as_network
from .fnn import FNN, pad
from .gap import Gap
from .linear import LinearNetwork, product
from .partition import Partition, Pieces, blocks, shares
from .segments import Segments, missing_shift, regular, segments
from .transformer import Transformer

__all__ = [
    "FNN",
    "Gap",
    "LinearNetwork",
    "Network",
    "Partition",
    "Pieces",
    "Segments",
    "Transformer",
    "as_network",
    "blocks",
    "missing_shift",
    "pad",
    "product",
    "regular",
    "segments",
    "shares",
]
