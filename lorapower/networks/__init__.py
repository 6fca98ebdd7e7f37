"""Networks as plain tensors in the paper's notation: weights act on column vectors.

Layer ``l`` maps ``z`` to ``W_l z`` (linear) or ``ReLU(W_l z + b_l)`` (FNN); inputs are columns,
``x`` has shape ``[..., in, samples]``. Every tensor may carry leading batch dimensions: one network
or a thousand, one code path.
"""

from .base import Network
from .conversion import as_network
from .decoders import from_decoder, to_decoder
from .fnn import FNN, pad
from .gap import Gap
from .linear import LinearNetwork, product
from .partition import Partition, Pieces, blocks, shares
from .residual import ResidualTransformer
from .residual_segments import ResidualSegments, residual_segments
from .rewriting import aligned, enlarged, relabelled, with_gains
from .segments import Segments, missing_shift, regular, segments
from .transformer import Transformer

__all__ = [
    "FNN",
    "Gap",
    "LinearNetwork",
    "Network",
    "Partition",
    "Pieces",
    "ResidualSegments",
    "ResidualTransformer",
    "Segments",
    "Transformer",
    "aligned",
    "as_network",
    "blocks",
    "enlarged",
    "from_decoder",
    "missing_shift",
    "pad",
    "product",
    "regular",
    "relabelled",
    "residual_segments",
    "segments",
    "shares",
    "to_decoder",
    "with_gains",
]
