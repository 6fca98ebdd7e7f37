"""What is recorded of a language model's tunings and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_files as files
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import records
from lorapower import bounds, randomness
from lorapower.checkpoints import Pair
from lorapower.experiments import sweeps
from lorapower.networks import Transformer, from_decoder
from records import (
    language,
    models,
    neighbours,
    pairs,
    parts,
    plans,
    record,
    sizes,
    tune,
)


def test_adapters_for_tunings_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model, with tunings as the recipe makes them; the command's own are long."""
    base, _ = files.pair(tmp_path, "llama", "LlamaForCausalLM")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "BASE", base)
    monkeypatch.setattr(pairs, "texts", lambda kind, part: files.texts(120, len(part)))
    monkeypatch.setattr(plans, "TUNINGS", {"a": plans.Tuning("movies", 0, 60, (0.9,))})
    whole, adapter = plans.tuned("a"), tmp_path / "adapter"
    pair = Pair.open(base, str(whole))
    assert all(pair.change(name).any() for name in pair.modules)
    plans.tune("movies", 3, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * len(pair.modules)
    assert {min(value.shape) for value in weights.values()} == {3}
    assert all(value.any() for value in weights.values())
    plans.other(plans.Setting(tuning="a", method="mergekit", asked=1)).parent.mkdir(parents=True)
    adapter.rename(Path("others", "a", "mergekit-1"))
    chosen = [s for s in plans.every("a") if s.asked <= 1 and s.method != "least uniform"]
    sweeps.run(chosen, plans.work, "plans.sqlite", size=1, progress=False)
    table = records.complete(record.merge(["plans.sqlite"], plans.Setting)).set_index("method")
    others = ["mergekit", *neighbours.RULES]
    assert {*table.index} == {*others, "effect of blocks", "effect", "least effect"}
    assert table.error["effect of blocks"] < table.error[[*neighbours.RULES]].min()
    # Embeddings as a whole are many more numbers; the other adapter is of another training.
    assert table.error["effect of blocks"] < table.error["effect"] < table.error["mergekit"]
    sides = [sum(m.shape) for m in plans.plan("a", plans.BLOCKS).modules.values()]
    made = table.parameters[["effect of blocks", *neighbours.RULES]]
    assert made.between(0.9 * sum(sides), sum(sides)).all()
    assert table.carried["mergekit"] == 3 * sum(sides)
    assert table.carried["effect of blocks"] > table.carried["effect"]


def blocks(folder: str) -> tuple[Any, Transformer]:
    network = models.decoder(folder).double().requires_grad_(False)
    return network, from_decoder(network, final_norm=False)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return files.pair(tmp_path_factory.mktemp("llamas"), "llama", "LlamaForCausalLM")


def test_parts_are_those_of_the_module(llamas: tuple[str, str]) -> None:
    network, own = blocks(llamas[1])
    ids = torch.arange(40).view(4, 10) + 4
    *_, (z, _) = parts.trace(own, network.get_input_embeddings()(ids).mT)
    expected = network.base_model(ids).last_hidden_state
    # Its norms are taken in float32.
    z = network.base_model.norm.weight * own.normalize(z).mT
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    n = own.normalize(own.normalize(network.get_input_embeddings()(ids).mT[..., :1]))
    torch.testing.assert_close(parts.alone(own, 1, n), parts.attention(own, 1, n, n))


def test_what_is_not_affine_is_the_floor_of_attention(llamas: tuple[str, str]) -> None:
    base, tuned = (blocks(folder)[1] for folder in llamas)
    draw = randomness.generator(0, "states")
    n = base.normalize(randomness.normal(draw, 40, 24, 9))
    change = parts.feed_forward(tuned, 0, n) - parts.feed_forward(base, 0, n)
    assert parts.not_affine(change, n) > 0.01 * parts.variance(change)
    # Affine changes, and noise of variance 1, of which the fit's freedom takes no part.
    A, noise = randomness.normal(draw, 24, 24), randomness.normal(draw, 40, 24, 9)
    assert parts.not_affine(A @ n + 1, n) < 1e-20
    assert parts.not_affine(A @ n + noise, n) == pytest.approx(24, rel=0.1)
    change = parts.total(
        parts.feed_forward(tuned, l, n) - parts.feed_forward(base, l, n) for l in range(2)
    )
    floor = bounds.attention_floor(base, tuned, n[..., 1:].movedim(0, 1).flatten(1))
    # The library's is that of these very tokens.
    seen = (1 - 25 / 320) * parts.not_affine(change, n)
    assert seen == pytest.approx(24 * float(floor.value), rel=1e-3)


def test_tokens_stand_behind_those_of_others(llamas: tuple[str, str]) -> None:
    own = blocks(llamas[0])[1]
    n, others = randomness.normal(randomness.generator(0, "states"), 2, 5, 24, 6)
    mixed = parts.attention(own, 1, n, others)
    for j in range(6):
        x = torch.cat([others[..., :j], n[..., j:]], -1)
        torch.testing.assert_close(mixed[..., j], parts.attention(own, 1, x, x)[..., j])


def test_what_other_weights_of_one_function_save(llamas: tuple[str, str]) -> None:
    """All of a change that is none of the function; of others about what freedom there is."""
    base = blocks(llamas[0])[1]
    module, tuned = blocks(llamas[1])
    few = {row[1]: row[-1] for row in parts.freedoms(base, tuned)}
    assert set(few) == {"q k", "v o", "up down"}
    assert all(0 < share < 0.5 for share in few.values())
    draw = randomness.generator(1, "moves")
    for layer in module.base_model.layers:
        at, size = layer.self_attn, layer.self_attn.head_dim
        groups = len(at.k_proj.weight) // size
        angle, X = (
            1e-5 * randomness.normal(draw, groups),
            1e-5 * randomness.normal(draw, size, size),
        )
        swap = torch.eye(size).roll(size // 2, 1).double()
        swap[: size // 2] *= -1
        for g in range(groups):
            here = slice(g * size, (g + 1) * size)
            turn = torch.eye(size).double() + angle[g] * swap
            at.k_proj.weight[here] = turn @ at.k_proj.weight[here]
            at.v_proj.weight[here] += X @ at.v_proj.weight[here]
            for h in range(2 * g, 2 * g + 2):
                here = slice(h * size, (h + 1) * size)
                at.q_proj.weight[here] = turn @ at.q_proj.weight[here]
                at.o_proj.weight[:, here] -= at.o_proj.weight[:, here] @ X
        factor = 1 + 1e-5 * randomness.normal(draw, 40)
        layer.mlp.up_proj.weight *= factor[:, None]
        layer.mlp.down_proj.weight /= factor
    moved = from_decoder(module, final_norm=False)
    assert [row[-1] for row in parts.freedoms(tuned, moved)] == pytest.approx([1] * 3, rel=1e-3)


def test_rows_of_parts_are_unfolded() -> None:
    table = records.read("parts")
    found = [(-1, "", "directions", 3.0), (0, "q", "half", 2.0)]
    run = {"tuning": "a", "stage": "weights", "rows": json.dumps(found)}
    unfolded = parts.unfold(pd.DataFrame([run | {"torch": "2", "transformers": "5"}]))
    assert [*unfolded.columns] == [*table.columns]
    assert [*map(tuple, unfolded[["block", "part", "quantity", "value"]].to_numpy())] == found


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[pd.DataFrame, Any]]:
    """The table of some networks of a small language model, and the plan for full tuning."""
    folder = tmp_path_factory.mktemp("sizes")
    wide: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}
    change = files.low_rank(8, words=True)
    base, tuned = files.pair(folder, "llama", "LlamaForCausalLM", change=change, **wide)
    ways = (
        "full",
        "full again",
        "base",
        "blocks",
        "attention",
        "svd",
        "extracted",
        "shrunk",
        "cut by norm",
        "extracted whole",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "BASE", base)
        patch.chdir(folder)
        for setting in sizes.trained(0):
            if setting.way == "attention" or setting.rank == sizes.HIGHEST:
                network = language.prepare(sizes.trained(0)[setting])
                for name, value in network.named_parameters():
                    if "lora_B" in name:
                        draw = randomness.generator(0, name)
                        value.data = 0.02 * randomness.normal(draw, *value.shape).float()
                network.save_pretrained(tune.place(sizes.trained(0)[setting]))
        for seed in range(2):
            sizes.folder_of(seed, "full").symlink_to(tuned)
        chosen = [
            s for s in sizes.every(0) if s.way in ways and (s.way == "attention" or s.rank < 2)
        ]
        sweeps.run(chosen, sizes.work, "sizes.sqlite", size=1, progress=False)
        table = records.complete(record.merge(["sizes.sqlite"], sizes.Setting))
        assert len(table) == len(chosen) == len(ways)
        yield table.set_index("way"), sizes.plan(0, "full")


def test_ways_of_equal_size_are_of_equal_size(sized: tuple[pd.DataFrame, Any]) -> None:
    table, planner = sized
    sides = [sum(module.shape) for module in planner.modules.values()]
    assert len(sides) == 14
    assert table.parameters["svd"] == sum(sides)
    made = table.parameters[["extracted", "extracted whole", "shrunk", "cut by norm"]]
    assert made.between(0.9 * sum(sides), sum(sides)).all()
    assert table.parameters["attention"] == pytest.approx(4 * sum(sides), rel=0.1)
    found = table.error[["full", "full again", "base"]].tolist()
    assert found == pytest.approx([0, 0, 1], abs=1e-4)
    assert table.kl["full"] == pytest.approx(0, abs=1e-6)
    assert table.error_64["base"] == 1
    assert table.index[table.error_64.notna()].tolist() == ["base", "cut by norm", "shrunk"]
    assert 0 < table.error_64["shrunk"] < 1


@pytest.mark.parametrize("way", ["blocks", "svd"])
def test_what_is_recorded_of_sizes_is_so(sized: tuple[pd.DataFrame, Any], way: str) -> None:
    """Each number from networks that are put together here, without embeddings and norms."""
    table, planner = sized
    base, full = (models.decoder(str(c.folder)) for c in (planner.pair.base, planner.pair.tuned))
    network = models.decoder(str(planner.pair.base.folder))
    tuned = dict(full.named_parameters())
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.startswith("model.layers") and value.ndim == 2:
                change = tuned[name] - value
                if way == "svd":
                    U, S, V = torch.linalg.svd(change)
                    change = S[0] * torch.outer(U[:, 0], V[0])
                value += change
    squares: list[float] = []
    effect: list[float] = []
    divergence, equal = [], []
    for batch in planner.texts.test:
        for ids, there in zip(batch.input_ids, batch.is_token, strict=True):
            with torch.no_grad():
                found, start, aim = (
                    each(ids[there][None]).logits[0].double() for each in (network, base, full)
                )
            for values, other in ((squares, found), (effect, start)):
                gap = other - aim
                values.append(float((gap - gap.mean(-1, keepdim=True)).square().sum()))
            p, log = aim.softmax(-1), found.log_softmax(-1)
            divergence.append(float((p * (p.log() - log)).sum()))
            equal.append(int((found.argmax(-1) == aim.argmax(-1)).sum()))
    row = table.loc[way]
    for name, values in {"squares": squares, "effect": effect, "divergence": divergence}.items():
        np.testing.assert_allclose(row[name], values, rtol=2e-3)
    np.testing.assert_allclose(row.equal, equal, atol=1)
    assert row.error == pytest.approx(np.sqrt(sum(squares) / sum(effect)), rel=1e-3)
    assert row.kl == pytest.approx(sum(divergence) / row.decisions.sum(), rel=1e-3)
    problem = language.Problem(
        task="movies-next", model=str(planner.pair.base.folder), head="own", tokens=64, part="test"
    )
    losses = language.answer(network, problem)
    # In bfloat16 where the processor has it.
    assert row.loss == row.losses.mean() == pytest.approx(losses.mean(), abs=0.01)
    assert np.abs(row.losses - losses).max() < 0.1
