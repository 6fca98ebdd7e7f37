"""Directions, in metrics and in function space, against differences of outputs and algebra."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorapower import checkpoints, randomness
from lorapower.checkpoints import Pair, Planner, _effect
from lorapower.checkpoints._measuring import outputs
from lorapower.checkpoints._metrics import Moments, find_directions

TEXTS = files.texts()
TIED: dict[str, Any] = {"tie_word_embeddings": True}
PARTS: list[tuple[str, dict[str, Any]]] = [
    ("BertForSequenceClassification", {}),
    ("DistilBertModel", {}),
    ("GPT2LMHeadModel", {}),
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", TIED),
    ("Qwen3ForCausalLM", TIED | {"num_key_value_heads": 1}),
    ("GemmaForCausalLM", {"hidden_size": 20}),
    ("Gemma2ForCausalLM", {}),
    ("Gemma2ForCausalLM", {"tie_word_embeddings": False, "hidden_size": 28}),
    ("Gemma3ForCausalLM", {}),
    ("Gemma3TextForSequenceClassification", {"hidden_size": 32}),
    ("Gemma3TextModel", {"use_bidirectional_attention": True}),
    ("ModernBertForSequenceClassification", {}),
    ("ModernBertModel", {"hidden_size": 32}),
    ("Olmo2ForCausalLM", {}),
    ("Olmo3ForCausalLM", TIED),
    ("SmolLM3ForCausalLM", {}),
    ("StableLmForCausalLM", {}),
    ("Starcoder2ForCausalLM", {}),
]


# In two metrics


def normal(seed: int, *shape: int) -> torch.Tensor:
    return randomness.normal(randomness.generator(seed, "drawn"), *shape)


SIZES, SEEDS = st.integers(1, 9), st.integers(0, 2**32 - 1)


def test_what_no_output_depends_on_gets_no_rank() -> None:
    about, E = Moments(normal(1, 5, 3), torch.zeros(5, 4)), normal(0, 4, 3)
    one = find_directions(E, about, 3, bias=True)
    assert one.values.numel() == one.total == 0
    assert torch.allclose(one.bias(0), E @ about.inputs.mean(0))


# In function space


def squares(planner: Planner, targets: list[torch.Tensor]) -> float:
    """Half of the mean squared distance of outputs, as logits, from the tuned network's."""
    total = 0.0
    with torch.no_grad():
        for batch, target in zip(planner.fit.batches, targets, strict=True):
            found = outputs(planner.network, batch, planner.pair.task)
            total += float((found.double() - target.double()).square().sum())
    return total / 2 / sum(len(batch.input_ids) for batch in planner.fit.batches)


def tuned(folder: Path, architecture: str, max_rank: int, **options: Any) -> Planner:
    """A planner of a small pair, of which all matrices changed, and whose network is the tuned."""
    change = files.low_rank(words=True)
    pair = Pair.open(*files.pair(folder, architecture, change=change, **options))
    planner = Planner(pair, TEXTS, max_rank=max_rank)
    planner.pair.fill(planner.network, "tuned")
    return planner


def put(planner: Planner, gains: torch.Tensor) -> None:
    """Give the network the tuned weights, but other gains of the pool's directions."""
    planner.put(planner._with_gains(gains - 1))
    with torch.no_grad():
        for name, module in planner.modules.items():
            rest, place = planner.pair.change(name), planner.network.get_submodule(name)
            place.weight.add_(rest.mT if module.transposed else rest)
            if planner.pair.frees_bias(module):
                place.bias.sub_(planner.weighted[name].shift)


@pytest.fixture(autouse=True)
def in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that differences of outputs can be told from rounding."""
    monkeypatch.setattr(_effect, "fast", lambda *_: torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize(("architecture", "options"), files.usually(PARTS))
def test_slopes_are_differences_of_what_is_lost(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Also of embeddings, of heads, and of what both share."""
    planner = tuned(tmp_path, architecture, max_rank=3, **options)
    readout = planner.readout
    for batch in planner.fit.batches:
        with torch.no_grad():
            found = readout.states(planner.network, batch)
            given = outputs(planner.network, batch, planner.pair.task)
        torch.testing.assert_close(readout.outputs(found), given, rtol=1e-4, atol=1e-4)
        near, far = (torch.pdist(rows) for rows in (readout.rows(found), given))
        torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-4)
    # Any outputs that the tuned head can give are as good to keep a distance from.
    planner.pair.fill(planner.network, "base")
    with torch.no_grad():
        states = [readout.states(planner.network, batch) for batch in planner.fit.batches]
        targets = [readout.outputs(each) for each in states]
    planner.pair.fill(planner.network, "tuned")
    derivatives = _effect.Derivatives(planner.network, planner._pool, readout)
    gains = torch.ones(len(planner._pool.costs), dtype=torch.float64)
    slopes = torch.zeros_like(gains)
    for batch, far in zip(planner.fit.batches, states, strict=True):
        target = derivatives.rows_of(far).detach()
        values = derivatives.rows(batch)
        slopes += derivatives.products(target - values).sum(0)
    slopes /= sum(len(batch.input_ids) for batch in planner.fit.batches)
    words = [planner._pool.places[name].start for name in planner.pair.words]
    assert words
    assert planner.modules.keys() > planner.pair.words.keys()
    for d in [*slopes.abs().argsort(descending=True)[:3].tolist(), *words]:
        lost = []
        for size in (0.02, -0.02):
            moved = gains.clone()
            moved[d] += size
            # Biases, where they are free, go with it, and what the pool lacks is as tuned.
            put(planner, moved)
            lost.append(squares(planner, targets))
        slope = -(lost[0] - lost[1]) / 0.04
        assert slope == pytest.approx(float(slopes[d]), rel=0.03, abs=1e-6)


@pytest.mark.parametrize("architecture", ["DistilBertModel", "GPT2LMHeadModel"])
def test_sketches_have_the_second_moments(architecture: str, tmp_path: Path) -> None:
    """Those of the derivatives of all outputs, one after the other."""
    planner = tuned(tmp_path, architecture, max_rank=1)
    exact = torch.zeros(2 * [len(planner._pool.costs)], dtype=torch.float64)
    derivatives = _effect.Derivatives(planner.network, planner._pool, planner.readout)
    for batch in planner.fit.batches:
        values = derivatives.rows(batch)
        # The place of each row in its text: one output of every text at a time.
        places = torch.cat([torch.arange(int(n)) for n in batch.attention_mask.sum(1)])
        for place in range(int(places.max()) + 1):
            for column in range(values.shape[1]):
                along = torch.zeros_like(values)
                along[places == place, column] = 1
                rows = derivatives.products(along)
                exact += rows.mT @ rows
    exact /= sum(len(batch.input_ids) for batch in planner.fit.batches)
    rows = _effect.sketch(planner.network, planner._pool, planner.fit, probes=200, seed=0)
    assert torch.dist(rows.mT @ rows / len(rows), exact) < 0.05 * exact.norm()


def drawn(seed: int, rows: int, modules: int, ranks: int) -> tuple[Any, torch.Tensor]:
    """A pool of modules of different cost, and a sketch whose directions add up coherently."""
    pool: Any = object.__new__(_effect.Pool)
    pool.costs = torch.arange(1.0, modules + 1, dtype=torch.float64).repeat_interleave(ranks)
    pool.bundles = torch.arange(modules * ranks)
    return pool, normal(seed, rows, 1) + normal(seed + 1, rows, modules * ranks)


def objective(features: torch.Tensor, alpha: float, gains: torch.Tensor) -> float:
    """What is minimized, written out."""
    H = features.mT @ features / len(features)
    shrunk = (1 - alpha) * H + alpha * H.diagonal().diag()
    fit = (gains - 1) @ shrunk @ (gains - 1)
    floor = _effect._FLOOR * H.diagonal().mean() * (gains - 1)[gains != 0].square().sum()
    return float(fit + floor)


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 4), st.integers(1, 3))
def test_gains_are_the_best(seed: int, rows: int, modules: int, ranks: int) -> None:
    pool, sketch = drawn(seed, rows, modules, ranks)
    alpha = (0.03, 0.3, 0.9)[seed % 3]
    most = float(pool.costs.sum())
    choice = _effect.Choice(pool, sketch, alpha, most)
    for budget in (most, most / 2):
        gains = choice.gains(budget)
        taken = gains != 0
        assert pool.costs[taken].sum() <= budget
        best = objective(sketch, alpha, gains)
        draw = randomness.generator(seed, "elsewhere")
        for _ in range(5):
            moved = gains + 0.1 * taken * randomness.normal(draw, len(gains))
            assert objective(sketch, alpha, moved) >= best - 1e-9


def test_all_directions_are_taken_as_they_are() -> None:
    pool, sketch = drawn(0, 40, 5, 2)
    gains = _effect.Choice(pool, sketch, 0.3, 1e9).gains(1e9)
    assert torch.allclose(gains, torch.ones_like(gains))
    assert _effect.predict(sketch, gains) < 1e-20


def test_bundles_are_taken_whole() -> None:
    pool, sketch = drawn(1, 30, 4, 4)
    pool.bundles = torch.arange(16) // 2
    for most in (*range(0, 40, 3), 1000):
        choice = _effect.Choice(pool, sketch, 0.1, most)
        # Also where fewer are asked for than were taken.
        for budget in range(0, most + 1, 2)[:30]:
            gains = choice.gains(budget)
            assert pool.costs[gains != 0].sum() <= budget
            taken = (gains != 0).view(8, 2)
            assert torch.equal(taken[:, 0], taken[:, 1])


def test_candidates_lose_less_where_losses_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one rank everywhere, for a tuning that all modules share."""
    places = files.pair(tmp_path, change=files.low_rank(rank=6, size=0.2))
    planner = Planner(Pair.open(*places), TEXTS, max_rank=8)
    number = planner.parameters(1)
    assert planner.error(planner.candidate(number)) < 0.8 * planner.error(planner.uniform(number))
    least = [planner.smallest(error).parameters for error in (0.5, 0.3, 0.1)]
    assert all(a <= b for a, b in itertools.pairwise(least))
    assert planner.error(planner.smallest(0.1)) <= 0.1
    # Also where the size that is predicted is much too small.
    monkeypatch.setattr(f"{Planner.__module__}.predict_least", lambda *_: 20)
    assert planner.error(planner.smallest(0.1)) <= 0.1


def test_tunings_of_biases_alone_need_no_factors(tmp_path: Path) -> None:
    def change(name: str, value: torch.Tensor) -> torch.Tensor | None:
        return 0.3 * torch.ones_like(value) if name.endswith("bias") else None

    plan = checkpoints.plan(*files.pair(tmp_path, change=change), TEXTS, error=0.1)
    assert plan.reached
    assert plan.adapter.parameters == 0
    assert set(plan.shares.values()) == {0.0}
