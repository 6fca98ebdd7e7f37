"""An adversary of the constructions for linear networks, which knows only error and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _checks, randomness
from .._subnormal import flushing
from ..networks.gap import Gap
from ..networks.linear import LinearNetwork, product


@flushing()
def minimize(
    frozen: LinearNetwork,
    target: LinearNetwork,
    ranks: int | Sequence[int],
    *,
    starts: int = 16,
    iterations: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "*batch starts"]:
    """Frobenius errors ``‖∏(W_l + A_l B_lᵀ) − W̄‖_F`` that L-BFGS reaches from random factors.

    Independent of every construction: it knows only the error and its gradient. All members of the
    batch and all starts are minimized together, as one sum. Factors start at ``N(0, 0.25²)``.
    ``ranks`` are one for all layers, or one for each.
    Raises `InputError` for a rank above a layer's smaller side and for networks that do not fit.
    """
    frozen, target = LinearNetwork.of(frozen), LinearNetwork.of(target)
    Gap(frozen, target)  # refuses what does not fit
    starts = _checks.integer("starts", starts, 1)
    iterations = _checks.integer("iterations", iterations, 1)
    ranks = _checks.ranks_per_layer(ranks, [tuple(w.shape[-2:]) for w in frozen.weights])
    generator = randomness.generator(seed, "starts")

    def start(size: int, R: int) -> Tensor:
        shape = (*frozen.batch_shape, starts, size, R)
        drawn = randomness.normal(generator, *shape, dtype=frozen.dtype, device=frozen.device)
        factor = 0.25 * drawn
        return factor.requires_grad_()

    factors = [
        [start(size, R) for size in weight.shape[-2:]]
        for weight, R in zip(frozen.weights, ranks, strict=True)
    ]
    goal = target.product().unsqueeze(-3)

    def squared_errors() -> Tensor:
        adapted = [
            weight.unsqueeze(-3) + A @ B.mT
            for weight, (A, B) in zip(frozen.weights, factors, strict=True)
        ]
        return (product(adapted) - goal).square().sum((-2, -1))

    optimizer = torch.optim.LBFGS(
        [factor for pair in factors for factor in pair],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = squared_errors().sum()
        total.backward()
        return total

    if any(factor.numel() for pair in factors for factor in pair):
        optimizer.step(loss)
    return squared_errors().detach().sqrt()
