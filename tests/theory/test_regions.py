"""Regions: what linear maps and layers do over them, against random and extreme members."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds

from lorapower import InputError
from lorapower.regions import Ball, Box, Region, Samples


def some_region(kind: str, width: int, seed: int) -> Region:
    points = normal(width, 20, seed=seed)
    if kind == "ball":
        return Ball(2.5, points[:, 0])
    if kind == "box":
        return Box(points.amin(1), points.amax(1))
    return Samples(points, margin=0.3)


kinds = st.sampled_from(["ball", "box", "samples"])


@given(st.sampled_from(["ball", "box"]), st.integers(1, 6), seeds)
def test_regions_of_images_hold_them(kind: str, width: int, seed: int) -> None:
    region = some_region(kind, width, seed)
    matrix = normal(3, width, seed=seed + 1)
    bias = normal(3, 1, seed=seed + 2)
    affine = region.image(matrix, matrix @ region.centre + bias)
    for edge in (False, True):
        x = region.sample(500, edge=edge, seed=seed)
        images = matrix @ x + bias
        for values, holds in (
            (images, affine),
            (images.relu(), affine.relu()),
            (x.relu(), region.relu()),
        ):
            assert isinstance(holds, Box)
            assert ((values - holds.centre).abs() <= holds.half + 1e-12).all()
            # No more than that: of a single coordinate the values fill the box.
            if edge and width == 1:
                assert (values.amax(-1) - values.amin(-1) >= 2 * holds.half[:, 0] - 1e-12).all()


@given(st.integers(1, 6), st.floats(0.1, 10), seeds)
def test_typical_inputs_have_the_given_scale_and_are_in_the_region(
    width: int, scale: float, seed: int
) -> None:
    wide = Ball(1e3).fit(width, torch.float64)
    inputs = wide.typical(scale)
    covariance = inputs @ inputs.mT / inputs.shape[1]
    torch.testing.assert_close(covariance, scale**2 * torch.eye(width).double())
    for kind in ("ball", "box"):
        region = some_region(kind, width, seed)
        identity = torch.eye(width, dtype=torch.float64)
        beyond = (region.typical(scale) - region.centre).abs() + region.lowest(identity)
        assert (beyond <= 1e-12).all()


@pytest.mark.parametrize("region", [Ball(2.0), Ball([1.0, 2.0]), Ball(1, 0.5), Box(-1, 2)])
def test_single_numbers_need_a_width_first(region: Region) -> None:
    matrix = normal(4, 3)
    needs_width = [
        lambda: region.width,
        lambda: region.centre,
        lambda: region.sample(5),
        lambda: region.typical(1.0),
    ]
    for use in needs_width:
        with pytest.raises(InputError, match=r"region must be of a known width.*fit it to a width"):
            use()
    fitted = region.fit(3, torch.float64)
    torch.testing.assert_close(region.lowest(matrix), fitted.lowest(matrix))
    assert region.batch_shape == fitted.batch_shape
    assert fitted.sample(5).shape == (*fitted.batch_shape, 3, 5)


def test_plain_numbers_and_arrays_make_regions() -> None:
    assert Ball(2).fit(3, torch.float32).centre.dtype == torch.float32
    assert Box(-1, 1).fit(3, torch.float64).half.flatten().tolist() == [1, 1, 1]
    assert Box(np.zeros(2), np.ones(2)).centre.flatten().tolist() == [0.5, 0.5]
    assert Ball(1.0, [0.0]).sample(5).shape == Box([0.0], 1.0).sample(5).shape == (1, 5)
    assert Ball(0).fit(2, torch.float64).sample(3, edge=True).abs().max() == 0


@pytest.mark.parametrize(
    "region", [Ball(1.0, torch.zeros(3)), Box([0.0], 1.0), Samples(torch.ones(1, 2))]
)
def test_a_region_has_one_width(region: Region) -> None:
    with pytest.raises(InputError, match="region must be of 4 coordinates"):
        region.fit(4, torch.float64)


def test_the_ball_about_inputs_holds_them_and_no_more() -> None:
    x = 3 + normal(2, 4, 30)
    ball = Ball.about(x)
    distance = torch.linalg.vector_norm(x - ball.centre, dim=-2)
    torch.testing.assert_close(distance.amax(-1), ball.radius)
    torch.testing.assert_close(ball.centre, x.mean(-1, keepdim=True))
    torch.testing.assert_close(Ball.about(x, 1.5).radius, 1.5 * ball.radius)
