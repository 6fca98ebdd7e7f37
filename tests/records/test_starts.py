"""Starts of adapters: what they are, that training goes on from them, and the recorded choice."""

from __future__ import annotations

from typing import Any

import pytest
import text_files
import torch

import records
from records import language, models, starts
from records.starts import StartRun


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_files.save_llama(tmp_path_factory.mktemp("llama"))


def deltas(setting: StartRun, fall: float = 1.0) -> dict[str, torch.Tensor]:
    """What a start adds to each layer's weight."""
    network = starts.adapted(setting.model, setting.rank)
    begun = starts.begin_at(setting.source, setting.model, 0, setting.start, setting.rank)
    starts.put_factors(network, setting, begun, fall)
    layers = starts.adapters(network).items()
    return {n: m.get_delta_weight("default").detach() for n, m in layers}


def test_the_gradient_is_that_of_the_loss(llama: str) -> None:
    setting = StartRun(model=llama)
    found = starts.gradients(setting.source, llama, 0)
    network = models.decoder(llama)
    seen = starts.batches(setting, "train", starts.SEEN * starts.BATCH)
    for batch in seen:
        (starts.losses(network, batch).mean() / starts.SEEN).backward()
    layers = language.linear_layers(network.base_model)
    assert found.keys() == layers.keys()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in seen)
    for name, layer in layers.items():
        torch.testing.assert_close(found[name][0], layer.weight.grad, rtol=1e-3, atol=1e-5)
        assert found[name][1].shape == (tokens, layer.in_features)


@pytest.mark.parametrize("start", ["gradient", "whitened"])
def test_starts_are_best_approximations_with_the_fall_asked(start: Any, llama: str) -> None:
    """Over whitened inputs no other change of this rank has as large a fall for its size."""
    setting = StartRun(model=llama, start=start, rank=2)
    found, about = deltas(setting), starts.gradients(setting.source, llama, 0)
    fall, kept, total = 0.0, {}, 0.0
    for name, (gradient, inputs) in about.items():
        moment = torch.eye(inputs.shape[1], dtype=torch.float64)
        if start == "whitened":
            moment = (inputs.T @ inputs / len(inputs)).double()
            moment += starts.RIDGE * moment.diagonal().mean() * torch.eye(len(moment))
        # Another root than the code's, which changes nothing.
        values, vectors = torch.linalg.eigh(moment)
        root = vectors * values.sqrt() @ vectors.T
        white = gradient.double() @ torch.linalg.inv(root)
        left, sizes, right = torch.linalg.svd(white, full_matrices=False)
        best = left[:, :2] * sizes[:2] @ right[:2] @ torch.linalg.inv(root)
        kept[name] = best
        total += float(sizes[:2].square().sum())
        fall -= float((gradient * found[name]).sum())
    assert fall == pytest.approx(1.0, rel=1e-3)
    for name, best in kept.items():
        expected = (-best / total).float()
        torch.testing.assert_close(
            found[name], expected, rtol=1e-2, atol=1e-3 * expected.abs().max()
        )


@pytest.mark.parametrize("start", starts.STARTS)
def test_training_goes_on_from_each_start(start: Any, llama: str) -> None:
    setting = StartRun(model=llama, start=start, rank=2, steps=3, learning_rate=0.02)
    found = starts.train(setting)
    assert found.loss < found.begun
    assert (found.begun == found.base) == (start in ("random", "inputs"))
    assert starts.train(setting).loss == found.loss
    network = starts.adapted(llama, 2)
    lengths = [m.lora_A["default"].weight.norm() for m in starts.adapters(network).values()]
    assert all(0.5 < length / (2 / 3) ** 0.5 < 1.5 for length in lengths)


def test_recorded_rates_are_those_of_the_search() -> None:
    recorded = records.read("starts")
    chosen = starts.chosen(recorded)
    compared = recorded[recorded.part == "test"]
    assert {*compared.start} == {*starts.STARTS}
    assert (compared.learning_rate == compared.start.map(chosen)).all()
    assert not {*compared.seed} & {*recorded.seed[recorded.part == "validation"]}
