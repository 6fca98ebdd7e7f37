"""Linear networks: products, inputs of all kinds, and the way from and to torch.nn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, dtypes, seeds
from torch import nn

from lorapower import InputError, randomness
from lorapower.networks import FNN, LinearNetwork, product


@given(st.integers(1, 6), st.integers(1, 8), batch_shapes, dtypes, seeds)
def test_network_is_its_product(
    depth: int, width: int, batch: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    network = LinearNetwork.random(depth, width, batch_shape=batch, seed=seed, dtype=dtype)
    assert network.depth == depth
    assert network.widths == (width,) * (depth + 1)
    assert network.batch_shape == batch
    assert network.dtype == dtype
    x = torch.randn(*batch, width, 5, dtype=dtype, generator=randomness.generator(seed, "inputs"))
    stacked = np.stack([w.double().numpy() for w in network.weights])
    expected = x.double().numpy()
    for weight in stacked:
        expected = weight @ expected
    tolerance = 100 * torch.finfo(dtype).eps
    np.testing.assert_allclose(network(x).numpy(), expected, atol=tolerance)
    np.testing.assert_allclose((network.product() @ x).numpy(), expected, atol=tolerance)


def test_random_weights_are_drawn_as_torch_draws_its_own() -> None:
    ours = torch.stack(LinearNetwork.random(50, 16, seed=1).weights)
    with randomness.seeded(1, "theirs"):
        theirs = torch.stack([nn.Linear(16, 16).weight for _ in range(50)]).detach()
    assert ours.abs().max() <= 1 / 4
    assert theirs.abs().max() <= 1 / 4
    assert ours.var().item() == pytest.approx(theirs.var().item(), rel=0.05)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, np.ndarray.tolist])
def test_arrays_tensors_and_lists_are_the_same_network(kind: object) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 4, 4))
    network = LinearNetwork([kind(weight) for weight in weights])  # type: ignore[operator]
    np.testing.assert_array_equal(torch.stack(network.weights).numpy(), weights)
    np.testing.assert_array_equal(torch.stack(LinearNetwork(weights).weights).numpy(), weights)


def test_batches_of_layers_broadcast_and_can_be_picked_apart() -> None:
    network = LinearNetwork([torch.ones(5, 2, 3), torch.ones(4, 2)])
    assert network.batch_shape == (5,)
    assert network.product().shape == (5, 4, 3)
    assert network[2].batch_shape == ()
    assert network[1:3].batch_shape == (2,)


@pytest.mark.parametrize("index", [5, (0, 0), (slice(None), 0)])
def test_only_the_batch_is_indexed(index: object) -> None:
    with pytest.raises(IndexError):
        LinearNetwork.random(2, 4, batch_shape=(3,))[index]


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "without ReLU and biases; got a bias in Linear.* at 0: "),
        (
            nn.Sequential(nn.Linear(2, 2, bias=False), nn.Sequential(nn.ReLU())),
            "without ReLU and biases; got a ReLU after Linear.* at 0: FNN.from_sequential",
        ),
        (nn.Sequential(), "at least one matrix; got none"),
    ],
)
def test_other_modules_are_refused(module: nn.Sequential, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        LinearNetwork.from_sequential(module)


def test_a_batch_is_no_module() -> None:
    with pytest.raises(InputError, match=r"a single one; got batch shape \(3,\)"):
        LinearNetwork.random(2, 2, batch_shape=(3,)).to_sequential()


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ([], "at least one matrix; got none"),
        (None, "at least one matrix; got NoneType"),
        ([torch.ones(2, 3), torch.ones(2, 3)], "weight of layer 2 must be of 2 columns"),
        ([torch.ones(2, 2), torch.ones(2, 2).double()], "all float32 or all float64; got both"),
        ([torch.ones(2, 1, 1), torch.ones(3, 1, 1)], "batch shapes that broadcast"),
        ([torch.ones(2, 2), torch.full((2, 2), torch.nan)], "weight of layer 2 must be finite"),
        (torch.ones(2, 2), "at least 3 dimensions"),
        (torch.ones(2, 2, 2, dtype=torch.int64), "float32 or float64; got int64"),
        (torch.ones(0, 2, 2), "non-empty"),
    ],
)
def test_unusable_weights_are_refused(weights: object, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        LinearNetwork(weights)


def test_unusable_inputs_are_refused() -> None:
    network = LinearNetwork.random(2, 3)
    with pytest.raises(InputError, match=r"x must be of shape \[..., 3, samples\]"):
        network(torch.ones(5, 4))
    with pytest.raises(InputError, match="at least one matrix; got none"):
        product([])


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"width": 0}, {"width": 2.5}, {"seed": -1}])
def test_random_networks_need_sizes(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name} must be an integer from"):
        LinearNetwork.random(**{"depth": 1, "width": 1} | wrong)  # type: ignore[arg-type]


def test_batches_are_gone_through_member_by_member() -> None:
    batch = FNN.random(2, 3, batch_shape=(2, 4))
    members = [*batch]
    assert [member.batch_shape for member in members] == [(4,), (4,)]
    assert torch.equal(members[1].weights[0], batch.weights[0][1])
    with pytest.raises(IndexError):
        iter(batch[0, 0])
