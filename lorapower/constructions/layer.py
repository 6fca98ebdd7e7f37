"""One layer fitted to inputs: least squares of a given rank, with or without shrinkage."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..lowrank import LowRank
from ..regression import Regression, reduced_rank

# Of coefficients towards the error matrix, in mean variances of an input, and how a fit is called.
SHRINKAGES = {
    "repair": 0.0,
    **{f"shrinkage {s}": s for s in (0.01, 0.1, 1.0)},
    "inputs": inf,
}


@torch.no_grad()
def fit(
    W: Tensor,
    W_target: Tensor,
    rank: int,
    own: Sequence[Tensor],
    reach: Sequence[Tensor],
    metric: Tensor | None,
    theorem: LowRank,
    bias: Sequence[Tensor],
) -> tuple[Regression, str]:
    """The change of one layer's weight, and how it was found.

    Several shrinkages towards the target's weight and the theorem's change are compared, in the
    metric that is given.

    Source: [thm-reduced-rank].

    Parameters
    ----------
    W, W_target : Tensor
        The layer's weight and the target's.
    own, reach : sequence of Tensor
        Columns that enter the layer and the outputs that are wanted of it, in pairs: the first are
        fitted, the second choose.
    theorem, bias
        The change of the theorem's construction, and its bias; none where the layer has no bias.
    """
    E = W_target - W
    free = bool(bias)
    options: dict[str, Any] = {"towards": E, "metric": metric, "intercept": free}
    missing = reach[0] - W @ own[0]
    candidates = {
        name: reduced_rank(missing, own[0], rank, shrinkage=shrinkage, **options)
        for name, shrinkage in SHRINKAGES.items()
    }
    a = bias[0] if free else torch.zeros_like(W[:, 0])
    candidates["theorem"] = Regression(theorem, a)

    def error(name: str) -> float:
        change, a = candidates[name]
        missed = reach[1] - (W + change.matrix()) @ own[1] - a[:, None]
        return float((missed if metric is None else metric @ missed).square().mean())

    best = min(candidates, key=error)
    return candidates[best], best
