"""How many units of a target tuned gains can line up with frozen ones [thm-attention-only]."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorapower import randomness

SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, *shape: int) -> Tensor:
    return randomness.normal(randomness.generator(seed, "units"), *shape)


def between(gains: Tensor, frozen: Tensor, target: Tensor) -> float:
    """Sine of the angle between a frozen unit's normal and a target's, both without their mean."""
    pair = torch.stack([gains * frozen, target])
    pair = pair - pair.mean(-1, keepdim=True)
    pair = pair / pair.norm(dim=-1, keepdim=True)
    return float((pair[0] - (pair[0] @ pair[1]) * pair[1]).norm())


def four_vectors(frozen: Tensor, target: Tensor) -> Tensor:
    """The columns of the proof: dependent if and only if gains line both units up."""
    ratio = frozen[1] / frozen[0]
    return torch.stack([ratio * target[0], ratio, target[1], torch.ones_like(ratio)], -1)


@given(SEEDS, st.integers(4, 16))
def test_gains_line_up_one_unit(seed: int, width: int) -> None:
    frozen, target = draw(seed, 2, width)
    assert between(target / frozen, frozen, target) < 1e-12


@given(SEEDS)
def test_three_coordinates_let_gains_line_up_two_units(seed: int) -> None:
    frozen, target = draw(seed, 2, 2, 3)
    kernel = torch.linalg.svd(four_vectors(frozen, target), full_matrices=True).Vh[-1]
    gains = (kernel[0] * target[0] + kernel[1]) / frozen[0]
    for unit in (0, 1):
        assert between(gains, frozen[unit], target[unit]) < 1e-6


@pytest.mark.parametrize("width", [4, 7])
def test_frozen_second_weights_need_a_partner_in_as_many_blocks_as_coordinates(width: int) -> None:
    partners, target = draw(width, width, width), draw(width + 1, width, 1)
    for blocks in range(1, width + 1):
        left = target - partners[:, :blocks] @ torch.linalg.pinv(partners[:, :blocks]) @ target
        assert (float(left.norm()) < 1e-9) == (blocks == width)
