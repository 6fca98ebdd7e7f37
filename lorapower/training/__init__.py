"""Gradient training: of many adapters at once by Adam, and of single ones to high precision."""

from .data import Data, Fixed, Fresh
from .descent import Newton, descend, newton
from .engine import begin, train
from .flow import Flow, conserved, flow, learned, time_to
from .indirect import FusedTraining, train_fused
from .landscape import Critical, critical_points
from .lbfgs import minimize
from .polishing import polish
from .tuning import Training, Tuning

__all__ = [
    "Critical",
    "Data",
    "Fixed",
    "Flow",
    "Fresh",
    "FusedTraining",
    "Newton",
    "Training",
    "Tuning",
    "begin",
    "conserved",
    "critical_points",
    "descend",
    "flow",
    "learned",
    "minimize",
    "newton",
    "polish",
    "time_to",
    "train",
    "train_fused",
]
