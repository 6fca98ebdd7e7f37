"""Networks and their adapters: members of batches, merging, and the way from and to torch.nn."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, drawn_adapters, dtypes, normal, seeds
from torch import Tensor, nn

from lorapower import InputError, randomness
from lorapower.adapters import Adapters
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, LinearNetwork, Network, Transformer, as_network
from lorapower.training import Fresh, Tuning, train


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
    for make in (np.ones, torch.ones):
        stacks: list[Any] = [make((2, 2)), make((3, 2, 2))]
        assert [len(as_network(stack).weights) for stack in stacks] == [1, 3]


def test_batches_are_gone_through_member_by_member() -> None:
    batch = FNN.random(2, 3, batch_shape=(2, 4))
    members = [*batch]
    assert [member.batch_shape for member in members] == [(4,), (4,)]
    assert torch.equal(members[1].weights[0], batch.weights[0][1])
    with pytest.raises(TypeError):
        iter(batch[0, 0])


# The way from and to torch modules.

KINDS: tuple[type[FNN] | type[LinearNetwork], ...] = (FNN, LinearNetwork)


class Other(nn.Linear):
    """A layer that may do anything."""


class Backwards(nn.Sequential):
    """So may this one."""


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
    biases = [getattr(layer, "bias", None) for layer in module.modules()]
    plain = not network.relus and all(bias is None for bias in biases)
    assert isinstance(network, LinearNetwork) == plain
    assert network.widths == tuple(sizes)
    x = normal(3, sizes[0], seed=seed).to(network.dtype)
    atol = 200 * torch.finfo(network.dtype).eps
    torch.testing.assert_close(network(x.mT).mT, module(x), atol=atol, rtol=0)
    again = network.to_sequential()
    torch.testing.assert_close(again(x), module(x), atol=atol, rtol=0)
    there = as_network(again)
    pairs = zip(there.weights + there.biases, network.weights + network.biases, strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert there.relus == network.relus


FIRST = nn.Linear(2, 2, bias=False)
# Unusable modules, and what is said of them: in general the layer.
WRONG: list[tuple[nn.Sequential, str]] = [
    (nn.Sequential(FIRST, nn.Sequential(nn.GELU())), r"; got GELU\("),
    (nn.Sequential(OrderedDict(a=FIRST, norm=nn.LayerNorm(2))), r"; got LayerNorm\("),
    (nn.Sequential(Other(2, 2)), r"; got Other\("),
    (Backwards(FIRST), r"; got Backwards\("),
    (nn.Sequential(Backwards(FIRST)), r"; got Backwards\("),
    (nn.Sequential(nn.ReLU(), FIRST), r"; got ReLU\("),
    (nn.Sequential(FIRST, nn.Flatten()), r"; got Flatten\("),
    (nn.Sequential(nn.Flatten(0), FIRST), r"; got Flatten\("),
    (nn.Sequential(nn.Linear(2, 2), FIRST), "none after its layer 1"),
]


@pytest.mark.parametrize(("module", "said"), WRONG)
def test_other_modules_are_refused(module: nn.Sequential, said: str) -> None:
    with pytest.raises(InputError, match=f"^mine must be .*{said}"):
        as_network(module, name="mine")


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


def parameters(network: Network) -> tuple[Tensor, ...]:
    return (*network.weights, *network.biases)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4), batch_shapes, dtypes, st.booleans(), seeds
)
def test_merge_adds_the_products_of_the_factors(
    ranks: list[int], batch: tuple[int, ...], dtype: torch.dtype, biases: bool, seed: int
) -> None:
    network = FNN.random(len(ranks), 4, batch_shape=batch, seed=seed, dtype=dtype)
    double = network.to(torch.float64)
    adapters = drawn_adapters(double, ranks, seed, biases=biases)
    before = [part.clone() for part in parameters(network)]
    merged, wanted = adapters.merge(network), adapters.merge(double)
    for weight, update, old in zip(wanted.weights, adapters.updates, double.weights, strict=True):
        change = torch.einsum("...id,...jd->...ij", update.left, update.right)
        torch.testing.assert_close(weight, old + change)
    changes = adapters.bias_updates or [torch.zeros_like(b) for b in double.biases]
    for bias, change, old in zip(wanted.biases, changes, double.biases, strict=True):
        torch.testing.assert_close(bias, old + change)
    # The sum is taken in double precision and rounded once.
    for found, sure in zip(parameters(merged), parameters(wanted), strict=True):
        assert torch.equal(found, sure.to(dtype))
    assert all(map(torch.equal, parameters(network), before))
    assert merged.dtype == dtype
    assert adapters.ranks == tuple(ranks)
    assert adapters.parameter_count == 8 * sum(ranks) + 4 * len(ranks) * biases


def test_a_sum_that_is_not_finite_is_refused() -> None:
    network = LinearNetwork.random(1, 2)
    huge = torch.full((2, 1), 1e200, dtype=torch.float64)
    with pytest.raises(InputError, match="weight of layer 1 must be finite"):
        Adapters((LowRank(huge, huge),)).merge(network)


# Of a batch of shape [2, 2]: what one may write into the brackets.
INDICES: list[Any] = [0, -1, (1, 0), slice(1), (slice(None), 1), ..., None, [1, 0]]
INDICES += [torch.tensor([[True, False], [True, True]]), torch.zeros(2, 2, dtype=torch.bool)]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "fnn", "transformer"])
def test_members_are_those_of_the_network(kind: str, index: Any) -> None:
    networks: dict[str, Any] = {
        "linear": LinearNetwork.random(2, 3, batch_shape=(2, 2)),
        "fnn": FNN.random(2, 3, batch_shape=(2, 2)),
        "transformer": Transformer.random(1, 3, 2, batch_shape=(2, 2)),
    }
    network = networks[kind]
    ranks = [l % 3 for l in range(len(network.weights))]
    adapters = drawn_adapters(network, ranks, 0, biases=kind != "linear")
    picked = adapters[index]
    if not torch.arange(4).reshape(2, 2)[index].numel():
        assert picked.batch_shape == (0,)
        return
    assert picked.ranks == adapters.ranks
    assert picked.parameter_count == adapters.parameter_count
    found, sure = picked.merge(network[index]), adapters.merge(network)[index]
    assert picked.batch_shape == found.batch_shape == sure.batch_shape
    for one, other in zip(parameters(found), parameters(sure), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [2, (0, 0, 0), torch.ones(3, dtype=torch.bool)], ids=str)
def test_an_index_that_the_batch_does_not_have_is_refused(index: Any) -> None:
    network = LinearNetwork.random(2, 3, batch_shape=(2, 2))
    for batch in (network, drawn_adapters(network, [1, 1], 0)):
        with pytest.raises(IndexError):
            batch[index]


# Widths 5 → 6 → 4 → 3: ranks of the adapters, and how many numbers they and all biases have.
OWN: list[tuple[Tuning, tuple[int, ...], int]] = [
    (Tuning(2), (2, 2, 2), 2 * (11 + 10 + 7) + 13),
    (Tuning(5), (5, 4, 3), 5 * 11 + 4 * 10 + 3 * 7 + 13),
    (Tuning((0, 3, 1), biases=False), (0, 3, 1), 3 * 10 + 7),
    (Tuning(0), (0, 0, 0), 13),
    (Tuning(final=1), (0, 0, 0), 13),
    (Tuning(final=2, biases=False), (0, 0, 0), 0),
]


@pytest.mark.parametrize("batch", [(), (2,)])
def test_runs_of_training_have_ranks_and_counts_of_their_own(batch: tuple[int, ...]) -> None:
    sides = 5, 6, 4, 3
    weights = [normal(*batch, o, i).float() for i, o in pairwise(sides)]
    biases = [normal(*batch, o).float() for o in sides[1:]]
    frozen = FNN(weights, biases)

    def labelled(x: Tensor) -> Tensor:
        return x[..., :3, :]

    runs = train(frozen, [tuning for tuning, _, _ in OWN], Fresh(labelled, (5,)), steps=3)
    assert runs.adapters.ranks == (5, 4, 3)
    for i, (tuning, ranks, count) in enumerate(OWN):
        own = runs.adapters[i]
        assert own.ranks == ranks
        assert own.parameter_count == count
        assert bool(own.bias_updates) == tuning.biases
        if not tuning.final:
            merged, sure = own.merge(frozen), runs.network[i]
            for one, other in zip(parameters(merged), parameters(sure), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    both = runs.adapters[[0, 2]]
    assert both.ranks == (2, 3, 2)
    assert [both[0].ranks, both[1].ranks] == [(2, 2, 2), (0, 3, 1)]
    assert not both[1].bias_updates
