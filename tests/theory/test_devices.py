"""Results are on the device of their inputs: a smoke test, where torch finds CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorapower import bounds, randomness
from lorapower.constructions import adapt
from lorapower.networks import FNN, LinearNetwork, Transformer
from lorapower.regions import Ball
from lorapower.training import Fresh, Tuning, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
X = randomness.normal(randomness.generator(0, "inputs on devices"), 4, 40)


@pytest.mark.parametrize("kind", [LinearNetwork, FNN, Transformer])
def test_adapted_and_trained_networks_stay_where_they_are(kind: Any) -> None:
    heads = [2] if kind is Transformer else []
    frozen, target = (kind.random(2, 4, *heads, seed=s).to(device="cuda") for s in (0, 1))
    region = [Ball(1.0)] if kind is FNN else []
    found: Any = adapt(frozen, target, 2, *region, throw=False)
    merged = found.adapters.merge(frozen)
    assert merged.device.type == merged(X).device.type == "cuda"
    if kind is FNN:
        assert bounds.fnn_threshold(frozen, target).device.type == "cuda"
    if kind is not Transformer:
        runs = train(frozen, [Tuning(1)], Fresh(target, (4,)), steps=2)
        assert runs.network.device.type == "cuda"
