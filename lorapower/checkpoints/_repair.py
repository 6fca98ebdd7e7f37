"""Repair on texts: blocks in closed form [prop-repair], then all at once by gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from .. import randomness, regression
from ..lowrank import LowRank
from ._measuring import Batch, Reference, watch
from .pair import Adapter, Module, Pair

# The ridge that draws coefficients to the change itself, as a part of the inputs' mean variance.
SHRINKAGE = 0.05
# The polish's highest learning rate, relative to the root mean square of a module's factors.
RATE = 0.03
# A block's arguments after the hidden states.
Call: TypeAlias = tuple[list[Any], dict[str, Any]]


def balance(update: LowRank) -> LowRank:
    """The same update in float32, with factors of equal singular values, ``UΣ^{1/2}, VΣ^{1/2}``."""
    Q, S = torch.linalg.qr(update.left)
    P, T = torch.linalg.qr(update.right)
    U, values, Vh = torch.linalg.svd(S @ T.mT)
    half = values.sqrt()
    return LowRank((Q @ U * half).float(), (P @ Vh.mT * half).float())


def fit_blocks(
    pair: Pair,
    network: Any,
    adapter: Adapter,
    batches: Sequence[Batch],
    root: Callable[[str], Tensor | None],
    report: Callable[[int, int], None],
) -> Adapter:
    """Fit modules in turn, in the network adapted so far, to what they give in the tuned one."""
    pair.fill(network, "tuned")
    tuned, calls = _enter(network, pair.blocks, batches)
    pair.put(network, adapter)
    adapted, _ = _enter(network, pair.blocks, batches)
    fitted = Adapter(dict(adapter.factors), dict(adapter.biases))
    for i in range(len(calls)):
        prefix = f"{pair.blocks}.{i}."
        block = _Block(network, network.get_submodule(prefix[:-1]), calls[i], batches)
        inside = [module for module in pair.modules.values() if module.name.startswith(prefix)]
        pair.fill(network, "tuned", within=prefix)
        stages = block.stages(inside, tuned[0])
        targets, tuned = block.run(inside, tuned)
        pair.put(network, fitted, within=prefix)
        for stage in stages:
            inputs = torch.cat(block.run(stage[:1], adapted)[0][stage[0].name].inputs)
            for module in stage:
                if module.name in fitted.factors:
                    target = torch.cat(targets[module.name].outputs)
                    _fit(pair, network, fitted, module, inputs, target, root(module.name))
            pair.put(network, fitted, within=prefix)
        adapted = block.run([], adapted)[1]
        report(i + 1, len(calls))
    return fitted


def _fit(
    pair: Pair,
    network: Any,
    adapter: Adapter,
    module: Module,
    inputs: Tensor,
    target: Tensor,
    metric: Tensor | None,
) -> None:
    """Replace the factors and the bias of a module in an adapter [prop-repair]."""
    missing = target - inputs @ pair.weight("base", module).mT
    free = pair.frees_bias(module)
    if module.bias and not free:
        missing = missing - network.get_submodule(module.name).bias
    best = regression.reduced_rank(
        missing.mT.double(),
        inputs.mT.double(),
        adapter.factors[module.name].rank,
        towards=pair.change(module.name),
        shrinkage=SHRINKAGE,
        metric=metric,
        intercept=free,
    )
    adapter.factors[module.name] = balance(best.update)
    if free:
        adapter.biases[module.name] = best.intercept.float()


class _Seen(NamedTuple):
    """Inputs and outputs of a module, a row for each token, by batch."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class _Block(NamedTuple):
    """A block of a network, its further arguments by batch, and the batches."""

    network: Any
    block: nn.Module
    calls: Sequence[Call]
    batches: Sequence[Batch]

    def run(
        self, modules: Sequence[Module], hidden: Sequence[Tensor]
    ) -> tuple[dict[str, _Seen], list[Tensor]]:
        """What modules take in and give, and what the block gives."""
        kept = {module.name: _Seen([], []) for module in modules}
        after = []
        with torch.no_grad(), watch(self.network, kept) as seen:
            for states, (rest, named), batch in zip(hidden, self.calls, self.batches, strict=True):
                result = self.block(states, *rest, **named)
                after.append(result[0] if isinstance(result, tuple) else result)
                for name, parts in kept.items():
                    for rows, values in zip(parts, seen[name], strict=True):
                        rows.append(values[batch.there])
        return kept, after

    def stages(self, modules: Sequence[Module], hidden: Tensor) -> list[list[Module]]:
        """Modules in the order of their calls, grouped by their input."""
        known = {module.name: module for module in modules}
        rest, named = self.calls[0]
        with torch.no_grad(), watch(self.network, known) as seen:
            self.block(hidden, *rest, **named)
        stages: dict[int, list[Module]] = {}
        for name, (inputs, _) in seen.items():
            # Inputs are kept until here, so that no two have the same address.
            stages.setdefault(inputs.data_ptr(), []).append(known[name])
        return [*stages.values()]


def _enter(
    network: Any, blocks: str, batches: Sequence[Batch]
) -> tuple[list[Tensor], list[list[Call]]]:
    """Inputs of the first block, and each block's further arguments, by batch."""
    number = len(network.get_submodule(blocks))
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in range(number)]
    with ExitStack() as stack, torch.no_grad():
        for i in range(number):

            def before(_: nn.Module, args: Any, kwargs: Any, i: int = i) -> None:
                rest, named = [*args], dict(kwargs)
                states = named.pop("hidden_states") if "hidden_states" in named else rest.pop(0)
                if i == 0:
                    hidden.append(states)
                calls[i].append((rest, named))

            block = network.get_submodule(f"{blocks}.{i}")
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        for batch in batches:
            network.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return hidden, calls


def polish(
    pair: Pair,
    network: Any,
    adapter: Adapter,
    fit: Reference,
    select: Reference,
    *,
    steps: int,
    seed: int,
    report: Callable[[int, int], None],
) -> Adapter:
    """The best adapter, by the texts for selection, on the way of Adam on ``Σ‖f̂ − f̄‖²``."""
    # Embeddings and heads stay as they are; outputs are taken as if heads were as tuned.
    kept = {name: factors for name, factors in adapter.factors.items() if name in pair.words}
    pair.put(network, Adapter(dict(kept), {}))
    trained: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for module in (m for name, m in pair.modules.items() if name not in pair.words):
            start = adapter.factors.get(module.name)
            free = pair.frees_bias(module)
            if start is None and not free:
                continue
            place = network.get_submodule(module.name)
            parts = [] if start is None else [start.left.clone(), start.right.clone()]
            if free:
                parts.append(adapter.biases.get(module.name, place.bias) - place.bias)
            trained[module.name] = [part.requires_grad_() for part in parts]
            stack.callback(place.register_forward_hook(_add(parts, start is not None)).remove)

        def now() -> Adapter:
            factors, biases = dict(kept), {}
            for name, parts in trained.items():
                values = [part.detach().clone() for part in parts]
                if name in adapter.factors:
                    factors[name] = LowRank(values[0], values[1])
                if len(values) % 2:
                    biases[name] = network.get_submodule(name).bias + values[-1]
            return Adapter(factors, biases)

        parts = [part for several in trained.values() for part in several]
        groups = [{"params": [part], "lr": RATE * _size(part)} for part in parts]
        optimizer = torch.optim.Adam(groups, lr=RATE)
        schedule = _schedule(optimizer, steps)
        order = randomness.generator(seed, "polish")
        best, least = adapter, select.error(network)
        left: list[int] = []
        for step in range(1, steps + 1):
            left = left or torch.randperm(len(fit.batches), generator=order).tolist()
            i = left.pop()
            optimizer.zero_grad()
            off = fit.rows(network, fit.batches[i]) - fit.tuned_rows(i)
            loss = off.square().sum() / len(fit.batches[i].input_ids)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % max(1, steps // 8) == 0 or step == steps:
                error = select.error(network)
                if error < least:
                    best, least = now(), error
                if not math.isfinite(error):
                    break
            report(step, steps)
    return best


def _add(parts: Sequence[Tensor], low_rank: bool) -> Callable[..., Tensor]:
    """A hook that adds ``ABᵀ`` of the input, and the bias, to the output."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if low_rank:
            output = output + (inputs[0] @ parts[1]) @ parts[0].mT
        return output + parts[-1] if len(parts) % 2 else output

    return hook


def _size(part: Tensor) -> float:
    """The scale of learning rates: the root mean square of factors."""
    if part.ndim == 1:
        return 0.01
    return max(float(part.detach().square().mean().sqrt()), 1e-6)


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> SequentialLR:
    """Rates that rise over a tenth of the steps, then fall along a cosine."""
    rise = max(1, steps // 10)
    parts = [
        LinearLR(optimizer, 1 / rise, total_iters=rise - 1),
        CosineAnnealingLR(optimizer, max(1, steps - rise)),
    ]
    return SequentialLR(optimizer, parts, milestones=[rise])
