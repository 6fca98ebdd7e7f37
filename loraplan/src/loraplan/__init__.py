"""How much of a tuned model a stand-in keeps, and small adapters with a promise of that.

A base and what was tuned from it, both of transformers, and some texts are enough::

    import loraplan

    plan = loraplan.plan("base", "tuned", texts, same=0.9)
    print(plan.certificate, plan.table(), plan.measured)
    loraplan.extract("base", "tuned", texts, "adapter", same=0.9)

The *base* is the model before tuning, *tuned* after it. An adapter adds an *update* of low rank,
``ΔW = A Bᵀ``, to weights of the base. Experiments that need the parts find them in `loraplan.lab`.
"""

from ._errors import InputError, LoraplanError, ResultsError
from ._export import save_peft
from ._limits import (
    LEAST_TEXTS,
    binomial_limit,
    drop_limit,
    mean_limit,
    quantile_limit,
    repeated_limit,
)
from ._measuring import Measured
from ._promises import Promise
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
    "Promise",
    "ResultsError",
    "Text",
    "binomial_limit",
    "check",
    "drop_limit",
    "extract",
    "mean_limit",
    "plan",
    "prices",
    "quantile_limit",
    "read_texts",
    "repeated_limit",
    "save_peft",
]
