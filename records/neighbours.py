"""How other tools choose ranks by singular values, at an equal number of parameters.

All of them cut off the singular value decomposition of each change, as `choose` does. Asked for one
rank for all modules, ``mergekit`` and ``convert_to_lora`` of ``peft`` write the same products, and
so do kohya's ``resize_lora`` and, by their abstracts, PHLoRA (arXiv 2509.10971) and, but for its
randomized decomposition, LoRA-Squeeze (2602.10993). `RULES` are for unequal ranks.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loraplan import Adapter, Module
from loraplan.lab import LowRank
from lorapower.lowrank import SVD

#: The threshold from which on a rule keeps each singular value, by tool and option: of ``peft``
#: 0.21.2 (``convert_to_lora``, whose number is a share of ``Σσ²``; kohya's ``sv_fro`` takes its
#: root), kohya's ``resize_lora`` (sd-scripts, commit 063ef10), and PARA (arXiv 2604.27796), which
#: compares singular values of all modules as they are, as ``--sv-epsilon`` of mergekit 0.1.5 does.
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "peft, energy": lambda values: _share_before(values.square()),
    "kohya, sv_ratio": lambda values: values[0] / values,
    "kohya, sv_cumulative": lambda values: _share_before(values),
    "PARA": lambda values: 1 / values,
}


def _share_before(terms: Tensor) -> Tensor:
    """The share of a sum that stands before each of its terms."""
    return (terms.cumsum(0) - terms) / terms.sum()


def choose(
    rule: str, changes: Mapping[str, SVD], modules: Mapping[str, Module], parameters: int
) -> tuple[float, Adapter]:
    """Find the largest threshold that parameters pay for, or the least, and its adapter."""
    thresholds = {name: RULES[rule](change.S.double()) for name, change in changes.items()}

    def ranks(threshold: float) -> dict[str, int]:
        return {name: int((each <= threshold).sum()) for name, each in thresholds.items()}

    def cost(threshold: float) -> int:
        return sum(modules[name].cost * rank for name, rank in ranks(threshold).items())

    steps = torch.cat([*thresholds.values()]).unique().tolist()
    found = steps[max(bisect.bisect(steps, parameters, key=cost), 1) - 1]
    factors = {}
    for name, rank in ranks(found).items():
        if rank:
            U, S, V = changes[name]
            root = S[:rank].sqrt()
            factors[name] = LowRank(U[:, :rank] * root, V[:, :rank] * root)
    return found, Adapter(factors, {})


class Allocation(NamedTuple):
    """The module of each step in which more parameters are spent, and the costs after it."""

    modules: list[str]
    costs: np.ndarray[tuple[int], np.dtype[np.int64]]

    def ranks(self, parameters: int) -> dict[str, int]:
        """Ranks for at most so many parameters."""
        return self.after(int(np.searchsorted(self.costs, parameters, side="right")))

    def after(self, steps: int) -> dict[str, int]:
        """Ranks after so many steps; modules of rank 0 are left out."""
        return dict(Counter(self.modules[:steps]))


def allocate(
    values: Mapping[str, Float[Tensor, " k"]], modules: Mapping[str, Module]
) -> Allocation:
    """Order directions by ``σ²/cost``, the largest first.

    Among all ranks that cost as much, those after each step have the least predicted squared error
    ``Σ_m Σ_{d>r_m} σ_d²`` [prop-allocation]. ``ranks(parameters)`` of the result are those for at
    most so many parameters, ``after(steps)`` those after so many steps.
    """
    items = [
        (square / modules[name].cost, name)
        for name, sigma in values.items()
        for square in sigma.double().square().tolist()
        if square
    ]
    names = [name for _, name in sorted(items, key=lambda item: -item[0])]
    return Allocation(names, np.cumsum([modules[name].cost for name in names], dtype=np.int64))
