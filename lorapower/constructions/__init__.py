"""For each theorem of the book, the adapters that its proof builds.

`adapt` takes any network; the others are the constructions of one kind, and raise `InputError` for
networks of another.
"""

from .attention import adapt_attention
from .fitted import FittedAdaptation, adapt_fitted
from .fnn import FNNAdaptation, adapt_relu
from .fused import fuse
from .general import Adapted, adapt, rank_for_error
from .linear import Adaptation, LinearAdaptation, adapt_linear
from .transformer import TransformerAdaptation, adapt_transformer

__all__ = [
    "Adaptation",
    "Adapted",
    "FNNAdaptation",
    "FittedAdaptation",
    "LinearAdaptation",
    "TransformerAdaptation",
    "adapt",
    "adapt_attention",
    "adapt_fitted",
    "adapt_linear",
    "adapt_relu",
    "adapt_transformer",
    "fuse",
    "rank_for_error",
]
