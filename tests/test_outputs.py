"""Dead outputs are those without a gradient, and carry at least what the target makes there."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batch_shapes, seeds

from lorapower import book, randomness
from lorapower.networks import FNN


def drawn(batch: tuple[int, ...], width: int, seed: int) -> tuple[FNN, FNN, torch.Tensor]:
    """A network with some dead outputs, a target, and inputs."""
    network, target = (
        FNN.random(2, width, batch_shape=batch, seed=seed, purpose=purpose)
        for purpose in ("network", "target")
    )
    generator = randomness.generator(seed, "inputs, dead outputs")
    off = torch.rand(*batch, width, generator=generator, dtype=torch.float64) < 0.5
    biases = [network.biases[0], network.biases[1] - 100 * off]
    x = torch.randn(width, 40, generator=generator, dtype=torch.float64)
    return network.with_parameters(network.weights, biases), target, x


@given(batch_shapes, st.integers(1, 6), seeds)
def test_dead_outputs_are_those_whose_weights_have_no_gradient(
    batch: tuple[int, ...], width: int, seed: int
) -> None:
    network, _, x = drawn(batch, width, seed)
    bias = network.biases[1].clone().requires_grad_()
    hidden = network.layers(slice(0, 1))(x)
    found = (network.weights[1] @ hidden + bias[..., None]).relu()
    # A target that no output meets, so that every output that is alive has a gradient.
    (found - found.detach() - 1).square().sum().backward()
    assert bias.grad is not None
    assert torch.equal(book.dead(network(x)), bias.grad == 0)
    assert book.dead(network(x)).shape == (*batch, width)


@given(batch_shapes, st.integers(1, 6), seeds)
def test_their_error_is_the_size_of_the_target_there(
    batch: tuple[int, ...], width: int, seed: int
) -> None:
    network, target, x = drawn(batch, width, seed)
    found, wanted = network(x), target(x)
    off = book.dead(found)
    part, rest = (book.share(found - wanted, chosen) for chosen in (off, ~off))
    whole = (found - wanted).square().sum((-2, -1))
    there = (wanted.square().sum(-1) * off).sum(-1)
    some = whole > 0
    torch.testing.assert_close((part * whole)[some], there[some])
    torch.testing.assert_close((part + rest)[some], torch.ones_like(whole)[some])


def test_a_share_of_no_error_is_no_number() -> None:
    assert book.share(torch.zeros(2, 3), torch.tensor([True, False])).isnan()
