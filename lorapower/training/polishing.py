"""Polish: fitted adapters improved as a whole, by gradient, and kept only where that is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import _checks
from .._subnormal import flushing
from ..constructions.fitted import Fit, Fitted, checked, evidence, halves
from ..errors import InputError, brief
from ..networks.fnn import FNN
from .data import Data, Fixed
from .descent import descend
from .engine import train
from .tuning import Tuning

Start = Literal["fitted", "lora"]
# Of a start that is good already, and of one that is none.
RATES = {"fitted": 3e-3, "lora": 1e-2}
BATCH = 256


@torch.no_grad()
@flushing()
def polish(
    fitted: Fitted,
    inputs: Tensor,
    held_out: Tensor,
    *,
    starts: Sequence[Start] = ("fitted",),
    steps: int = 0,
    iterations: int = 300,
    data: Data | None = None,
    seed: int = 0,
    throw: bool = True,
) -> Fitted:
    """The fitted adapters after minimizing the error of all segments together.

    From each start, all factors and biases first take ``steps`` steps of Adam with a falling rate,
    where asked for, and then up to so many iterations of L-BFGS, none of which makes the error on
    ``inputs`` larger. What has the least error on the first half of the held-out inputs is kept, be
    it the fit itself; the other half gives the error that is returned.

    Raises `InputError` for unknown starts and unusable numbers, and where a start needs steps.

    Source: the adapters are [def-adapter]'s; nothing is promised but what is measured.

    Parameters
    ----------
    fitted : Fitted
        What `constructions.fitted.adapt` returned for these inputs.
    inputs, held_out : Tensor
        As there.
    starts : sequence of Start
        ``"fitted"``: its factors, of the fused network. ``"lora"``: those from which adapters are
        usually trained, ``A = 0``; of a transformer in the fused network, which reaches the same,
        of a ReLU network in the frozen network itself, which reaches more. This one needs steps.
    steps : int
        Of Adam, in single precision.
    data : Data, optional
        The batches of these steps; by default 256 of the inputs at a time. Where inputs can be
        drawn, fresh ones fit no noise.
    iterations : int
        Of L-BFGS; it ends before, where the held-out error stops falling.
    throw : bool
        As there.
    seed : int
        Of the factors of start ``"lora"`` and of the order of batches.
    """
    _checks.kind(Fitted, fitted=fitted)
    starts = _checks.items("starts", starts, what='"fitted", "lora" or both, in a list')
    for start in starts:
        _checks.choice("starts", start, get_args(Start))
    if not starts or len(set(starts)) < len(starts):
        raise InputError("starts", allowed='"fitted", "lora" or both', given=brief(starts))
    steps = _checks.integer("steps", steps, 0)
    iterations = _checks.integer("iterations", iterations, 0)
    if data is not None:
        _checks.kind(Data, data=data)
    if "lora" in starts and not steps:
        raise InputError(
            "steps", allowed='at least 1 from start "lora"', given=0, remedy="such as 4000"
        )
    seed = _checks.seed(seed)
    goals = [fit.fused.target for fit in fitted.fits]
    x, others = checked(goals[0], inputs, held_out)
    select = halves(others)[0]
    fits = []
    for fit, goal in zip(fitted.fits, goals, strict=True):
        pairs = (x, goal(x)), (select, goal(select))
        source = data
        if source is None:
            samples = min(BATCH, x.shape[0 if goal.sequences else -1])
            source = Fixed(*pairs, samples=samples, seed=seed, purpose=("polish",))
        begun = _begun(fit, starts, source, steps, seed)
        tried = [fit]
        for one in begun:
            adapters = descend(one.network, one.adapters, *pairs, iterations)
            tried.append(replace(one, adapters=adapters))
        fits.append(min(tried, key=lambda one: one.error(*pairs[1])))
    return evidence(fits, x, others, fitted.error.shape, throw=throw)


def _begun(fit: Fit, starts: Sequence[Start], data: Data, steps: int, seed: int) -> Iterator[Fit]:
    """From each start what the steps of Adam make of it; those of one network are run at once."""
    lora = replace(fit, direct=isinstance(fit.fused.network, FNN))
    places: dict[bool, list[tuple[Start, Fit]]] = {}
    for start in starts:
        one = lora if start == "lora" else fit
        places.setdefault(one.direct, []).append((start, one))
    for begun in places.values():
        found = [one.adapters for _, one in begun]
        if steps:
            network, fused = begun[0][1].network, fit.fused
            ranks = fused.ranks if begun[0][1].direct else fused.fused_ranks
            each = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in network.weights])
            runs = train(
                network,
                [
                    Tuning(
                        ranks=each,
                        learning_rate=RATES[s],
                        schedule="cosine",
                        start=one.adapters if s == "fitted" else "study",
                    )
                    for s, one in begun
                ],
                data,
                steps=steps,
                every=max(1, steps // 100),
                seed=seed,
            )
            found = [runs.adapters[i].to(network.dtype) for i in range(len(begun))]
        for (start, one), adapters in zip(begun, found, strict=True):
            yield replace(one, adapters=adapters, chosen=(f"polished from {start}",))
