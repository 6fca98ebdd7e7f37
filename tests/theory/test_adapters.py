"""Adapters: merging, counting, picking members, saving and loading."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import batch_shapes, dtypes, seeds
from torch import Tensor

from lorapower import InputError, ResultsError, randomness
from lorapower.adapters import Adapters, Tuned
from lorapower.constructions import fnn, transformer
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, LinearNetwork, Network, Transformer
from lorapower.regions import Ball
from lorapower.training import Fresh, Tuning, train


def random_adapters(
    network: Network, ranks: list[int], seed: int, *, biases: bool = False
) -> Adapters:
    generator = randomness.generator(seed, "test")

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*network.batch_shape, *shape, generator=generator, dtype=torch.float64)
        return drawn.to(network.dtype)

    updates = tuple(
        LowRank(*(normal(n, R) for n in w.shape[-2:]))
        for w, R in zip(network.weights, ranks, strict=True)
    )
    return Adapters(updates, tuple(normal(b.shape[-1]) for b in network.biases) if biases else ())


def parameters(network: Network) -> tuple[Tensor, ...]:
    return (*network.weights, *network.biases)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), batch_shapes, seeds)
def test_merge_adds_the_products_of_the_factors(
    ranks: list[int], batch: tuple[int, ...], seed: int
) -> None:
    network = LinearNetwork.random(len(ranks), 4, batch_shape=batch, seed=seed)
    adapters = random_adapters(network, ranks, seed)
    before = [weight.clone() for weight in network.weights]
    merged = adapters.merge(network)
    for weight, update, old in zip(merged.weights, adapters.updates, before, strict=True):
        change = sum(
            (
                torch.einsum("...i,...j->...ij", update.left[..., d], update.right[..., d])
                for d in range(update.rank)
            ),
            torch.zeros_like(old),
        )
        torch.testing.assert_close(weight, old + change)
    assert all(torch.equal(w, old) for w, old in zip(network.weights, before, strict=True))
    assert adapters.ranks == tuple(ranks)
    assert adapters.parameter_count == 8 * sum(ranks)


def test_a_sum_that_is_not_finite_is_refused() -> None:
    network = LinearNetwork.random(1, 2)
    huge = torch.full((2, 1), 1e200, dtype=torch.float64)
    with pytest.raises(InputError, match="weight of layer 1 must be finite"):
        Adapters((LowRank(huge, huge),)).merge(network)


@given(batch_shapes, seeds, st.booleans())
def test_merging_keeps_the_type_of_the_network(
    batch: tuple[int, ...], seed: int, biases: bool
) -> None:
    network = FNN.random(2, 3, batch_shape=batch, seed=seed)
    adapters = random_adapters(network, [1, 2], seed, biases=biases)
    narrow = network.to(torch.float32)
    merged = adapters.merge(narrow)
    assert merged.dtype == torch.float32
    assert all(bias.dtype == torch.float32 for bias in merged.biases)
    # The sum is taken in double precision and rounded once.
    wanted = adapters.merge(narrow.to(torch.float64)).to(torch.float32)
    for found, sure in zip(parameters(merged), parameters(wanted), strict=True):
        assert torch.equal(found, sure)


# Of a batch of shape [2, 2]: what one may write into the brackets.
INDICES: list[Any] = [
    0,
    -1,
    (1, 0),
    slice(1),
    (slice(None), 1),
    ...,
    None,
    [1, 0],
    torch.tensor([[True, False], [True, True]]),
    torch.zeros(2, 2, dtype=torch.bool),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "fnn", "transformer"])
def test_members_are_those_of_the_network(kind: str, index: Any) -> None:
    network: Any
    wanted: Any
    if kind == "transformer":
        network = Transformer.random(1, 3, 2, batch_shape=(2, 2))
        wanted = Transformer.random(1, 3, 2, seed=1)
        adapters = transformer.adapt(network, wanted, 2).adapters
    elif kind == "fnn":
        network = FNN.random(2, 3, batch_shape=(2, 1))
        # The target's batch makes the adapters' wider than the network's own.
        wanted = FNN.random(1, 3, batch_shape=(2,), seed=1)
        adapters = fnn.adapt(network, wanted, 1, Ball(1.0)).adapters
        network = network.map(lambda v: v.expand(2, 2, *v.shape[2:]))
    else:
        network = LinearNetwork.random(2, 3, batch_shape=(2, 2))
        adapters = random_adapters(network, [2, 0], 0)
    picked = adapters[index]
    assert picked.ranks == adapters.ranks
    assert picked.parameter_count == adapters.parameter_count
    if not torch.arange(4).reshape(2, 2)[index].numel():
        assert picked.batch_shape == (0,)
        return
    found, sure = picked.merge(network[index]), adapters.merge(network)[index]
    assert picked.batch_shape == found.batch_shape == sure.batch_shape
    for one, other in zip(parameters(found), parameters(sure), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [2, (0, 0, 0), torch.ones(3, dtype=torch.bool)], ids=str)
def test_an_index_that_the_batch_does_not_have_is_refused(index: Any) -> None:
    network = LinearNetwork.random(2, 3, batch_shape=(2, 2))
    for batch in (network, random_adapters(network, [1, 1], 0)):
        with pytest.raises(IndexError):
            batch[index]


TUNINGS = [
    Tuning(2),
    Tuning(5),
    Tuning((0, 3, 1), biases=False),
    Tuning(0),
    Tuning(0, biases=False),
    Tuning(final=1),
    Tuning(final=2, biases=False),
    Tuning(final=3),
]
# Widths 5 → 6 → 4 → 3: ranks of the adapters, and how many numbers are tuned.
OWN: list[tuple[tuple[int, ...], int, int]] = [
    ((2, 2, 2), 2 * (11 + 10 + 7) + 13, 2 * (11 + 10 + 7) + 13),
    ((5, 4, 3), 5 * 11 + 4 * 10 + 3 * 7 + 13, 5 * 11 + 4 * 10 + 3 * 7 + 13),
    ((0, 3, 1), 3 * 10 + 7, 3 * 10 + 7),
    ((0, 0, 0), 13, 13),
    ((0, 0, 0), 0, 0),
    ((0, 0, 0), 3, 12 + 3),
    ((0, 0, 0), 0, 12 + 24),
    ((0, 0, 0), 13, 12 + 24 + 30 + 13),
]


@pytest.mark.parametrize("batch", [(), (2,)])
def test_runs_of_training_have_ranks_and_counts_of_their_own(batch: tuple[int, ...]) -> None:
    sides, generator = (5, 6, 4, 3), randomness.generator(0, "test of runs")
    weights = [torch.randn(*batch, o, i, generator=generator) for i, o in pairwise(sides)]
    biases = [torch.randn(*batch, o, generator=generator) for o in sides[1:]]
    frozen = FNN(weights, biases)

    def labelled(x: Tensor) -> Tensor:
        return x[..., :3, :]

    runs = train(frozen, TUNINGS, Fresh(labelled, (5,)), steps=3)
    assert runs.adapters.ranks == (5, 4, 3)
    with pytest.raises(InputError, match=r"tune equally many .*some that tune \[0, 3, .*pick one"):
        _ = runs.adapters.parameter_count
    for i, (ranks, of_adapters, of_all) in enumerate(OWN):
        own = runs.adapters[i]
        assert own.ranks == ranks
        assert own.parameter_count == of_adapters
        assert runs.parameter_count[i].tolist() == torch.full(batch, of_all).tolist()
        assert bool(own.bias_updates) == (TUNINGS[i].biases)
        if not TUNINGS[i].final:
            merged, sure = own.merge(frozen), runs.network[i]
            for one, other in zip(merged.weights, sure.weights, strict=True):
                assert torch.equal(one, other)
            for one, other in zip(merged.biases, sure.biases, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    both = runs.adapters[[0, 2]]
    assert both.ranks == (2, 3, 2)
    assert [both[0].ranks, both[1].ranks] == [(2, 2, 2), (0, 3, 1)]
    assert not both[1].bias_updates
    assert runs.adapters[[3, 3]].parameter_count == 13


def adapted_network(draw: st.DrawFn) -> tuple[Network, Adapters]:
    seed, batch, dtype = draw(seeds), draw(batch_shapes), draw(dtypes)
    kind = draw(st.sampled_from(["linear", "fnn", "linear last", "transformer"]))
    network: Network
    if kind == "transformer":
        network = Transformer.random(
            draw(st.integers(1, 2)), 2, 2, head_size=1, batch_shape=batch, seed=seed, dtype=dtype
        )
    else:
        widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
        generator = randomness.generator(seed, "network to save")
        sides = list(pairwise(widths))
        weights = [torch.randn(*batch, o, i, generator=generator, dtype=dtype) for i, o in sides]
        biases = [torch.randn(*batch, o, generator=generator, dtype=dtype) for _, o in sides]
        if kind == "linear":
            network = LinearNetwork(weights)
        else:
            network = FNN(weights, biases, linear_last=kind == "linear last")
    ranks = [draw(st.integers(0, min(w.shape[-2:]))) for w in network.weights]
    tuned = bool(network.biases) and draw(st.booleans())
    adapters = random_adapters(network, ranks, seed, biases=tuned)
    if draw(st.booleans()):
        of_member = torch.tensor(ranks).expand(*batch, -1)
        flags = torch.ones(*batch, len(adapters.bias_updates), dtype=torch.bool)
        adapters = Adapters(adapters.updates, adapters.bias_updates, Tuned(of_member, flags))
    return network, adapters


@given(st.composite(adapted_network)())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_saved_is_loaded_bit_by_bit(
    tmp_path: Path, case: tuple[Network, Adapters]
) -> None:
    network, adapters = case
    path = tmp_path / "inner" / "adapters.safetensors"
    adapters.save(path, network)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for loaded in (Adapters.load(path, network), Adapters.load(str(path))):
        assert loaded.ranks == adapters.ranks
        assert loaded.parameter_count == adapters.parameter_count
        assert len(loaded.bias_updates) == len(adapters.bias_updates)
        for one, other in zip(loaded.updates, adapters.updates, strict=True):
            assert torch.equal(one.left, other.left)
            assert torch.equal(one.right, other.right)
            assert one.left.dtype == other.left.dtype
            assert one.left.shape == other.left.shape
        for bias, other_bias in zip(loaded.bias_updates, adapters.bias_updates, strict=True):
            assert torch.equal(bias, other_bias)
        assert (loaded.tuned is None) == (adapters.tuned is None)
        for part, other_part in zip(loaded.tuned or (), adapters.tuned or (), strict=True):
            assert torch.equal(part, other_part)
        # Where numbers lie in memory decides in which order they are summed.
        merged, sure = (placed_anew(each).merge(network) for each in (loaded, adapters))
        assert all(map(torch.equal, merged.weights, sure.weights))


def placed_anew(adapters: Adapters) -> Adapters:
    """The same numbers in memory of their own."""
    place = partial(torch.clone, memory_format=torch.contiguous_format)
    updates = (LowRank(place(update.left), place(update.right)) for update in adapters.updates)
    return replace(adapters, updates=tuple(updates))


def saved(tmp_path: Path) -> tuple[Path, FNN]:
    network = FNN.random(2, 3)
    path = tmp_path / "adapters.safetensors"
    random_adapters(network, [1, 2], 0, biases=True).save(path, network)
    return path, network


def others(network: FNN) -> dict[str, Network]:
    """Networks that the adapters of `saved` are not for, by what differs."""
    changed = [bias.clone() for bias in network.biases]
    changed[1][2] = torch.nextafter(changed[1][2], torch.tensor(9.0).double())
    return {
        "kind FNN; got kind LinearNetwork": LinearNetwork(network.weights),
        "widths": FNN.random(2, 4),
        "linear_last": FNN(network.weights, network.biases, linear_last=True),
        "type torch.float64": network.to(torch.float32),
        "batch shape": network.map(lambda v: v[None]),
        "the same weights and biases": FNN(network.weights, changed),
        "kind FNN; got kind Transformer": Transformer.random(1, 3, 1),
    }


@pytest.mark.parametrize("difference", others(FNN.random(2, 3)))
def test_another_network_is_told_what_differs(tmp_path: Path, difference: str) -> None:
    path, network = saved(tmp_path)
    with pytest.raises(InputError, match=rf"^network must be that of .*, of {difference}"):
        Adapters.load(path, others(network)[difference])


def test_adapters_are_saved_only_with_a_network_that_they_fit(tmp_path: Path) -> None:
    network = FNN.random(2, 3)
    adapters = random_adapters(network, [1, 2], 0, biases=True)
    wrong: list[Any] = [None, FNN.random(2, 4), LinearNetwork(network.weights)]
    for other in wrong:
        with pytest.raises(InputError, match=r"^network must be"):
            adapters.save(tmp_path / "adapters", other)
        with pytest.raises(InputError, match=r"^network must be"):
            adapters.merge(other)
    assert not any(tmp_path.iterdir())


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_one_line(tmp_path: Path, data: st.DataObject) -> None:
    path, network = saved(tmp_path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=r"adapters|damaged|format") as caught:
        Adapters.load(path, network)
    assert "\n" not in str(caught.value)


def test_foreign_files_and_none_are_one_line(tmp_path: Path) -> None:
    foreign, text, other = (tmp_path / name for name in ("foreign", "text", "other"))
    foreign.write_bytes(safetensors.torch.save({"weight": torch.ones(2)}))
    text.write_text("no tensors")
    path, network = saved(tmp_path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata() | {"format": "2"}
    other.write_bytes(safetensors.torch.save({"weight": torch.ones(2)}, header))
    for wrong in (foreign, text, other, tmp_path / "missing", tmp_path):
        with pytest.raises(ResultsError) as caught:
            Adapters.load(wrong, network)
        assert caught.value.path == wrong
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, network = saved(tmp_path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match=r"cannot be written \(No space left on device\)"):
        random_adapters(network, [2, 2], 1).save(path, network)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    with pytest.raises(ResultsError, match="cannot be written"):
        random_adapters(network, [2, 2], 1).save(tmp_path, network)
