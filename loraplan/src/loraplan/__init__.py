"""Adapters that stand in for a tuned model, with a stated and certified loss.

A base and what was tuned from it, both of transformers, and some texts are enough::

    import loraplan

    plan = loraplan.plan("base", "tuned", texts, error=0.1)
    print(plan.table(), plan.measured)
    loraplan.extract("base", "tuned", texts, "adapter", error=0.1)

The *base* is the model before tuning, *tuned* after it. An adapter adds an *update* of low rank,
``ΔW = A Bᵀ``, to weights of the base. Experiments that need the parts find them in `loraplan.lab`.
"""

from ._errors import InputError, LoraplanError, ResultsError
from ._export import save_peft
from ._limits import LEAST_TEXTS, mean_limit, quantile_limit, repeated_limit
from ._measuring import Measured
from ._texts import Text, read_texts
from .pair import Adapter, Module, Pair
from .planner import Planner
from .workflow import Plan, PlanOptions, check, extract, plan, prices

__all__ = [
    "LEAST_TEXTS",
    "Adapter",
    "InputError",
    "LoraplanError",
    "Measured",
    "Module",
    "Pair",
    "Plan",
    "PlanOptions",
    "Planner",
    "ResultsError",
    "Text",
    "check",
    "extract",
    "mean_limit",
    "plan",
    "prices",
    "quantile_limit",
    "read_texts",
    "repeated_limit",
    "save_peft",
]
