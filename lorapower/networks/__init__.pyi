from . import rewriting as rewriting
from ._segments import Segments as Segments
from .base import Network as Network
from .decoders import DoublePrecision as DoublePrecision
from .decoders import from_decoder as from_decoder
from .decoders import to_decoder as to_decoder
from .gap import Gap as Gap
from .layers import FNN as FNN
from .layers import LinearNetwork as LinearNetwork
from .layers import as_network as as_network
from .layers import pad as pad
from .layers import product as product
from .partition import Partition as Partition
from .partition import blocks as blocks
from .transformer import BlockTrace as BlockTrace
from .transformer import Transformer as Transformer

__all__: list[str]
