"""Networks as tensors in the paper's notation: weights act on columns ``[..., in, samples]``."""

from .base import Network
from .decoders import from_decoder, to_decoder
from .gap import Gap
from .layers import FNN, LinearNetwork, as_network, product
from .partition import Partition, blocks
from .segmentation import Segments, is_regular, segments
from .transformer import Settings, Transformer

__all__ = [
    "FNN",
    "Gap",
    "LinearNetwork",
    "Network",
    "Partition",
    "Segments",
    "Settings",
    "Transformer",
    "as_network",
    "blocks",
    "from_decoder",
    "is_regular",
    "product",
    "segments",
    "to_decoder",
]
