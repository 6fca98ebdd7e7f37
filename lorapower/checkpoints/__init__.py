"""Ranks for real checkpoints: for a stated error of the function, and the adapter that has it.

A base and what was tuned from it, both of transformers, and some texts are enough::

    from lorapower import checkpoints

    plan = checkpoints.plan("base", "tuned", texts, error=0.1)
    print(plan.table(), plan.measured)
    checkpoints.extract("base", "tuned", texts, "adapter", error=0.1)
"""

from .measuring import Measured
from .pair import Module, Other, Pair
from .planner import METHODS, PATHS, Planner
from .workflow import Plan, check, compare, extract, plan

__all__ = [
    "METHODS",
    "PATHS",
    "Measured",
    "Module",
    "Other",
    "Pair",
    "Plan",
    "Planner",
    "check",
    "compare",
    "extract",
    "plan",
]
