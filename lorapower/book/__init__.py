"""What only the book's chapters need: their parameters, claims and figures."""

from . import claims, figures, parameters

__all__ = ["claims", "figures", "parameters"]
