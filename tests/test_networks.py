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
from lorapower.networks import FNN, LinearNetwork


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
    "module",
    [nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())],
)
def test_modules_that_are_not_linear_are_refused(module: nn.Sequential) -> None:
    with pytest.raises(InputError, match=r"^module must be without ReLU and biases; got .* at 0"):
        LinearNetwork.from_sequential(module)


def test_a_batch_is_no_module() -> None:
    with pytest.raises(InputError, match=r"a single one; got batch shape \(3,\)"):
        LinearNetwork.random(2, 2, batch_shape=(3,)).to_sequential()


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ([], "weights"),
        (None, "weights"),
        ([torch.ones(2, 3), torch.ones(2, 3)], "weight of layer 2"),
        ([torch.ones(2, 2), torch.ones(2, 2).double()], "weights"),
        ([torch.ones(2, 1, 1), torch.ones(3, 1, 1)], "weights"),
        ([torch.ones(2, 2), torch.full((2, 2), torch.nan)], "weight of layer 2"),
        (torch.ones(2, 2), "weights"),
        (torch.ones(2, 2, 2, dtype=torch.int64), "weights"),
        (torch.ones(0, 2, 2), "weights"),
    ],
)
def test_unusable_weights_are_refused(weights: object, name: str) -> None:
    with pytest.raises(InputError) as caught:
        LinearNetwork(weights)
    assert caught.value.name == name


def test_unusable_inputs_are_refused() -> None:
    network = LinearNetwork.random(2, 3)
    with pytest.raises(InputError, match=r"x must be of shape \[..., 3, samples\]"):
        network(torch.ones(5, 4))


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


def test_networks_are_shown_on_one_line() -> None:
    wide = LinearNetwork([torch.ones(2, 8, 3), torch.ones(5, 8)])
    assert repr(wide) == "LinearNetwork(3→8→5, batch [2], float32)"
