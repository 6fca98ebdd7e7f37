"""Networks as tensors in the paper's notation: weights act on columns ``[..., in, samples]``."""

from .attention import Settings
from .base import Network
from .decoder import Decoder
from .gap import Gap
from .layers import FNN, LinearNetwork, as_network, product
from .partition import Partition, blocks
from .pretrained import from_decoder, to_decoder
from .segmentation import Segments, segments
from .transformer import Transformer

__all__ = [
    "FNN",
    "Decoder",
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
    "product",
    "segments",
    "to_decoder",
]
