"""Draw figures: one function for each kind, all in one style."""

from ...errors import needs

with needs("book"):
    from ._style import COLORS, use_style
    from .choices import Choices, show_at
    from .curves import curves, error_against_rank, intervals, tidy

__all__ = [
    "COLORS",
    "Choices",
    "curves",
    "error_against_rank",
    "intervals",
    "show_at",
    "tidy",
    "use_style",
]
