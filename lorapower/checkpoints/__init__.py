"""Ranks for real checkpoints: for a stated error of the function, and the adapter that has it.

A base and what was tuned from it, both of transformers, and some texts are enough::

    from lorapower import checkpoints

    plan = checkpoints.plan("base", "tuned", texts, error=0.1)
    print(plan.table(), plan.measured)
    checkpoints.extract("base", "tuned", texts, "adapter", error=0.1)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
