"""Gradient training: of many adapters at once by Adam, and of single ones to high precision."""

from .descent import lbfgs, polish
from .engine import train
from .fused import train_fused
from .tuning import Data, Fixed, Fresh, Training, Tuning

__all__ = [
    "Data",
    "Fixed",
    "Fresh",
    "Training",
    "Tuning",
    "lbfgs",
    "polish",
    "train",
    "train_fused",
]
