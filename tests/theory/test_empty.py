"""Batches without a member: the answer is an empty one of the right shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorapower.constructions import fnn, linear, transformer
from lorapower.networks import FNN, LinearNetwork, Network, Transformer
from lorapower.regions import Ball

X = torch.ones(3, 5).double() + torch.eye(3, 5)

pytestmark = pytest.mark.parametrize("batch", [(0,), (2, 0)], ids=str)


def pair(kind: str, batch: tuple[int, ...]) -> tuple[Any, Any]:
    """A frozen network and a target, without a member."""
    if kind == "transformer":
        makers = (Transformer.random(2, 3, 2, batch_shape=batch, seed=seed) for seed in (0, 1))
    else:
        network: Any = {"linear": LinearNetwork, "fnn": FNN}[kind]
        makers = (network.random(d, 3, batch_shape=batch, seed=d) for d in (4, 2))
    frozen, target = makers
    return frozen, target


@pytest.mark.parametrize("kind", ["linear", "fnn", "transformer"])
def test_networks_adapt_and_merge(batch: tuple[int, ...], kind: str) -> None:
    frozen, target = pair(kind, batch)
    construction: Any = {"linear": linear, "fnn": fnn, "transformer": transformer}[kind]
    inputs = [Ball(1.0)] if kind == "fnn" else []
    found = construction.adapt(frozen, target, 2, *inputs)
    assert found.success.shape == batch
    merged: Network = found.adapters.merge(frozen)
    assert merged(X).shape == (*batch, 3, 5)
    assert frozen.members(...).shape == batch
