"""What is recorded of a language model's tunings and adapters, and how often limits hold."""

from __future__ import annotations

from typing import Any

import checkpoint_files as files
import numpy as np
import parts
import pytest
import torch

from lorapower import _hub as hub
from lorapower import bounds, checkpoints, randomness
from lorapower.networks import from_decoder

KEYS = ["tuning", "method", "asked"]


def test_errors_are_those_of_the_texts() -> None:
    adapters, texts = checkpoints.read_record()
    sums = texts.groupby(KEYS)[["squares", "effect", "equal", "divergence", "decisions"]].sum()
    sums = sums.loc[[tuple(key) for key in adapters[KEYS].to_numpy()]]
    found: dict[str, Any] = {
        "error": np.sqrt(sums.squares / sums.effect),
        "agreement": sums.equal / sums.decisions,
        "kl": sums.divergence / sums.decisions,
    }
    for name, values in found.items():
        np.testing.assert_allclose(adapters[name].to_numpy(), values.to_numpy(), rtol=1e-9)
    assert (adapters.error_upper > adapters.error).all()


def test_all_adapters_are_measured_on_the_same_texts() -> None:
    adapters, texts = checkpoints.read_record()
    assert not adapters.duplicated(KEYS).any()
    for _, rows in texts.groupby("tuning"):
        assert len(rows) == len(rows[KEYS].drop_duplicates()) * rows.text.nunique()
    for _, rows in texts.groupby(["tuning", "text"]):
        # Logits of float32 are summed over tokens and words.
        assert rows.effect.std() <= 1e-4 * rows.effect.mean()
        assert rows.decisions.nunique() == 1


def test_what_is_carried_includes_the_factors() -> None:
    adapters, _ = checkpoints.read_record()
    own = adapters[adapters.method != "mergekit"]
    assert (own.carried >= own.parameters).all()
    assert (adapters.bytes >= 4 * adapters.carried).all()
    assert adapters[["lorapower", "torch", "peft"]].notna().all(axis=None)


def test_limits_of_errors_that_texts_share_always_hold() -> None:
    effect = np.arange(1.0, 80.0)
    assert checkpoints.measure_coverage(0.25 * effect, effect, texts=40) == (1, 1)


@pytest.mark.parametrize("sigma", [0.5, 1.2])
def test_limits_hold_as_often_as_they_say(sigma: float) -> None:
    """At least in 90 of 100 draws, where 95 are meant: five more by chance are rare."""
    draw = np.random.default_rng(0)
    effect = draw.lognormal(0, 0.5, 300)
    squares = effect * draw.lognormal(0, sigma, 300)
    _, everywhere = checkpoints.measure_coverage(squares, effect, texts=120, draws=100)
    assert everywhere >= 0.9


def test_limits_fail_where_one_text_holds_the_error() -> None:
    """Two of three draws of 120 texts of 300 miss it."""
    effect = np.ones(300)
    squares = np.random.default_rng(0).uniform(0.5, 1.5, 300)
    squares[7] = 3000
    _, everywhere = checkpoints.measure_coverage(squares, effect, texts=120, draws=100)
    assert everywhere < 0.5


def blocks(folder: str) -> tuple[Any, parts.Parts]:
    network = hub.language(folder).double().requires_grad_(False)
    return network, parts.Parts(network)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return files.pair(tmp_path_factory.mktemp("llamas"), "llama", "LlamaForCausalLM")


def test_parts_are_those_of_the_module(llamas: tuple[str, str]) -> None:
    network, own = blocks(llamas[1])
    ids = torch.arange(40).view(4, 10) + 4
    (_, _), *_, (z, _) = own.trace(ids)
    expected = network.base_model(ids).last_hidden_state
    # Its norms are taken in float32.
    z = network.base_model.norm.weight * own.normalize(z)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    n = own.normalize(z[:, :1])
    torch.testing.assert_close(own.alone(1, n), own.attention(1, n, n))


def test_what_is_not_affine_is_the_floor_of_attention(llamas: tuple[str, str]) -> None:
    base, tuned = (blocks(folder)[1] for folder in llamas)
    draw = randomness.generator(0, "states")
    n = base.normalize(randomness.normal(draw, 40, 9, 24))
    change = tuned.feed_forward(0, n) - base.feed_forward(0, n)
    assert parts.not_affine(change, n) > 0.01 * parts.variance(change)
    # Affine changes, and noise of variance 1, of which the fit's freedom takes no part.
    A, noise = randomness.normal(draw, 24, 24), randomness.normal(draw, 40, 9, 24)
    assert parts.not_affine(n @ A + 1, n) < 1e-20
    assert parts.not_affine(n @ A + noise, n) == pytest.approx(24, rel=0.1)
    change = parts.total(tuned.feed_forward(l, n) - base.feed_forward(l, n) for l in range(2))
    frozen, target = (from_decoder(hub.language(f).double(), final_norm=False) for f in llamas)
    floor = bounds.attention_floor(frozen, target, n[:, 1:].flatten(0, 1).mT)
    # The library's is that of these very tokens.
    seen = (1 - 25 / 320) * parts.not_affine(change, n)
    assert seen == pytest.approx(24 * float(floor.value), rel=1e-3)


def test_tokens_stand_behind_those_of_others(llamas: tuple[str, str]) -> None:
    own = blocks(llamas[0])[1]
    n, others = randomness.normal(randomness.generator(0, "states"), 2, 5, 6, 24)
    mixed = own.attention(1, n, others)
    for j in range(6):
        x = torch.cat([others[:, :j], n[:, j:]], 1)
        torch.testing.assert_close(mixed[:, j], own.attention(1, x, x)[:, j])


def test_what_other_weights_of_one_function_save(llamas: tuple[str, str]) -> None:
    """All of a change that is none of the function; of others about what freedom there is."""
    base, tuned = (blocks(folder)[1] for folder in llamas)
    few = {row[1]: row[-1] for row in parts.freedoms(base, tuned)}
    assert set(few) == {"q k", "v o", "up down"}
    assert all(0 < share < 0.5 for share in few.values())
    _, moved = blocks(llamas[1])
    draw = randomness.generator(1, "moves")
    for layer in moved.layers:
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
    assert [row[-1] for row in parts.freedoms(tuned, moved)] == pytest.approx([1] * 3, rel=1e-3)


def test_the_record_of_parts_is_whole() -> None:
    table = checkpoints.read_parts()
    keys = ["tuning", "stage", "block", "part", "quantity"]
    assert not table.duplicated(keys).any()
    assert table.notna().drop(columns="part").all(axis=None)
    wide = table[table.stage == "weights"].query("block >= 0")
    wide = wide.pivot(index=["tuning", "block", "part"], columns="quantity", values="value")
    assert len(wide) == 3 * 30 * 7
    assert (wide.half <= wide.nine).all()
    assert (wide.nine <= wide.numerical).all()
    shares = table[table.quantity.isin(["floor", "far floor", "free"])].value
    assert shares.between(0, 1).all()
    assert table[table.quantity == "few error"].value.le(0.4).all()
