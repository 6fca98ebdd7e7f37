"""What is recorded of a language model's tunings and adapters, computed again on small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch

import records
from lorapower import bounds, lowrank, randomness
from lorapower.checkpoints import Pair
from lorapower.experiments import sweeps
from lorapower.networks import Transformer, from_decoder
from records import models, neighbours, pairs, parts, plans
from records.plans import AdapterRun


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return files.pair(tmp_path_factory.mktemp("llamas"), "LlamaForCausalLM")


def test_adapters_for_tunings_are_measured(
    llamas: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a small model, with tunings as the recipe makes them; the command's own are long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "BASE", llamas[0])
    monkeypatch.setattr(pairs, "texts", lambda kind, part: files.texts(120, len(part)))
    monkeypatch.setattr(plans, "TUNINGS", {"a": plans.Tuning("movies", 0, 61, (0.9,))})
    pair = Pair.open(llamas[0], str(plans.tuned("a")))
    assert all(pair.change(name).any() for name in pair.modules)
    plans.tune("movies", 3, plans.other(AdapterRun(tuning="a", method="mergekit", asked=1)))
    chosen = [s for s in plans.every("a") if s.asked <= 1 and s.method != "least uniform"]
    table = sweeps.run(chosen, plans.work, size=1, progress=False)
    table = records.complete(table).set_index("method")
    others = ["mergekit", *neighbours.RULES]
    assert {*table.index} == {*others, "effect of blocks", "effect", "least effect"}
    assert table.error["effect of blocks"] < table.error[[*neighbours.RULES]].min()
    # Embeddings as a whole are many more numbers; the other adapter is of another training.
    assert table.error["effect of blocks"] < table.error["effect"] < table.error["mergekit"]
    sides = sum(sum(m.shape) for m in plans.plan("a", plans.BLOCKS).modules.values())
    made = table.parameters[["effect of blocks", *neighbours.RULES]]
    assert made.between(0.9 * sides, sides).all()
    assert table.carried["mergekit"] == 3 * sides
    assert table.carried["effect of blocks"] > table.carried["effect"]
    planner = plans.plan("a", plans.BLOCKS)
    some, more = (plans.least(planner, "peft, energy", error) for error in (9, 0.1))
    assert some.parameters < more.parameters
    assert planner.error(more) <= 0.1


def blocks(folder: str) -> tuple[Any, Transformer]:
    network = models.decoder(folder).double().requires_grad_(False)
    return network, from_decoder(network, final_norm=False)


def test_parts_are_those_of_the_module(llamas: tuple[str, str]) -> None:
    network, own = blocks(llamas[1])
    ids = torch.arange(40).view(4, 10) + 4
    *_, (z, _) = parts.trace(own, network.get_input_embeddings()(ids).mT)
    expected = network.base_model(ids).last_hidden_state
    # Its norms are taken in float32.
    z = network.base_model.norm.weight * own.normalize(z).mT
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    n, others = randomness.normal(randomness.generator(0, "states"), 2, 5, 24, 6)
    one = own.normalize(n[..., :1])
    torch.testing.assert_close(parts.alone(own, 1, one), parts.attention(own, 1, one, one))
    # Tokens stand behind those of others.
    mixed = parts.attention(own, 1, n, others)
    for j in range(6):
        x = torch.cat([others[..., :j], n[..., j:]], -1)
        torch.testing.assert_close(mixed[..., j], parts.attention(own, 1, x, x)[..., j])


def test_what_is_not_affine_is_the_floor_of_attention(llamas: tuple[str, str]) -> None:
    base, tuned = (blocks(folder)[1] for folder in llamas)
    draw = randomness.generator(0, "states")
    n = base.normalize(randomness.normal(draw, 40, 24, 9))
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


def test_heads_differ_by_the_rank_of_their_changes() -> None:
    kind: Any = {"head_size": 4, "groups": 2, "residual": True, "norm": "rms", "rotary": 1e4}
    one = Transformer.random(2, 16, 4, hidden=16, gated=True, activation="silu", **kind)
    A, B = (randomness.normal(randomness.generator(0, name), 16, 1) for name in "AB")
    adapted = one.replace(W_Q=one.W_Q + (A @ B.mT).reshape(4, 4, 16))
    other = Transformer.random(2, 16, 4, hidden=16, gated=True, activation="silu", seed=1, **kind)
    found = {}
    for name, tuned in {"adapted": adapted, "other": other}.items():
        for block, part, quantity, value in parts.heads(one, tuned):
            found[name, block, part, quantity] = value
    for l, (W_K, W_Q, new) in enumerate(zip(one.W_K, one.W_Q, adapted.W_Q, strict=True)):
        changes = one.each_head(W_K).mT @ (new - W_Q)
        assert found["adapted", l, "scores", "numerical"] == lowrank.rank(changes).amin() == 1
        assert found["other", l, "scores", "numerical"] == 8
        assert found["other", l, "values", "numerical"] == 8
    # Heads of a group share keys, of the tuned network too.
    assert found["adapted", -1, "scores", "dependent"] == 2 * 2 * 4
    assert found["other", -1, "scores", "dependent"] == 0
