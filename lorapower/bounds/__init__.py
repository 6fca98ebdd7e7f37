"""Rank thresholds and error bounds, each with the statement of the book that proves it.

All raise `InputError` for a network of another kind than the one they are for.
"""

from . import residual as residual
from . import samples as samples
from .data import first_order, fnn_data_threshold, variance
from .final_layers import Floor, colliding_inputs, final_layers_floor
from .fnn import (
    accumulate_errors,
    activation_sizes,
    fnn_block_errors,
    fnn_error,
    fnn_error_on,
    fnn_threshold,
)
from .linear import error_matrix, error_rank, linear_error, linear_threshold
from .transformer import (
    PairRanks,
    pair_ranks,
    transformer_error,
    transformer_errors,
    transformer_ranks,
    transformer_threshold,
)

__all__ = [
    "Floor",
    "PairRanks",
    "accumulate_errors",
    "activation_sizes",
    "colliding_inputs",
    "error_matrix",
    "error_rank",
    "final_layers_floor",
    "first_order",
    "fnn_block_errors",
    "fnn_data_threshold",
    "fnn_error",
    "fnn_error_on",
    "fnn_threshold",
    "linear_error",
    "linear_threshold",
    "pair_ranks",
    "transformer_error",
    "transformer_errors",
    "transformer_ranks",
    "transformer_threshold",
    "variance",
]
