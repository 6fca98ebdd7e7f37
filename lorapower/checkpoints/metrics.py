"""What modules take in, and what the outputs feel of theirs: second moments on calibration texts.

They are kept as rows whose products are the moments, from a QR factorization that takes in a batch
at a time, so that few or dependent samples cost no digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .. import randomness
from .families import Task
from .measuring import outputs
from .pair import Module
from .texts import Batch, count

# Random combinations of the outputs whose gradients are taken, for each text.
PROBES = 2
# Part of the weight of inputs that is the same for all tokens.
EVEN = 0.3


class Moments(NamedTuple):
    """Of a module, over calibration texts.

    Attributes
    ----------
    inputs : Tensor
        Rows ``Z`` with ``ZᵀZ = C``, the second moment of what it takes in: about the mean where a
        bias can make up for that, else about 0. Tokens count by the squared gradient of the
        network's outputs there, and in part (`EVEN`) all the same.
    mean : Tensor
        What was subtracted.
    outputs : Tensor
        Rows ``R`` with ``RᵀR = G``: ``vᵀGv`` is, to first order and in the mean over texts, the sum
        over tokens of the squared change of the network's outputs if ``v`` is added to the module's
        for this token.
    """

    inputs: Float[Tensor, "rows in"]
    mean: Float[Tensor, " in"]
    outputs: Float[Tensor, "rows out"]


class Rows:
    """The triangular factor of weighted rows that come in batches, and their mean."""

    def __init__(self, centred: bool) -> None:
        self.centred, self.total = centred, 0.0
        self._parts: list[Tensor] = []

    def add(
        self, rows: Float[Tensor, "rows columns"], weights: Float[Tensor, " rows"] | None = None
    ) -> None:
        """Take in more rows, each of weight 1 unless others are given."""
        weights = rows.new_ones(len(rows)) if weights is None else weights
        self.total += float(weights.sum())
        if self.centred:
            # The first row of the factor then holds the mean, and those below are about it.
            rows = torch.cat([rows.new_ones(len(rows), 1), rows], 1)
        self._parts.append(rows * weights.sqrt()[:, None])
        if sum(map(len, self._parts)) > 4 * rows.shape[1]:
            self._parts = [self.factor()]

    def moment(self) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, " columns"]]:
        """Rows whose products are the second moment, and the mean; zeros if none is subtracted."""
        factor = self.factor()
        if not self.total:
            return factor[:, self.centred :], factor.new_zeros(factor.shape[1] - self.centred)
        if not self.centred:
            return factor / self.total**0.5, factor.new_zeros(factor.shape[1])
        return factor[1:, 1:] / self.total**0.5, factor[0, 1:] / factor[0, 0]

    def factor(self) -> Float[Tensor, "rows columns"]:
        """Rows whose products are the weighted sum of those of all rows, not more than columns."""
        rows = torch.cat(self._parts)
        if len(rows) <= rows.shape[1] and not self.centred:
            return rows
        return torch.linalg.qr(rows, mode="r").R


def moments(
    network: Any,
    modules: Iterable[Module],
    batches: Sequence[Batch],
    task: Task,
    *,
    centred: bool = True,
    seed: int = 0,
) -> dict[str, Moments]:
    """`Moments` of these modules of a network, from one pass over the texts, and gradients of it.

    Gradients are those of random combinations of the outputs with independent normal weights, so
    that their second moment is the mean over outputs. ``centred`` only of modules with a bias.
    """
    chosen = {module.name: module for module in modules}
    into = {name: Rows(centred and module.bias) for name, module in chosen.items()}
    felt = {name: Rows(False) for name in chosen}
    probes = randomness.generator(seed, "probes")
    for batch in batches:
        with torch.enable_grad(), watched(network, chosen) as seen:
            found = outputs(network, batch, task)
            after = [given for _, given in seen.values()]
            weights = [torch.zeros(()) for _ in after]
            for probe in range(PROBES):
                drawn = randomness.normal(probes, *found.shape, dtype=found.dtype)
                gradients = torch.autograd.grad(
                    (found * drawn).sum(),
                    after,
                    retain_graph=probe < PROBES - 1,
                    allow_unused=True,
                )
                for i, (name, gradient) in enumerate(zip(seen, gradients, strict=True)):
                    given = torch.zeros_like(after[i]) if gradient is None else gradient
                    rows = _tokens(given, batch)
                    felt[name].add(rows)
                    weights[i] = weights[i] + rows.square().sum(-1)
        for (name, (given, _)), weight in zip(seen.items(), weights, strict=True):
            into[name].add(_tokens(given, batch), _mixed(weight))
    size = (count(batches) * PROBES) ** 0.5
    return {name: Moments(*into[name].moment(), felt[name].factor() / size) for name in chosen}


@contextmanager
def watched(network: Any, modules: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within it, what modules take in and give is seen, ``{name: (input, output)}``.

    They stand in the order of their calls. Where gradients are on, what they give has one, though
    no parameter does.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, given: tuple[Tensor, ...], found: Tensor) -> None:
            seen[name] = given[0].detach(), found

        return hook

    def start(_: Any, __: Any, found: Tensor) -> Tensor:
        return found.detach().requires_grad_(torch.is_grad_enabled())

    with ExitStack() as stack:
        for name in modules:
            place = network.get_submodule(name)
            stack.callback(place.register_forward_hook(watch(name)).remove)
        first = network.get_input_embeddings()
        stack.callback(first.register_forward_hook(start).remove)
        yield seen


def _tokens(values: Tensor, batch: Batch) -> Float[Tensor, "rows columns"]:
    """Of each token a row; of what there is one of for each text, that."""
    return values[batch.there] if values.ndim == 3 else values


def _mixed(weights: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Weights of mean 1, a part of which is the same for all."""
    mean = weights.mean()
    return EVEN + (1 - EVEN) * weights / mean if mean > 0 else torch.ones_like(weights)


def groups(modules: Iterable[Module], samples: int, memory: int) -> Iterator[list[Module]]:
    """Modules in runs whose moments take at most so many bytes, or one module each.

    ``samples`` are the tokens that they are taken from.
    """
    group: list[Module] = []
    taken = 0
    for module in modules:
        out, into = module.shape
        # While rows are taken in there are up to five times as many as columns.
        size = 4 * into * min(samples, 5 * into) + 4 * out * min(samples, out)
        if group and taken + size > memory:
            yield group
            group, taken = [], 0
        group.append(module)
        taken += size
    if group:
        yield group
