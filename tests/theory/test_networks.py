"""Linear networks: products, inputs of all kinds, and the way from and to torch.nn."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, dtypes, normal, seeds
from torch import Tensor, nn

from lorapower import InputError, randomness
from lorapower.networks import FNN, LinearNetwork, as_network


@given(st.integers(1, 6), st.integers(1, 8), batch_shapes, dtypes, seeds)
def test_network_is_its_product(
    depth: int, width: int, batch: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    network = LinearNetwork.random(depth, width, batch_shape=batch, seed=seed, dtype=dtype)
    assert network.depth == depth
    assert network.widths == (width,) * (depth + 1)
    assert network.batch_shape == batch
    assert network.dtype == dtype
    x = normal(*batch, width, 5, seed=seed).to(dtype)
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


def test_batches_of_layers_broadcast_and_can_be_picked_apart() -> None:
    network = LinearNetwork([torch.ones(5, 2, 3), torch.ones(4, 2)])
    assert network.batch_shape == (5,)
    assert network.product().shape == (5, 4, 3)
    assert network[2].batch_shape == ()
    assert network[1:3].batch_shape == (2,)


def test_batches_are_gone_through_member_by_member() -> None:
    batch = FNN.random(2, 3, batch_shape=(2, 4))
    members = [*batch]
    assert [member.batch_shape for member in members] == [(4,), (4,)]
    assert torch.equal(members[1].weights[0], batch.weights[0][1])
    with pytest.raises(TypeError):
        iter(batch[0, 0])


# The way from and to torch modules.

KINDS: tuple[type[FNN] | type[LinearNetwork], ...] = (FNN, LinearNetwork)


class Doubled(nn.Linear):
    """A layer that is a `Linear` by name only."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Backwards(nn.Sequential):
    """A Sequential by name only."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self):
            x = layer(x)
        return x


@st.composite
def modules(draw: st.DrawFn, *, linear: bool) -> tuple[nn.Sequential, list[int]]:
    """A module of random layers, some of them nested, and its sizes."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    dtype, biased = draw(dtypes), not linear and draw(st.booleans())
    last = not linear and draw(st.booleans())
    relu = nn.ReLU()  # one layer in many places
    idle = st.sampled_from([nn.Identity(), nn.Dropout(0.9)])
    layers: list[nn.Module] = draw(st.lists(idle, max_size=1))
    layers += draw(st.sampled_from([[], [nn.Flatten()]]))
    with randomness.seeded(draw(seeds), "module"):
        for l in range(1, len(sizes)):
            layers += draw(st.lists(idle, max_size=2))
            layers.append(nn.Linear(sizes[l - 1], sizes[l], bias=biased, dtype=dtype))
            layers += draw(st.lists(idle, max_size=1))
            if not linear and (l < len(sizes) - 1 or last):
                layers.append(relu)
    cut = draw(st.integers(0, len(layers)))
    nested = [nn.Sequential(*layers[cut:])] if draw(st.booleans()) else layers[cut:]
    return nn.Sequential(*layers[:cut], *nested), sizes


@pytest.mark.parametrize("kind", KINDS)
@given(st.data(), seeds)
def test_a_module_and_its_network_compute_the_same(
    kind: type[FNN] | type[LinearNetwork], data: st.DataObject, seed: int
) -> None:
    module, sizes = data.draw(modules(linear=kind is LinearNetwork))
    network = as_network(module.eval())
    assert isinstance(network, FNN | LinearNetwork)
    assert network.widths == tuple(sizes)
    x = normal(3, sizes[0], seed=seed).to(network.dtype)
    atol = 200 * torch.finfo(network.dtype).eps
    torch.testing.assert_close(network(x.mT).mT, module(x), atol=atol, rtol=0)
    again = network.to_sequential()
    torch.testing.assert_close(again(x), module(x), atol=atol, rtol=0)
    there = as_network(again)
    for mine, theirs in zip(
        (*there.weights, *there.biases), (*network.weights, *network.biases), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert there.relus == network.relus


FIRST = nn.Linear(2, 2, bias=False)
# Unusable modules, and which layer of them is named.
WRONG: dict[str, tuple[nn.Sequential, str]] = {
    "GELU": (nn.Sequential(FIRST, nn.Sequential(nn.GELU())), "GELU"),
    "LayerNorm": (nn.Sequential(OrderedDict(a=FIRST, norm=nn.LayerNorm(2))), "LayerNorm"),
    "subclass": (nn.Sequential(Doubled(2, 2)), "Doubled"),
    "own forward": (Backwards(FIRST), "Backwards"),
    "own forward inside": (nn.Sequential(Backwards(FIRST)), "Backwards"),
    "ReLU first": (nn.Sequential(nn.ReLU(), FIRST), "ReLU"),
    "late Flatten": (nn.Sequential(FIRST, nn.Flatten()), "Flatten"),
    "Flatten of samples": (nn.Sequential(nn.Flatten(0), FIRST), "Flatten"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_modules_are_refused_by_the_layer(case: str) -> None:
    module, named = WRONG[case]
    with pytest.raises(InputError, match=rf"^mine must be .*; got {named}\("):
        as_network(module, name="mine")


def test_layers_without_a_relu_between_them_have_no_biases() -> None:
    with pytest.raises(InputError, match="none between its layers 1 and 2"):
        as_network(nn.Sequential(nn.Linear(2, 2), FIRST))


def test_a_batch_is_no_module() -> None:
    with pytest.raises(InputError, match=r"a single network; got batch shape \(3,\)"):
        LinearNetwork.random(2, 2, batch_shape=(3,)).to_sequential()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_to_unchecked_parameters(kind: Any) -> None:
    network = kind.random(2, 3)
    parts = [
        [p.clone().requires_grad_() for p in each] for each in (network.weights, network.biases)
    ]
    network.with_parameters(*parts, checked=False)(torch.ones(3, 4).double()).sum().backward()
    assert all(part.grad is not None for each in parts for part in each)
    assert not network.with_parameters(*parts)(torch.ones(3, 4).double()).requires_grad


def test_modules_and_matrices_stand_for_networks() -> None:
    matrix = np.eye(2)
    plain, biased = (nn.Linear(2, 2, bias=bias) for bias in (False, True))
    kinds: list[tuple[Any, type, int]] = [
        (nn.Sequential(plain, nn.Dropout(), nn.Sequential(plain)), LinearNetwork, 2),
        (nn.Sequential(plain, nn.Sequential(nn.ReLU())), FNN, 1),
        (nn.Sequential(biased), FNN, 1),
        (matrix, LinearNetwork, 1),
        (torch.as_tensor(matrix), LinearNetwork, 1),
        ([matrix, matrix], LinearNetwork, 2),
        (np.stack([matrix] * 3), LinearNetwork, 3),
    ]
    for value, kind, depth in kinds:
        network = as_network(value)
        assert (type(network), len(network.weights)) == (kind, depth)
