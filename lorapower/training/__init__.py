"""Gradient training: of many adapters at once by Adam, and of single ones to high precision."""

from .data import Data, Fixed, Fresh
from .descent import Newton, descend, newton
from .engine import begin, train
from .fused import FusedTraining, train_fused
from .lbfgs import minimize
from .polishing import polish
from .tuning import Training, Tuning

__all__ = [
    "Data",
    "Fixed",
    "Fresh",
    "FusedTraining",
    "Newton",
    "Training",
    "Tuning",
    "begin",
    "descend",
    "minimize",
    "newton",
    "polish",
    "train",
    "train_fused",
]
