"""Figures: one function for each kind, all in one style.

All raise `InputError` where what is to be drawn is no mapping, or an empty one.
"""

from .curves import (
    curves,
    error_against_budget,
    error_against_rank,
    intervals,
    lines,
    medians,
    scatter,
    spectrum,
)
from .drawings import (
    partitions,
    patterns,
    pictures,
    plane,
    ranges,
    sphere,
    transformer_segments,
)
from .frames import Frames, counts
from .style import Look, looks, use_style
from .touch import Touch

__all__ = [
    "Frames",
    "Look",
    "Touch",
    "counts",
    "curves",
    "error_against_budget",
    "error_against_rank",
    "intervals",
    "lines",
    "looks",
    "medians",
    "partitions",
    "patterns",
    "pictures",
    "plane",
    "ranges",
    "scatter",
    "spectrum",
    "sphere",
    "transformer_segments",
    "use_style",
]
