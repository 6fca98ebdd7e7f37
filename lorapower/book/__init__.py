"""What only the book's chapters need: their head, parameters, claims and figures."""

from . import claims, figures
from .chapter import (
    THREADS,
    WIDEST,
    Parameters,
    Ranks,
    Seeds,
    Steps,
    Width,
    median,
    named,
    quote,
    quoted,
    results,
    setup,
    whole,
)

__all__ = [
    "THREADS",
    "WIDEST",
    "Parameters",
    "Ranks",
    "Seeds",
    "Steps",
    "Width",
    "claims",
    "figures",
    "median",
    "named",
    "quote",
    "quoted",
    "results",
    "setup",
    "whole",
]
