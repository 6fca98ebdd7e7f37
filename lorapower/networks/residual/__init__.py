"""Transformers with residual connections and normalization, and the same written otherwise."""

from .decoders import from_decoder, to_decoder
from .network import ACTIVATIONS, PARTS, Activation, Norm, ResidualTransformer
from .rewriting import aligned, basis, enlarged, relabelled, with_gains
from .segments import ResidualSegments, require_alike, residual_segments

__all__ = [
    "ACTIVATIONS",
    "PARTS",
    "Activation",
    "Norm",
    "ResidualSegments",
    "ResidualTransformer",
    "aligned",
    "basis",
    "enlarged",
    "from_decoder",
    "relabelled",
    "require_alike",
    "residual_segments",
    "to_decoder",
    "with_gains",
]
