from .decoders import from_decoder as from_decoder
from .decoders import to_decoder as to_decoder
from .network import ACTIVATIONS as ACTIVATIONS
from .network import PARTS as PARTS
from .network import Activation as Activation
from .network import Norm as Norm
from .network import ResidualTransformer as ResidualTransformer
from .rewriting import aligned as aligned
from .rewriting import basis as basis
from .rewriting import enlarged as enlarged
from .rewriting import relabelled as relabelled
from .rewriting import with_gains as with_gains
from .segments import ResidualSegments as ResidualSegments
from .segments import require_alike as require_alike
from .segments import residual_segments as residual_segments

__all__: list[str]
