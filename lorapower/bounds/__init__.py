"""Rank thresholds and error bounds, each with the statement of the book that proves it.

All raise `InputError` for networks of another kind than theirs. A `networks.Gap` has the threshold
and the errors of deep linear networks.
"""

from . import samples
from .final_layers import colliding_inputs, final_layers_floor
from .floors import attention_floor, directions, far_error
from .heads import Heads, HeadTails, head_tails, heads
from .layers import fnn_error, fnn_error_on, fnn_threshold
from .transformer import necessary_ranks, packed_rank, ranks_suffice, transformer_ranks

__all__ = [
    "HeadTails",
    "Heads",
    "attention_floor",
    "colliding_inputs",
    "directions",
    "far_error",
    "final_layers_floor",
    "fnn_error",
    "fnn_error_on",
    "fnn_threshold",
    "head_tails",
    "heads",
    "necessary_ranks",
    "packed_rank",
    "ranks_suffice",
    "samples",
    "transformer_ranks",
]
