"""Networks as plain tensors in the paper's notation: weights act on column vectors.

Layer ``l`` maps ``z`` to ``W_l z`` (linear) or ``ReLU(W_l z + b_l)`` (FNN); inputs are columns,
``x`` has shape ``[..., in, samples]``. Every tensor may carry leading batch dimensions: one network
or a thousand, one code path.
"""

from .fnn import FNN, pad
from .linear import LinearNetwork, product
from .partition import Block, Partition, block, blocks, fits
from .segments import Segment, Segments, segments
from .transformer import Transformer

__all__ = [
    "FNN",
    "Block",
    "LinearNetwork",
    "Partition",
    "Segment",
    "Segments",
    "Transformer",
    "block",
    "blocks",
    "fits",
    "pad",
    "product",
    "segments",
]
