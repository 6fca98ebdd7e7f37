"""Repair: factors and biases fitted to what the tuned network does, on calibration texts.

First block by block in closed form, each module making good what those before it have missed
[prop-repair]; then all at once by gradient, against the tuned network's outputs. What comes out is
never worse than what went in, by the error on texts that were not fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import randomness
from ..lowrank import LowRank
from .adapter import Adapter, balanced, put
from .measuring import Reference, outputs
from .metrics import watched
from .pair import Module, Pair
from .texts import Batch

# Coefficients are drawn towards the change itself, by this part of the mean variance of inputs.
SHRINKAGE = 0.05
# Of the polish: highest learning rate, against the root mean square of a module's factors.
RATE = 0.03


def regressed(
    change: Float[Tensor, "out in"],
    given: Float[Tensor, "rows in"],
    wanted: Float[Tensor, "rows out"],
    rank: int,
    *,
    root: Float[Tensor, "out out"] | None = None,
    bias: bool = True,
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "in r"], Float[Tensor, " out"]]:
    """The best ``K`` of a rank, and ``a``, for ``wanted ≈ given Kᵀ + a``: reduced-rank regression.

    The least ``E‖R(wanted − K given − a)‖² + λ‖R(K − E)‖²`` over ``K`` of rank ``≤ r`` and all
    ``a`` [prop-repair], with ``E`` the change and ``λ`` the mean variance of what is given times
    `SHRINKAGE`; without ``bias``, ``a = 0``. Returns the factors of ``K`` and ``a``; where all that
    is given is the same, ``K`` is the best of the change itself.
    """
    E, Z, Y = change.double(), given.double(), wanted.double()
    mean, shift = (
        (Z.mean(0), Y.mean(0)) if bias else (Z.new_zeros(Z.shape[1]), Y.new_zeros(Y.shape[1]))
    )
    Z, Y = (Z - mean) / len(Z) ** 0.5, (Y - shift) / len(Z) ** 0.5
    level = SHRINKAGE * float(Z.square().sum()) / Z.shape[1]
    C = Z.mT @ Z
    # Without variance only the second term is left, whatever its weight.
    level = level or 1.0
    C.diagonal().add_(level)
    L = torch.linalg.cholesky(C)
    # B = (YᵀZ + λE) C⁻¹ are the coefficients, and BL = (YᵀZ + λE) L⁻ᵀ needs no inverse.
    BL = torch.linalg.solve_triangular(L, (Y.mT @ Z + level * E).mT, upper=False).mT
    weighted = BL if root is None else root @ BL
    U = torch.linalg.svd(weighted, full_matrices=False)[0][:, :rank]
    B = torch.linalg.solve_triangular(L.mT, BL.mT, upper=True).mT
    left = U if root is None else torch.linalg.solve_triangular(root, U, upper=True)
    right = B.mT @ (U if root is None else root.mT @ U)
    return left, right, shift - left @ (right.mT @ mean)


def blocks(
    pair: Pair,
    network: Any,
    adapter: Adapter,
    fitting: Sequence[Batch],
    roots: Callable[[str], Tensor | None],
    *,
    leave: Collection[str] = (),
    report: Callable[[int, int], None] | None = None,
) -> Adapter:
    """The adapter with each module of a block fitted in turn, by `regressed`, ranks as they are.

    A module's inputs are those of the adapted network, fitted so far; what is wanted of it is what
    the tuned one gives there with its own inputs. ``roots`` has the output metric of a module. Only
    one block at a time has the tuned weights, and hidden states are carried from block to block.
    """
    place = f"{pair.prefix}{pair.family.blocks}"
    number = len(network.get_submodule(place))
    pair.fill(network, "tuned")
    wanted, calls = _entered(network, place, fitting)
    put(pair, network, adapter, leave=leave)
    hidden, _ = _entered(network, place, fitting)
    factors, biases = dict(adapter.factors), dict(adapter.biases)
    biased = "bias" not in leave
    for i in range(number):
        block, prefix = network.get_submodule(f"{place}.{i}"), f"{place}.{i}."
        inside = [module for module in pair.modules.values() if module.name.startswith(prefix)]
        pair.fill(network, "tuned", within=prefix)
        stages, targets, wanted = _targets(network, block, inside, wanted, calls[i], fitting)
        put(pair, network, Adapter(factors, biases), leave=leave, within=prefix)
        for stage in stages:
            given, _ = _ran(network, block, stage[:1], hidden, calls[i], fitting)
            rows = torch.cat(given[stage[0].name][0])
            for module in stage:
                if module.name not in factors:
                    continue
                base = network.get_submodule(module.name)
                weight = pair.weight("base", module)
                bias = base.bias if module.bias else rows.new_zeros(module.shape[0])
                missing = torch.cat(targets[module.name]) - rows @ weight.mT
                free = module.bias and biased
                left, right, shift = regressed(
                    pair.change(module.name),
                    rows,
                    missing if free else missing - bias,
                    factors[module.name].rank,
                    root=roots(module.name),
                    bias=free,
                )
                factors[module.name] = balanced(left, right)
                if free:
                    biases[module.name] = shift.float()
            put(pair, network, Adapter(factors, biases), leave=leave, within=prefix)
        hidden = _ran(network, block, [], hidden, calls[i], fitting)[1]
        if report:
            report(i + 1, number)
    return Adapter(factors, biases)


def polish(
    pair: Pair,
    network: Any,
    adapter: Adapter,
    fitting: Reference,
    choosing: Reference,
    *,
    steps: int,
    seed: int = 0,
    leave: Collection[str] = (),
    report: Callable[[int, int], None] | None = None,
) -> tuple[Adapter, float]:
    """The adapter after steps of gradient descent on ``Σ‖f̂ − f̄‖²``, and its error.

    Adam on factors and biases, whose rate rises, then falls to 0. The error on the texts for
    choosing is taken at the start and eight times on the way, and the best adapter is returned: so
    the start, if nothing is better.
    """
    put(pair, network, Adapter({}, {}), leave=leave)
    trained: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for module in pair.modules.values():
            start = adapter.factors.get(module.name)
            free = module.bias and "bias" not in leave
            if start is None and not free:
                continue
            place = network.get_submodule(module.name)
            parts = [] if start is None else [start.left.clone(), start.right.clone()]
            if free:
                tuned = place.bias.clone()
                parts.append(adapter.biases.get(module.name, tuned).clone() - tuned)
            trained[module.name] = [part.requires_grad_() for part in parts]
            stack.callback(place.register_forward_hook(_added(parts, start is not None)).remove)

        def now() -> Adapter:
            factors, biases = {}, {}
            for name, parts in trained.items():
                values = [part.detach().clone() for part in parts]
                if name in adapter.factors:
                    factors[name] = LowRank(values[0], values[1])
                if len(values) % 2:
                    biases[name] = network.get_submodule(name).bias + values[-1]
            return Adapter(factors, biases)

        groups = [
            {"params": [part], "lr": RATE * _size(part)}
            for parts in trained.values()
            for part in parts
        ]
        optimizer = torch.optim.Adam(groups, lr=RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, steps))
        order = randomness.generator(seed, "polish")
        best, least = adapter, choosing.error(network)
        left: list[int] = []
        for step in range(1, steps + 1):
            left = left or torch.randperm(len(fitting.batches), generator=order).tolist()
            i = left.pop()
            optimizer.zero_grad()
            found = outputs(network, fitting.batches[i], fitting.task)
            loss = (found - fitting.outputs(i)).square().sum() / len(fitting.batches[i].input_ids)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % max(1, steps // 8) == 0 or step == steps:
                error = choosing.error(network)
                if error < least:
                    best, least = now(), error
                if not math.isfinite(error):
                    break
            if report:
                report(step, steps)
    return best, least


def _added(parts: Sequence[Tensor], low_rank: bool) -> Callable[..., Tensor]:
    """A hook that adds ``B``'s and ``A``'s product with the input, and the bias, to the output."""

    def hook(_: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> Tensor:
        if low_rank:
            found = found + (given[0] @ parts[1]) @ parts[0].mT
        return found + parts[-1] if len(parts) % 2 else found

    return hook


def _size(part: Tensor) -> float:
    """What learning rates are relative to: of factors their root mean square."""
    if part.ndim == 1:
        return 0.01
    return max(float(part.detach().square().mean().sqrt()), 1e-6)


def _pace(step: int, steps: int) -> float:
    """Part of the highest rate: rises over a tenth of the steps, then falls along a cosine."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _entered(
    network: Any, place: str, batches: Sequence[Batch]
) -> tuple[list[Tensor], list[list[Call]]]:
    """What the first block is given, by batch; and of each block the rest of its arguments."""
    number = len(network.get_submodule(place))
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in range(number)]
    with ExitStack() as stack, torch.no_grad():
        for i in range(number):

            def before(_: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
                rest, named = tuple(args), dict(kwargs)
                first = named.pop("hidden_states") if "hidden_states" in named else rest[0]
                rest = rest[1:] if "hidden_states" not in kwargs else rest
                if i == 0:
                    hidden.append(first)
                calls[i].append((rest, named))

            block = network.get_submodule(f"{place}.{i}")
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        for batch in batches:
            network.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return hidden, calls


def _ran(
    network: Any,
    block: nn.Module,
    modules: Sequence[Module],
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
    batches: Sequence[Batch],
) -> tuple[dict[str, tuple[list[Tensor], list[Tensor]]], list[Tensor]]:
    """Of modules what they take in and give, a row a token; and what the block gives."""
    kept: dict[str, tuple[list[Tensor], list[Tensor]]] = {m.name: ([], []) for m in modules}
    after = []
    with torch.no_grad(), watched(network, kept) as seen:
        for states, (rest, named), batch in zip(hidden, calls, batches, strict=True):
            found = block(states, *rest, **named)
            after.append(found[0] if isinstance(found, tuple) else found)
            for name, parts in kept.items():
                for rows, values in zip(parts, seen[name], strict=True):
                    rows.append(values[batch.there])
    return kept, after


def _targets(
    network: Any,
    block: nn.Module,
    modules: Sequence[Module],
    hidden: Sequence[Tensor],
    calls: Sequence[Call],
    batches: Sequence[Batch],
) -> tuple[list[list[Module]], dict[str, list[Tensor]], list[Tensor]]:
    """Modules in the order of their calls, those with one input together; what each gives, and
    what the block gives."""
    kept, after = _ran(network, block, modules, hidden, calls, batches)
    known = {module.name: module for module in modules}
    rest, named = calls[0]
    with torch.no_grad(), watched(network, known) as seen:
        block(hidden[0], *rest, **named)
    stages: dict[int, list[Module]] = {}
    for name, (given, _) in seen.items():
        # Inputs are kept until here, so that none comes to lie in the place of another.
        stages.setdefault(given.data_ptr(), []).append(known[name])
    return [*stages.values()], {name: found for name, (_, found) in kept.items()}, after
