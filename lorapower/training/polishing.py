"""Polish: fitted adapters improved as a whole, by gradient, and kept only where that is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import _checks
from ..adapters import Adapters, N
from ..constructions.fitted import Fit, Fitted, checked, evidence, halves
from ..errors import InputError, brief
from ..lowrank import LowRank
from ..networks import FNN, Network
from ..regions import Region
from .data import Data, Fixed
from .engine import train
from .tuning import Tuning

Start = Literal["fitted", "lora"]
# Of a start that is good already, and of one that is none.
RATES = {"fitted": 3e-3, "lora": 1e-2}
BATCH = 256
CHUNK, PATIENCE = 25, 4


@torch.no_grad()
def polish(
    fitted: Fitted,
    inputs: Tensor,
    held_out: Tensor,
    *,
    starts: Sequence[Start] = ("fitted",),
    steps: int = 0,
    iterations: int = 300,
    data: Data | None = None,
    region: Region | None = None,
    seed: int = 0,
    throw: bool = True,
) -> Fitted:
    """The fitted adapters after minimizing the error of all segments together.

    From each start, all factors and biases first take ``steps`` steps of Adam with a falling rate,
    where asked for, and then up to so many iterations of L-BFGS, none of which makes the error on
    ``inputs`` larger. What has the least error on the first half of the held-out inputs is kept, be
    it the fit itself; the other half gives the error that is returned.

    Parameters
    ----------
    fitted : what `constructions.fitted.adapt` returned for these inputs.
    inputs, held_out : as there.
    starts : ``"fitted"``: its factors, of the fused network. ``"lora"``: those from which adapters
        are usually trained, ``A = 0``; of a transformer in the fused network, which reaches the
        same, of a ReLU network in the frozen network itself, which reaches more. This one needs
        steps.
    steps : of Adam, in single precision.
    data : the batches of these steps; by default 256 of the inputs at a time. Where inputs
        can be drawn, fresh ones fit no noise.
    iterations : of L-BFGS; it ends before, where the held-out error stops falling.
    region, throw : as there.
    seed : of the factors of start ``"lora"`` and of the order of batches.

    Raises `InputError` for unknown starts and unusable numbers, and where a start needs steps.

    Source: the adapters are [def-adapter]'s; nothing is promised but what is measured.
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
    x, others = checked(fitted.fits[0].fused.target, inputs, held_out)
    select = halves(others)[0]
    fits = []
    for fit in fitted.fits:
        goal = fit.fused.target
        pairs = (x, goal(x)), (select, goal(select))
        source = data
        if source is None:
            count = x.shape[0 if goal.sequences else -1]
            samples = min(BATCH, count)
            source = Fixed(*pairs, samples=samples, seed=seed, purpose=("polish",))
        tried = [fit, *_begun(fit, starts, source, steps, seed)]
        tried[1:] = [_descended(one, pairs, iterations) for one in tried[1:]]
        errors = [_error(*_place(one), pairs[1]) for one in tried]
        fits.append(tried[min(range(len(tried)), key=errors.__getitem__)])
    return evidence(fits, x, others, fitted.error.shape, region, throw=throw)


Pair = tuple[Tensor, Tensor]


def _begun(fit: Fit, starts: Sequence[Start], data: Data, steps: int, seed: int) -> Iterator[Fit]:
    """From each start what the steps of Adam make of it; those of one network are run at once."""
    fused = fit.fused
    places: dict[bool, list[Start]] = {}
    for start in starts:
        places.setdefault(start == "lora" and isinstance(fused.network, FNN), []).append(start)
    for direct, begun in places.items():
        network: Network = fused.frozen if direct else fused.network
        found = [fit.factors] * len(begun)
        if steps:
            ranks = fused.ranks if direct else fused.fused_ranks
            each = _checks.ranks_per_layer(ranks, [w.shape[-2:] for w in network.weights])
            runs = train(
                network,
                [Tuning(ranks=each, learning_rate=RATES[s], schedule="cosine") for s in begun],
                data,
                steps=steps,
                every=max(1, steps // 100),
                starts=[fit.factors if s == "fitted" else None for s in begun],
                seed=seed,
            )
            found = [runs.adapters[i].to(network.dtype) for i in range(len(begun))]
        for start, adapters in zip(begun, found, strict=True):
            chosen = (f"polished from {start}",)
            if direct:
                yield replace(fit, direct=adapters, chosen=chosen)
            else:
                yield replace(fit, factors=adapters, direct=None, chosen=chosen)


def _descended(fit: Fit, pairs: tuple[Pair, Pair], iterations: int) -> Fit:
    network, adapters = _place(fit)
    adapters = descend(network, adapters, *pairs, iterations=iterations)
    if fit.direct is None:
        return replace(fit, factors=adapters)
    return replace(fit, direct=adapters)


def descend(
    network: N, adapters: Adapters, training: Pair, validation: Pair, *, iterations: int
) -> Adapters:
    """Adapters after L-BFGS on the mean squared error: the best on other inputs that it met.

    ``training`` and ``validation`` are inputs with the outputs that are wanted. Raises
    `InputError` for adapters that do not fit the network.
    """
    _checks.kind(Adapters, adapters=adapters)
    adapters.merge(network)
    for name, pair in (("training", training), ("validation", validation)):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(name, allowed="a pair of inputs and outputs", given=brief(pair))
        y = _checks.real_tensor(f"{name} outputs", pair[1], min_dims=2)
        wanted = (network(network.as_inputs(pair[0], f"{name} inputs"))).shape
        if y.shape != wanted:
            raise InputError(
                f"{name} outputs", allowed=f"of shape {tuple(wanted)}", given=tuple(y.shape)
            )
    iterations = _checks.integer("iterations", iterations, 0)
    balanced = [u.balanced() for u in adapters.updates]
    flat = [factor for u in balanced for factor in (u.left, u.right)]
    flat += adapters.bias_updates
    parameters = [part.detach().clone(memory_format=torch.contiguous_format) for part in flat]
    tuned = [part.requires_grad_() for part in parameters if part.numel()]

    def assembled() -> Adapters:
        pairs, changes = (
            parameters[: 2 * len(network.weights)],
            parameters[2 * len(network.weights) :],
        )
        updates = (LowRank(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True))
        return Adapters(tuple(updates), tuple(changes))

    def loss(pair: Pair) -> Tensor:
        now = assembled()
        weights = [w + u.matrix() for w, u in zip(network.weights, now.updates, strict=True)]
        biases: Sequence[Tensor] = network.biases
        if now.bias_updates:
            biases = [b + d for b, d in zip(biases, now.bias_updates, strict=True)]
        return (network.holding(weights, biases)(pair[0]) - pair[1]).square().mean()

    best, kept = float(loss(validation)), [part.detach().clone() for part in parameters]
    if not tuned or not iterations:
        return adapters
    optimizer = torch.optim.LBFGS(
        tuned,
        max_iter=CHUNK,
        history_size=30,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(training)
        value.backward()
        return value

    waited = 0
    for _ in _chunks(iterations):
        with torch.enable_grad():
            optimizer.step(closure)
        now = float(loss(validation))
        waited = 0 if now < best * (1 - 1e-3) else waited + 1
        if now < best:
            best, kept = now, [part.detach().clone() for part in parameters]
        if waited == PATIENCE:
            break
    parameters = kept
    return assembled()


def _chunks(iterations: int) -> Iterator[None]:
    yield from [None] * -(-iterations // CHUNK)


def _place(fit: Fit) -> tuple[Network, Adapters]:
    return (
        (fit.fused.network, fit.factors) if fit.direct is None else (fit.fused.frozen, fit.direct)
    )


def _error(network: Network, adapters: Adapters, pair: Pair) -> float:
    return float((adapters.merge(network)(pair[0]) - pair[1]).square().mean())
