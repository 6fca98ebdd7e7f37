"""An adapter of a pair: factors and biases of its modules, and how a network gets them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..lowrank import LowRank
from .pair import Module, Pair


class Adapter(NamedTuple):
    """What is put on a base in place of the change of its modules.

    Attributes
    ----------
    factors : dict
        By module; one that is not there has rank 0.
    biases : dict
        Those of modules that are not the tuned ones.
    """

    factors: dict[str, LowRank]
    biases: dict[str, Float[Tensor, " out"]]

    @property
    def ranks(self) -> dict[str, int]:
        """By module."""
        return {name: factors.rank for name, factors in self.factors.items()}

    @property
    def parameters(self) -> int:
        """Numbers of the factors."""
        return sum(factors.parameter_count for factors in self.factors.values())


def put(
    pair: Pair,
    network: Any,
    adapter: Adapter,
    *,
    leave: Collection[str] = (),
    only: str = "",
    within: str = "",
) -> None:
    """Give a network of the pair the weights of the base with this adapter.

    All that is no module is as tuned, but for the kinds of `Other` in ``leave``. With ``only``, the
    other modules are the tuned ones; with ``within``, only parameters whose names begin so are set.
    """
    updates: dict[str, Callable[[], Tensor]] = {}
    for module in pair.modules.values():
        if only in ("", module.name):
            updates |= _of_module(pair, module, adapter)
    pair.fill(network, "tuned" if only else "adapted", leave=leave, updates=updates, within=within)


def towards(
    pair: Pair, network: Any, adapter: Adapter, part: float, *, leave: Collection[str] = ()
) -> None:
    """Give a network the tuned weights and ``part`` of what the adapted one has less than these.

    The adapted network has ``part`` 1. Between, and beyond 0, first order is what the outputs do.
    """
    updates: dict[str, Callable[[], Tensor]] = {}
    for module in pair.modules.values():
        updates |= _of_module(pair, module, adapter)
    for other in pair.others:
        if other.kind in leave and pair.base.has(other.name):
            updates.setdefault(other.name, functools.partial(pair.base.read, other.name))

    def between(name: str) -> Callable[[], Tensor]:
        def value() -> Tensor:
            tuned = pair.tuned.read(name)
            return tuned + part * (updates[name]() - tuned)

        return value

    pair.fill(network, "tuned", updates={name: between(name) for name in updates})


def _of_module(pair: Pair, module: Module, adapter: Adapter) -> Mapping[str, Callable[[], Tensor]]:
    name = module.name

    def weight() -> Tensor:
        base = pair.weight("base", module)
        if name in adapter.factors:
            base = base + adapter.factors[name].matrix().to(base.dtype)
        return base.mT if module.transposed else base

    found = {f"{name}.weight": weight}
    if name in adapter.biases:
        found[f"{name}.bias"] = lambda: adapter.biases[name].float()
    return found


def balanced(left: Float[Tensor, "out r"], right: Float[Tensor, "in r"]) -> LowRank:
    """The product ``left rightᵀ`` with factors of equal singular values, ``UΣ^{1/2}, VΣ^{1/2}``."""
    Q, S = torch.linalg.qr(left)
    P, T = torch.linalg.qr(right)
    U, values, Vh = torch.linalg.svd(S @ T.mT)
    half = values.sqrt()
    return LowRank((Q @ U * half).float(), (P @ Vh.mT * half).float())
