"""What is recorded of a language model's tunings and adapters, computed again on small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from checkpoint_files import Patch

import records
from loraplan import Pair, Planner, lab
from loraplan.lab import stream
from lorapower import lowrank, randomness
from lorapower.networks import Decoder
from records import neighbours, pairs, parts, plans
from records.plans import AdapterRun


def test_adapters_for_tunings_are_measured(tmp_path: Path, monkeypatch: Patch) -> None:
    """On a small model, with tunings as the recipe makes them; the command's own are long."""
    monkeypatch.chdir(tmp_path)
    base, _ = files.pair(tmp_path / "llamas", "LlamaForCausalLM")
    monkeypatch.setattr(plans, "BASE", base)
    monkeypatch.setattr(pairs, "texts", lambda kind, part: files.texts(120, len(part)))
    monkeypatch.setattr(plans, "TUNINGS", {"a": plans.Tuning("movies", 0, 61, (0.9,))})
    pair = Pair.open(base, str(plans.tuned("a")))
    assert all(pair.change(name).any() for name in pair.modules)
    plans.tune("movies", 3, plans.other(AdapterRun(tuning="a", method="mergekit", asked=1)))
    chosen = [s for s in plans.every("a") if s.asked <= 1 and s.method != "least uniform"]
    table = records.run(chosen, plans.work, size=1)
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
    some, more = (plans.least(planner, "peft, energy", error) for error in (9, 0.01))
    assert some.parameters < more.parameters
    assert planner.error(more) <= 0.1


def test_losses_of_a_few_directions_are_measured(tmp_path: Path) -> None:
    """Errors with and without one shift of all logits, and what blocks lose together."""
    change = files.low_rank(8, size=0.02)
    pair = Pair.open(*files.pair(tmp_path, "LlamaForCausalLM", change=change))
    texts = files.texts(61, 1), files.texts(61, 2)
    planner = Planner(pair, texts[0], held_out=texts[1], modules=plans.BLOCKS, carry="all")
    adapter = planner.uniform(planner.parameters(2))
    unshifted = parts.Unshifted(planner.test, stream(pair, "base", planner.device))
    found = {row[2]: row[3] for row in parts.measure(planner, unshifted, "rank", adapter)}
    expected = lab.measure(planner, adapter)
    assert found["error"] == pytest.approx(expected.error, rel=1e-4)
    assert found["agreement"] == pytest.approx(expected.agreement)
    tokens = files.apart(planner.test.batches)
    ways = "tuned", "base", adapter
    target, *others = (files.plain(pair.network(which), tokens) for which in ways)
    effect, lost = (logits - target for logits in others)
    rest = (lost - lost.mean(0)).norm() / (effect - effect.mean(0)).norm()
    assert found["unshifted"] == pytest.approx(float(rest), rel=1e-3)
    # A small tuning is linear.
    blocks, apart = parts.products(planner, adapter)
    assert float(blocks.sum()) == pytest.approx(float(lost.square().sum()), rel=0.3)
    assert torch.equal(blocks, blocks.mT)
    assert 0 < apart
    assert float(blocks.trace()) != pytest.approx(apart, rel=1e-3)


def test_heads_differ_by_the_rank_of_their_changes() -> None:
    kind: Any = {"head_size": 4, "groups": 2, "residual": True, "norm": "rms", "rotary": 1e4}
    one = Decoder.random(2, 16, 4, hidden=16, gated=True, activation="silu", **kind)
    A, B = (randomness.normal(randomness.generator(0, name), 16, 1) for name in "AB")
    adapted = one.replace(W_Q=one.W_Q + (A @ B.mT).reshape(4, 4, 16))
    other = Decoder.random(2, 16, 4, hidden=16, gated=True, activation="silu", seed=1, **kind)
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


def test_tails_are_what_ranks_miss_in_the_best_order_of_heads() -> None:
    kind: Any = {"head_size": 2, "residual": True, "norm": "rms", "rotary": 1e4}
    base, other = (Decoder.random(1, 8, 3, hidden=8, seed=seed, **kind) for seed in (0, 1))
    draw = randomness.generator(2, "near")
    near = base.map(lambda W: W + 0.01 * randomness.normal(draw, *W.shape))
    order = torch.tensor([2, 0, 1])
    moved = near.replace(**{name: getattr(near, name)[:, order] for name in ("W_Q", "W_K")})
    moved = moved.replace(**{name: getattr(near, name)[:, order] for name in ("W_V", "W_O")})
    found = {
        name: {row[1:3]: row[3] for row in parts.tails(base, target, "base") if row[4] == 2}
        for name, target in {"near": near, "moved": moved, "other": other}.items()
    }
    assert found["near"]["", "base moved"] == 0
    assert found["moved"]["", "base moved"] == 3
    for part in ("scores", "values"):
        at = part, "base tail"
        assert found["near"][at] == pytest.approx(found["moved"][at], rel=1e-6)
        assert found["near"][at] < found["other"][at]
        was, now = (
            left @ right.mT for left, right in (parts.factors(one)[part] for one in (base, near))
        )
        left_out = torch.linalg.svdvals(now - was)[:, 2:].square().sum()
        assert found["near"][at] == pytest.approx(float(left_out / now.square().sum()))
