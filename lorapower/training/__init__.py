"""Gradient training: of many adapters at once by Adam, and of linear networks by L-BFGS."""

from .data import Data, Fixed, Fresh
from .engine import train
from .lbfgs import minimize
from .polishing import descend, polish
from .tuning import Training, Tuning

__all__ = ["Data", "Fixed", "Fresh", "Training", "Tuning", "descend", "minimize", "polish", "train"]
