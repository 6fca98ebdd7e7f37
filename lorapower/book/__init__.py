"""What only the book's chapters need: their head, parameters, claims and figures."""

from . import claims, figures, outputs
from .notebook import THREADS, quote, quoted, setup
from .parameters import (
    WIDEST,
    Blocks,
    Depth,
    Heads,
    Layers,
    Model,
    Parameters,
    Ranks,
    Seeds,
    Source,
    Tasks,
    Tokens,
    Width,
    results,
    whole,
    wholes,
)

__all__ = [
    "THREADS",
    "WIDEST",
    "Blocks",
    "Depth",
    "Heads",
    "Layers",
    "Model",
    "Parameters",
    "Ranks",
    "Seeds",
    "Source",
    "Tasks",
    "Tokens",
    "Width",
    "claims",
    "figures",
    "outputs",
    "quote",
    "quoted",
    "results",
    "setup",
    "whole",
    "wholes",
]
