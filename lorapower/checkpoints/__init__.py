"""Ranks for real checkpoints: for a stated error of the function, and the adapter that has it.

A base and what was tuned from it, both of transformers, and some texts are enough::

    from lorapower import checkpoints

    plan = checkpoints.plan("base", "tuned", texts, error=0.1)
    print(plan.table(), plan.measured)
    checkpoints.extract("base", "tuned", texts, "adapter", error=0.1)
"""

from ._export import save_peft
from ._limits import Evidence, quantile_limit
from ._measuring import Measured
from ._texts import LEAST_TEXTS, Text, read_texts
from .pair import Adapter, Module, Pair
from .planner import Planner
from .workflow import Plan, check, extract, plan, prices

__all__ = [
    "LEAST_TEXTS",
    "Adapter",
    "Evidence",
    "Measured",
    "Module",
    "Pair",
    "Plan",
    "Planner",
    "Text",
    "check",
    "extract",
    "plan",
    "prices",
    "quantile_limit",
    "read_texts",
    "save_peft",
]
