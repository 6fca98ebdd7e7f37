"""One layer fitted to inputs by least squares of limited rank [thm-reduced-rank]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..lowrank import LowRank
from ..regression import Regression, reduced_rank

# Shrinkages towards the error matrix, in mean variances of an input, by the name of the fit.
SHRINKAGES = {"repair": 0.0, **{f"shrinkage {s}": s for s in (0.01, 0.1, 1.0)}, "inputs": inf}


@torch.no_grad()
def fit_layer(
    W: Tensor,
    W_target: Tensor,
    rank: int,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    metric: Tensor | None,
    theorem: LowRank,
    bias: Sequence[Tensor],
    shrinkages: Mapping[str, float] = SHRINKAGES,
) -> tuple[Regression, str]:
    """The best update of a weight, fitted to the first pair of data, by the second; its name."""
    free = bool(bias)
    options: dict[str, Any] = {"towards": W_target - W, "metric": metric, "intercept": free}
    missing = outputs[0] - W @ inputs[0]
    candidates = {
        name: reduced_rank(missing, inputs[0], rank, shrinkage=shrinkage, **options)
        for name, shrinkage in shrinkages.items()
    }
    intercept = bias[0] if free else torch.zeros_like(W[:, 0])
    candidates["theorem"] = Regression(theorem, intercept)

    def error(name: str) -> float:
        update, intercept = candidates[name]
        missed = outputs[1] - (W + update.matrix()) @ inputs[1] - intercept[:, None]
        return float((missed if metric is None else metric @ missed).square().mean())

    best = min(candidates, key=error)
    return candidates[best], best
