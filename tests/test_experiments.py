"""What the settings of experiments mean."""

from __future__ import annotations

import pytest
import torch

from lorapower.errors import InputError
from lorapower.experiments import SHIFT, Setting, measure


def mean_square(setting: Setting) -> float:
    frozen, target = setting.start()
    data, _ = setting.data(target)
    x, y = (part.double() for part in data.validation)
    return float((frozen(x) - y).square().mean())


def test_gain_scales_the_frozen_weights_alone() -> None:
    plain, target = Setting(depth=3, width=5).networks()
    scaled, same = Setting(depth=3, width=5, gain=2.0).networks()
    for one, other in zip(plain.weights, scaled.weights, strict=True):
        torch.testing.assert_close(2 * one, other, rtol=0, atol=0)
    for one, other in zip(
        [*plain.biases, *target.weights, *target.biases],
        [*scaled.biases, *same.weights, *same.biases],
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gain_is_a_factor_and_not_for_transformers() -> None:
    with pytest.raises(InputError, match="gain"):
        Setting(gain=0.0)
    with pytest.raises(InputError, match="gain"):
        Setting(model="transformer", depth=1, gain=2.0)


def test_start_is_as_drawn_or_pretrained_to_the_given_part_of_the_loss() -> None:
    setting = Setting(depth=2, width=6, seed=4)
    for one, other in zip(setting.start()[0].weights, setting.networks()[0].weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    losses = [mean_square(Setting(depth=2, width=6, seed=4, pretraining=p)) for p in (1.0, 0.25)]
    assert losses[1] <= 0.25 * losses[0] * (1 + 1e-5)
    # A step earlier it was above, and one step of this learning rate changes little.
    assert losses[1] >= 0.2 * losses[0]


def test_region_decides_where_a_construction_is_exact() -> None:
    near, far = measure(
        [Setting(width=6, method="construction", ranks=3, region=region) for region in (1.0, SHIFT)]
    )
    for found in (near, far):
        assert found["error"] < 1e-20 * found["signal"]
    assert far["shifted_error"] < 1e-18 * SHIFT**2 * far["signal"]
    assert near["shifted_error"] > 1e-4 * SHIFT**2 * near["signal"]


def test_region_is_of_constructions_of_relu_networks() -> None:
    for refused in ({"region": 2.0}, {"region": 0.0, "method": "construction"}):
        with pytest.raises(InputError, match="region"):
            Setting(**refused)
    with pytest.raises(InputError, match="region"):
        Setting(model="linear", method="construction", region=2.0)
